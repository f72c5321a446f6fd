"""What ``/metrics`` shows: the scheduler's counters, where the cache's memory is, and times. For Prometheus."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from examples.engine.scheduler import Request, Scheduler

_COUNTERS = ["requests", "aborted", "steps", "preemptions"]
_TOKENS = ["prompt", "cached", "computed", "recomputed", "generated"]
_BYTES = ["reserved", "mapped", "used", "shared", "cached", "parked", "wasted"]


class Metrics:
    """registry: of this server alone."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self.registry = scheduler, CollectorRegistry()
        times = "engine_first_token_seconds", "engine_request_seconds"
        self._first, self._whole = (Histogram(name, "Since it came", registry=self.registry) for name in times)
        self.registry.register(self)

    def token(self, request: Request, last: bool) -> None:
        seconds = time.monotonic() - request.arrived
        if not request.answered:
            request.answered = True
            self._first.observe(seconds)
        if last:
            self._whole.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        scheduler, stats = self._scheduler, self._scheduler.allocator.stats()
        for name in [*_COUNTERS, *(f"{kind}_tokens" for kind in _TOKENS)]:
            yield CounterMetricFamily(f"engine_{name}", name.replace("_", " "), value=scheduler.counters[name])
        for name, queue in (("running", scheduler.running), ("waiting", scheduler.waiting)):
            yield GaugeMetricFamily(f"engine_requests_{name}", f"requests {name}", value=len(queue))
        memory = GaugeMetricFamily("kvmem_pool_bytes", "the KV cache, see kvmem.Stats", labels=["state"])
        for name in _BYTES:
            memory.add_metric([name], getattr(stats, f"{name}_bytes"))
        yield memory
