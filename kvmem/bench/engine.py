"""A continuous-batching scheduler in simulated time: the caller that a KV cache allocator has in a serving engine.

Time advances in steps of one decode step. In each step every running request grows by one token; a request that is
still prefilling computes its share of the prompt instead. Admission is first come, first served. When the pool cannot
hold the step's growth, the youngest request loses its memory and goes back to the head of the queue; its tokens so far
are recomputed (preemption by recompute).

Between two events (an arrival that could be admitted, the end of a prefill or of a request, a shortage) the set of
growing requests and their counts do not change, so that part is planned once; every step is still one call into the
pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvmem.bench.pools import Int32s
from kvmem.bench.text import BenchError
from kvmem.bench.traces import Trace

if TYPE_CHECKING:
    from kvmem.bench.replay import Meter


@dataclass(frozen=True)
class StepModel:
    """The simulated device. Each request prefills at ``prefill_tokens_per_second``, independently of the others (a
    prefill pool in front).

    ``chunked`` gives a prompt its memory chunk by chunk as it is computed; otherwise all of it at admission.
    """

    step_seconds: float = 0.030
    prefill_tokens_per_second: float = 5000.0
    chunked: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.step_seconds < math.inf and self.chunk_tokens >= 1):
            raise BenchError(
                f"a step of {self.step_seconds} s at {self.prefill_tokens_per_second} prefill tokens a second computes "
                "less than one token of a prompt; raise one of them"
            )

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens of one request computed in one step."""
        return round(self.step_seconds * self.prefill_tokens_per_second)


@dataclass
class Outcome:
    """What became of the requests. ``refused``: those that the pool could not hold even alone."""

    completed: int = 0
    refused: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    peak_running: int = 0
    peak_tokens: int = 0


class Scheduler:
    """Runs a whole trace against one pool. Deterministic: the same trace and the same answers of the pool give the same
    outcome.
    """

    def __init__(
        self, trace: Trace, meter: Meter, model: StepModel, *, max_sequences: int, bytes_per_token: int
    ) -> None:
        self.trace, self.meter, self.model = trace, meter, model
        self.max_sequences, self.bytes_per_token = max_sequences, bytes_per_token
        self._arrival_step = np.ceil(trace.arrival_seconds / model.step_seconds - 1e-9).astype(np.int64)
        self._generated = np.zeros(trace.num_requests, dtype=np.int64)
        # Running requests, oldest first, in the first `count` places. An admitted request is younger than all that run,
        # and the youngest is preempted first, so the order holds by itself, and the preempted form a stack with the
        # oldest on top.
        self.count = 0
        self.request = np.zeros(max_sequences, dtype=np.int64)
        self._ids: Int32s = np.zeros(max_sequences, dtype=np.int32)
        self._held = np.zeros(max_sequences, dtype=np.int64)  # tokens with memory
        self._wait = np.zeros(max_sequences, dtype=np.int64)  # steps until a prompt that has its memory is computed
        self._pending = np.zeros(max_sequences, dtype=np.int64)  # prompt tokens without memory yet (chunked)
        self._left = np.zeros(max_sequences, dtype=np.int64)  # tokens to generate
        self.preempted: list[int] = []
        self._next = 0  # the first request that was never admitted
        self._blocked = False  # the head of the queue did not fit, and nothing was freed since
        self._short = False  # this step ran short: what preemption frees is for the running, nothing is admitted
        self._step = 0
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Until every request has ended. Cost: a few microseconds a step beside the pool's own time."""
        while True:
            self._admit()
            if self.count == 0:
                if self._next >= self.trace.num_requests and not self.preempted:
                    break
                if not self.preempted:
                    self.meter.sample(self._step, 0, 0)
                    self._step = max(self._step, int(self._arrival_step[self._next]))
                continue
            self._run_to_event()
        self.outcome.steps = self._step
        return self.outcome

    @property
    def ended(self) -> int:
        """Requests completed or refused so far."""
        return self.outcome.completed + self.outcome.refused

    # Admission

    def _head(self) -> int | None:
        """The request at the head of the queue, if it has arrived."""
        if self.preempted:
            return self.preempted[-1]
        if self._next < self.trace.num_requests and self._arrival_step[self._next] <= self._step:
            return self._next
        return None

    def _admit(self) -> None:
        while not self._blocked and self.count < self.max_sequences and (request := self._head()) is not None:
            prompt = int(self.trace.input_tokens[request] + self._generated[request])
            ids = self._try_admit(request, prompt)
            if ids is not None:
                self._leave_queue()
                self._start(request, ids, prompt)
            elif self.count == 0 or self.trace.total_tokens[request] > self.meter.pool.max_tokens:
                self._leave_queue()
                self.outcome.refused += 1
            else:
                self._blocked = True

    def _try_admit(self, request: int, prompt: int) -> Int32s | None:
        if self.trace.total_tokens[request] > self.meter.pool.max_tokens:
            return None
        if not self.model.chunked:
            return self.meter.admit(request, prompt)
        # A prompt that takes memory as it goes is admitted when all of it fits beside what others still have to take.
        promised = int(self._pending[: self.count].sum()) + prompt
        if promised * self.bytes_per_token > self.meter.pool.usage().free_bytes:
            return None
        return self.meter.admit(request, min(prompt, self.model.chunk_tokens))

    def _leave_queue(self) -> None:
        if self.preempted:
            self.preempted.pop()
        else:
            self._next += 1

    def _start(self, request: int, ids: Int32s, prompt: int) -> None:
        n, chunk = self.count, self.model.chunk_tokens
        held = min(prompt, chunk) if self.model.chunked else prompt
        self.request[n], self._ids[n], self._held[n] = request, ids[0], held
        self._wait[n], self._pending[n] = -(-held // chunk), prompt - held
        self._left[n] = self.trace.output_tokens[request] - self._generated[request]
        self.count = n + 1
        self.outcome.peak_running = max(self.outcome.peak_running, self.count)

    # Steps

    def _plan(self) -> tuple[npt.NDArray[np.int64], int]:
        """Tokens that each running request gains in a step, and for how many steps that stays so."""
        n, chunk = self.count, self.model.chunk_tokens
        wait, pending, left = self._wait[:n], self._pending[:n], self._left[:n]
        gain = np.where(wait > 0, 0, np.where(pending > 0, np.minimum(pending, chunk), 1))
        lasts = np.where(wait > 0, wait, np.where(pending > 0, np.maximum(pending // chunk, 1), left))
        steps = int(lasts.min())
        if self._short:
            steps = 1
        if not self._blocked and n < self.max_sequences and self._next < self.trace.num_requests and not self.preempted:
            steps = min(steps, max(1, int(self._arrival_step[self._next]) - self._step))
        return gain, steps

    def _run_to_event(self) -> None:
        gain, steps = self._plan()
        growing = gain > 0
        ids, counts = self._ids[: self.count][growing], gain[growing].astype(np.int32)
        meter, running, first = self.meter, self.count, self._step
        fitted = True
        while self._step < first + steps:
            if len(ids) and not meter.grow(ids, counts):
                fitted = False
                break
            self._step += 1
            if self._step < first + steps:
                meter.end_step(running)  # the last step of the run ends below, with its frees
            if meter.sample_due(self._step):
                meter.sample(self._step, running, self._waiting())
        self._advance(gain, self._step - first)
        if fitted:
            if self._short:
                self._short = self._blocked = False
            self._finish()
            meter.end_step(running)
        else:
            self._preempt()

    def _waiting(self) -> int:
        arrived = int(np.searchsorted(self._arrival_step, self._step, side="right"))
        return max(arrived - self._next, 0) + len(self.preempted)

    def _advance(self, gain: npt.NDArray[np.int64], steps: int) -> None:
        n = self.count
        wait, pending = self._wait[:n], self._pending[:n]
        decoding = (wait == 0) & (pending == 0)
        self._held[:n] += gain * steps
        self._left[:n] -= decoding * steps
        self._generated[self.request[:n]] += decoding * steps
        np.maximum(wait - steps, 0, out=wait)
        np.maximum(pending - gain * steps * ~decoding, 0, out=pending)
        self.outcome.peak_tokens = max(self.outcome.peak_tokens, int(self._held[:n].sum()))

    def _finish(self) -> None:
        n = self.count
        ended = (self._wait[:n] == 0) & (self._pending[:n] == 0) & (self._left[:n] == 0)
        if ended.any():
            self.meter.finish(self._ids[:n][ended])
            self.outcome.completed += int(ended.sum())
            self._keep(~ended)

    def _keep(self, keep: npt.NDArray[np.bool_]) -> None:
        n, self.count = self.count, int(keep.sum())
        for column in (self.request, self._ids, self._held, self._wait, self._pending, self._left):
            column[: self.count] = column[:n][keep]
        self._blocked = False

    def _preempt(self) -> None:
        """Takes the memory of the youngest. Alone, it could never fit: refused."""
        last = self.count - 1
        self.meter.free(self._ids[last : last + 1].copy())
        self.count = last
        if last == 0:
            self.outcome.refused += 1
            self._short = self._blocked = False
            return
        self.outcome.preemptions += 1
        uncomputed = self._wait[last] * self.model.chunk_tokens
        self.outcome.recomputed_tokens += max(0, int(self._held[last] - uncomputed))
        self.preempted.append(int(self.request[last]))
        self._short = self._blocked = True
