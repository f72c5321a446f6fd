"""The serving workload that kvmem, the C++ floor and the peers are timed on; ``workload.h`` is its C++ form.

Prompts come in one by one; then all sequences decode in step, a token each; then they end one by one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmem.bench.drivers import harness
from kvmem.bench.drivers.harness import PHASES
from kvmem.bench.pools import Int32s

__all__ = ["Manager", "Timings", "Workload", "run_round"]

_VOCABULARY = 128_000


@dataclass(frozen=True)
class Workload:
    """``shared`` of the ``prompt`` tokens are the same in all prompts; all others differ, also from round to round.

    cache: prefixes are shared. metadata: a step writes every tensor that kernels read, not only slots and what is new
    in the table. evict: what is cached stays from round to round, so that in a small pool every allocation evicts.
    """

    sequences: int = 256
    prompt: int = 2048
    steps: int = 512
    shared: int = 0
    block: int = 16
    pool: int = 49_152
    cache: bool = False
    metadata: bool = False
    evict: bool = False

    @property
    def max_tokens(self) -> int:
        return -(-(self.prompt + self.steps) // self.block) * self.block

    @property
    def blocks(self) -> int:
        """What all sequences hold together at the end, with nothing shared."""
        return self.sequences * self.max_tokens // self.block

    def arguments(self) -> list[str]:
        """The words that the programs in ``benchmarks/native`` take."""
        words = []
        for name, value in asdict(self).items():
            words += [f"--{name}"] if value is True else [] if value is False else [f"--{name}", str(value)]
        return words

    def prompts(self, round_number: int) -> Int32s:
        """int32 [sequences, prompt]."""
        random = np.random.default_rng(round_number)
        prompts = random.integers(_VOCABULARY, size=(self.sequences, self.prompt), dtype=np.int32)
        prompts[:, : self.shared] = np.random.default_rng(0).integers(_VOCABULARY, size=self.shared, dtype=np.int32)
        return prompts

    def answers(self, round_number: int) -> Int32s:
        """int32 [steps, sequences]."""
        random = np.random.default_rng(1_000_000 + round_number)
        return random.integers(_VOCABULARY, size=(self.steps, self.sequences), dtype=np.int32)


class Manager(Protocol):
    """What a workload drives."""

    def admit(self, i: int, prompt: Int32s) -> None:
        """Sequence ``i`` begins: what is cached of its prompt is found, the rest gets room, all of it is published."""

    def step(self, last: Int32s | None) -> None:
        """Publishes the tokens that the step before wrote (``last``, None at the first), and makes room for one more of
        each sequence.
        """

    def release(self, i: int) -> None:
        """Sequence ``i`` ends."""

    def forget(self) -> None:
        """What is cached is given up. Not timed."""


@dataclass
class Timings:
    """Nanoseconds: of each admission, plain step, step at a block edge and end, a list a round."""

    admit: list[list[int]] = field(default_factory=list)
    step: list[list[int]] = field(default_factory=list)
    edge: list[list[int]] = field(default_factory=list)
    free: list[list[int]] = field(default_factory=list)

    def add(self, values: dict[str, list[int]]) -> None:
        for phase in PHASES:
            getattr(self, phase).append(values[f"{phase}_ns"])

    def all(self, phase: str) -> list[int]:
        return [value for values in getattr(self, phase) for value in values]

    def quietest(self, phase: str) -> float:
        """The median of the round that has the least: on a machine whose other tenants come and go."""
        return min((float(np.median(values)) for values in getattr(self, phase) if values), default=0.0)

    def typical(self, phase: str) -> npt.NDArray[np.float64]:
        """The median over the rounds of each position: without the pauses of a busy machine, which come anywhere."""
        return np.asarray(np.median(np.array(getattr(self, phase), dtype=np.float64), axis=0))


def run_round(manager: Manager, workload: Workload, round_number: int) -> dict[str, list[int]]:
    """Nanoseconds by phase, under the names that the programs print."""
    prompts, answers = workload.prompts(round_number), workload.answers(round_number)
    return harness.run_round(manager, prompts, answers, workload.block, forget=not workload.evict)
