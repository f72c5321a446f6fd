"""The scheduler of the benchmark once more, one step and one request at a time: slow, with nothing planned ahead."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvmem.bench.engine import Outcome, StepModel
from kvmem.bench.pools import Pool
from kvmem.bench.traces import Trace


@dataclass
class Job:
    request: int
    id: int = -1
    held: int = 0
    wait: int = 0
    pending: int = 0
    generated: int = 0


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


class Reference:
    def __init__(self, trace: Trace, pool: Pool, model: StepModel, max_sequences: int, bytes_per_token: int) -> None:
        self.trace, self.pool, self.model = trace, pool, model
        self.max_sequences, self.bytes_per_token = max_sequences, bytes_per_token
        self.queue = [Job(i) for i in range(trace.num_requests)]  # always in order of arrival
        self.running: list[Job] = []
        # Whole prompts are tried again in every step, although without a free the answer cannot change. A chunked one
        # that was turned away waits for a free by rule: rounding can make the estimate of its room waver.
        self.turned_away = False
        self.completed = self.refused = self.preemptions = self.recomputed = self.peak_running = self.peak_tokens = 0

    def arrival(self, job: Job) -> int:
        return math.ceil(self.trace.arrival_seconds[job.request] / self.model.step_seconds - 1e-9)

    def run(self) -> Outcome:
        step = 0
        while self.queue or self.running:
            self.admit(step)
            self.note_peak()
            if not self.running:
                if self.queue:
                    step = max(step, self.arrival(self.queue[0]))
                continue
            if self.step():
                step += 1
        return Outcome(
            self.completed, self.refused, self.preemptions, self.recomputed, step, self.peak_running, self.peak_tokens
        )

    def admit(self, step: int) -> None:
        while self.queue and len(self.running) < self.max_sequences and self.arrival(self.queue[0]) <= step:
            if self.turned_away:
                return
            job = self.queue[0]
            total = int(self.trace.total_tokens[job.request])
            prompt = int(self.trace.input_tokens[job.request]) + job.generated
            if total <= self.pool.max_tokens and self.start(job, prompt):
                self.running.append(self.queue.pop(0))
                self.peak_running = max(self.peak_running, len(self.running))
            elif not self.running or total > self.pool.max_tokens:
                self.queue.pop(0)
                self.refused += 1
            else:
                self.turned_away = self.model.chunked
                return

    def start(self, job: Job, prompt: int) -> bool:
        chunk = self.model.chunk_tokens
        held = min(prompt, chunk) if self.model.chunked else prompt
        if self.model.chunked:
            promised = (prompt + sum(other.pending for other in self.running)) * self.bytes_per_token
            if promised > self.pool.usage().free_bytes:
                return False
        ids = self.pool.open(1)
        if not self.pool.try_extend(ids, int32(held)):
            self.pool.free(ids)
            return False
        self.pool.commit(ids, int32(held))
        job.id, job.held, job.pending, job.wait = int(ids[0]), held, prompt - held, math.ceil(held / chunk)
        return True

    def gain(self, job: Job) -> int:
        if job.wait:
            return 0
        return min(job.pending, self.model.chunk_tokens) if job.pending else 1

    def step(self) -> bool:
        """One step of everybody. While it does not fit, the youngest is preempted; False when nobody is left."""
        while self.running:
            growing = [job for job in self.running if self.gain(job)]
            ids, counts = int32(*(job.id for job in growing)), int32(*(self.gain(job) for job in growing))
            if not growing or self.pool.try_extend(ids, counts):
                break
            self.preempt(self.running.pop())
        else:
            return False
        if growing:
            self.pool.commit(ids, counts)
        for job in self.running:
            gain = self.gain(job)
            job.held += gain
            if job.wait:
                job.wait -= 1
            elif job.pending:
                job.pending -= gain
            else:
                job.generated += 1
        self.note_peak()
        for job in [job for job in self.running if self.done(job)]:
            self.pool.free(int32(job.id))
            self.running.remove(job)
            self.completed += 1
            self.turned_away = False
        return True

    def note_peak(self) -> None:
        self.peak_tokens = max(self.peak_tokens, sum(job.held for job in self.running))

    def done(self, job: Job) -> bool:
        return not job.wait and not job.pending and job.generated == self.trace.output_tokens[job.request]

    def preempt(self, job: Job) -> None:
        self.pool.free(int32(job.id))
        self.turned_away = False
        if not self.running:
            self.refused += 1
            return
        self.preemptions += 1
        self.recomputed += max(0, job.held - job.wait * self.model.chunk_tokens)
        self.queue.insert(0, Job(job.request, generated=job.generated))
