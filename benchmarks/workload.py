"""The serving workload on which kvmem, the C++ baseline and the peers are timed (its C++ form is
``native/workload.h``), and the ways to drive kvmem: batched, a call a sequence, and by `SchedulerCache`.

Prompts are admitted one by one; then all sequences decode in step, a token each; then they end one by one.
"""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.peers import harness
from benchmarks.programs import build_floor, run_program
from kvmem import Allocator, CacheSpec, SchedulerCache, Sequence
from kvmem.bench.model import Backend, load_model
from kvmem.bench.pools import Int32s
from kvmem.bench.text import BenchError

FLOOR = "floor"  # the name of the C++ baseline in documents
_MALLINFO2 = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
_SPARE_BLOCKS = 2  # the null block and the padding block
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
    """What a workload drives; ``native/workload.h`` says what each call does."""

    def admit(self, i: int, prompt: Int32s) -> None: ...
    def step(self, last: Int32s | None) -> None: ...
    def release(self, i: int) -> None: ...
    def clear(self) -> None: ...


class Timings:
    """Nanoseconds of each admission, plain step, step at a block edge and end: by phase, a list a round."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[list[int]]] = {phase: [] for phase in harness.PHASES}

    def add(self, values: dict[str, list[int]]) -> None:
        for phase, rounds in self.rounds.items():
            rounds.append(values[f"{phase}_ns"])

    def all(self, phase: str) -> list[int]:
        return [value for values in self.rounds[phase] for value in values]

    def quietest(self, phase: str) -> float:
        """The smallest of the rounds' medians, because other work on the machine comes and goes."""
        return min((float(np.median(values)) for values in self.rounds[phase] if values), default=0.0)

    def typical(self, phase: str) -> npt.NDArray[np.float64]:
        """The median over the rounds of each position, which leaves out the pauses of a busy machine."""
        return np.asarray(np.median(np.array(self.rounds[phase], dtype=np.float64), axis=0))


def run_round(manager: Manager, workload: Workload, round_number: int) -> dict[str, list[int]]:
    """Nanoseconds by phase, under the names that the programs print."""
    prompts, answers = workload.prompts(round_number), workload.answers(round_number)
    return harness.run_round(manager, prompts, answers, workload.block, clear=not workload.evict)


def run_floor(workload: Workload, rounds: int = 2) -> dict[str, Any]:
    """What the C++ baseline printed: nanoseconds by phase of all rounds but the first, and its own counts."""
    return run_program(build_floor(), *workload.arguments(), "--rounds", str(rounds))


def floors() -> tuple[list[str], list[str]]:
    """The baseline's name if it can be compiled, and a note if it cannot."""
    try:
        build_floor()
    except BenchError as error:
        return [], [f"no floor: {error}"]
    return [FLOOR], []


def open_allocator(workload: Workload, backend: Backend, device: Literal["meta", "cpu"] = "meta") -> Allocator:
    """An allocator with room for ``workload.pool`` blocks. ``"meta"``: Llama 3 8B, of which a block is a page of 2 MiB;
    ``"cpu"``: real memory, with 64 bytes a token.
    """
    if device == "meta":
        spec, page_bytes, partial_pages = load_model(None, dtype="bfloat16", block_size=workload.block).spec, 2 << 20, 0
    else:  # a row ends anywhere in a page
        spec = CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=16, dtype="bfloat16", block_size=workload.block)
        page_bytes, partial_pages = 64 << 10, workload.sequences
    block_bytes = spec.bytes_per_token * workload.block
    pages = -(-(workload.pool + _SPARE_BLOCKS) * block_bytes // page_bytes) + partial_pages
    return Allocator(
        spec, backend=backend, device=device, memory=pages * page_bytes, max_sequences=workload.sequences,
        max_tokens=workload.max_tokens, page_bytes=page_bytes, map_ahead_tokens=0, tail_guard_tokens=0,
        prefix_cache=workload.cache,
    )  # fmt: skip


class _Ours:
    """A manager over an allocator."""

    def __init__(self, workload: Workload, allocator: Allocator) -> None:
        self.workload, self.allocator = workload, allocator

    def clear(self) -> None:
        self.allocator.clear_cache()


class Batched(_Ours):
    """A step is one call for the whole batch, and writes all metadata that has changed. Without a prefix cache an
    admission is one call too: nothing is published, and the first step commits the prompt with all that is reserved.
    """

    def __init__(self, workload: Workload, allocator: Allocator) -> None:
        super().__init__(workload, allocator)
        self.ids = np.zeros(workload.sequences, np.int32)
        self.batch = allocator.make_batch(max_new_tokens=workload.sequences, max_tokens=workload.max_tokens)
        self.each = [self.ids[i : i + 1] for i in range(workload.sequences)]
        self.prompt = np.full(1, workload.prompt, np.int32)

    def admit(self, i: int, prompt: Int32s) -> None:
        ids, cached = self.allocator.admit_batch(prompt)
        self.ids[i] = ids.item()
        if self.workload.cache:
            rest = prompt[cached.item() :]
            count = self.prompt if len(rest) == len(prompt) else self.prompt - cached
            self.allocator.commit_batch(self.each[i], count, rest)

    def step(self, last: Int32s | None) -> None:
        self.allocator.step(self.ids, self.batch, tokens=last if self.workload.cache else None)

    def release(self, i: int) -> None:
        self.allocator.free_batch(self.each[i])


class OneByOne(_Ours):
    """As a scheduler that asks for one request at a time: a step is a call a sequence, without metadata."""

    def __init__(self, workload: Workload, allocator: Allocator) -> None:
        super().__init__(workload, allocator)
        self.sequences: list[Sequence] = []

    def admit(self, i: int, prompt: Int32s) -> None:
        sequence = self.allocator.sequence(prompt if self.workload.cache else None)
        cached = sequence.num_cached_tokens
        sequence.extend(len(prompt) - cached)
        sequence.commit(prompt[cached:])
        self.sequences.append(sequence)

    def step(self, last: Int32s | None) -> None:
        if last is None or not self.workload.cache:
            for sequence in self.sequences:
                sequence.step()
        else:
            for i, sequence in enumerate(self.sequences):
                sequence.step(1, last[i : i + 1])

    def release(self, i: int) -> None:
        self.sequences.pop(0).free()


class ByRequest(_Ours):
    """`SchedulerCache`, called as vLLM's scheduler calls its manager: a step is a call a request, writes the changes
    of each answer into a block table, and takes the events. With ``metadata`` the table is copied to where kernels read
    it. As with `Batched`, the first step commits a prompt that is not published.
    """

    def __init__(self, workload: Workload, allocator: Allocator) -> None:
        super().__init__(workload, allocator)
        self.cache = SchedulerCache(allocator)
        self.table = np.zeros((workload.sequences, workload.max_tokens // workload.block), np.int32)
        self.read_table = np.zeros_like(self.table)

    def admit(self, i: int, prompt: Int32s) -> None:
        cached = self.workload.cache
        began = self.cache.allocate(i, tokens=prompt) if cached else self.cache.allocate(i, len(prompt))
        assert began is not None, "the pool is too small"
        began.write(self.table, i)
        if cached:
            self.cache.publish(i, prompt[self.cache.num_cached_tokens(i) :]).write(self.table, i)

    def step(self, last: Int32s | None) -> None:
        step, table, n = self.cache.step, self.table, self.workload.sequences
        ids = [None] * n if last is None or not self.workload.cache else [[token] for token in last.tolist()]
        for i, tokens in enumerate(ids):
            written = step(i, 1, tokens)
            assert written is not None, "the pool is too small"
            if written:
                written.write(table, i)
        self.cache.take_events()
        if self.workload.metadata:
            np.copyto(self.read_table, self.table)

    def release(self, i: int) -> None:
        self.cache.free(i)

    def clear(self) -> None:
        self.cache.clear_cache()


def open_manager(name: str, workload: Workload) -> Manager:
    """``name``: ``paged`` or ``virtual``; then ``cpu`` for real memory, ``one by one`` for a call a sequence, or
    ``SchedulerCache``.
    """
    words = name.split(", ")
    backend: Backend = "paged" if words[0] == "paged" else "virtual"
    allocator = open_allocator(workload, backend, "cpu" if "cpu" in words else "meta")
    if "SchedulerCache" in words:
        return ByRequest(workload, allocator)
    return OneByOne(workload, allocator) if "one by one" in words else Batched(workload, allocator)


def heap_bytes() -> int | None:
    """Bytes that malloc has allocated in this process, without Python's own small objects. None without glibc."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    fields = [(name, ctypes.c_size_t) for name in _MALLINFO2]
    mallinfo2.restype = type("Mallinfo2", (ctypes.Structure,), {"_fields_": fields})
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)
