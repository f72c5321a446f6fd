"""transformers' continuous batching over kvmem's memory.

    from kvmem.integrations.transformers import continuous_batching

    with continuous_batching(model, memory="2GiB", generation_config=config):
        outputs = model.generate_batch(prompts)

or, request by request, with what the ``with`` statement gives: ``manager.add_request(ids)``, ``manager.get_result()``,
``manager.cancel_request(id)``. Nothing of transformers is patched: the manager is transformers' own with a batch
processor over a cache of ours (``manager.batch_processor``), and its scheduler decides as always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from kvmem.integrations.transformers.batching.names import check_names

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

    from kvmem.integrations.transformers.batching.manager import KVMemManager

__all__ = ["continuous_batching"]


@contextmanager
def continuous_batching(
    model: PreTrainedModel,
    *,
    memory: int | float | str,
    generation_config: GenerationConfig | None = None,
    config: ContinuousBatchingConfig | None = None,
    attention: Literal["transformers", "kvmem"] = "transformers",
    max_tokens: int | None = None,
    **options: Any,
) -> Iterator[KVMemManager]:
    """Return a started manager of continuous batching whose cache is kvmem's; a context manager that stops it, after
    the requests that it has (at once if the body raised), and gives the memory back.

    Within it, ``model.generate_batch(prompts)`` uses the same manager, as often as it is called.

    model: on the CPU, with layers of full and sliding attention.
    memory: of the cache, as for ``Allocator``; masks and activations come on top.
    config: transformers' own, whose ``page_size`` is the block size; default ``page_size=16``. It may leave
        ``max_batch_tokens`` to kvmem (512). ``num_blocks``, ``cpu_offload_space`` and what only accelerators do
        (asynchronous batching, graphs, compilation) are refused: memory is given here, and ``tiers=`` keeps in host
        memory or on a disk what was preempted.
    attention: ``"transformers"`` gathers K and V and calls the attention that the model has (SDPA or eager), as with
        transformers' own cache; ``"kvmem"``: kvmem's CPU kernel reads them where they lie, without gather and mask.
    max_tokens: the most tokens of a request, its prompt included; default what the model's positions allow.
    options: of ``Allocator``, such as ``backend="virtual"``, ``policy``, ``tiers``; default ``backend="paged"`` and
        ``interleave="none"``, which a CPU gathers fastest.

    What transformers' own cache does not do: sliding windows share prefixes too; a preempted request keeps its blocks
    cached, so that it begins again where it stopped if memory allows; under pressure single blocks are evicted by
    ``policy``, not all of them. ``SpecError`` for a model, a configuration or a version of transformers that cannot be
    served, and where ``model`` keeps a manager already; ``OutOfMemory`` if ``memory`` does not hold a block.
    """
    check_names()
    from kvmem.integrations.transformers.batching.manager import open_manager  # needs the names

    manager = open_manager(model, memory, generation_config, config, attention, max_tokens, options)
    failed = True
    try:
        manager.start()
        yield manager
        failed = False
    finally:
        manager.close(hard_stop=failed)
