"""A manager of continuous batching over a ``PagedCache``: what is checked, what is made, what requests are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from kvmem.allocator import Allocator
from kvmem.arguments import brief, check_choice, check_size
from kvmem.errors import OutOfMemory, SpecError
from kvmem.integrations.transformers.batching.cache import IN_PLACE, PagedCache, attention
from kvmem.integrations.transformers.opening import as_stored
from kvmem.spec import CacheSpec

__all__ = ["KVMemManager", "open_manager"]

BLOCK_TOKENS, BATCH_TOKENS = 16, 512
#: Fields of a ``ContinuousBatchingConfig`` that must be as they are by default, and why.
_REFUSED = {
    "num_blocks": "memory= says how large the cache is",
    "cpu_offload_space": "tiers=Tiers(host=...) keeps what is preempted in host memory, with prefix sharing",
    "use_async_batching": "it is for GPUs",
    "use_cuda_graph": "it is for GPUs",
    "varlen_compile_config": "kvmem's memory is not compiled into a graph",
    "default_compile_level": "kvmem's memory is not compiled into a graph",
}
#: Attribute of a model by which ``generate_batch`` finds the manager of an earlier session.
_KEPT = "_cached_continuous_batching_manager"


class KVMemManager(ContinuousBatchingManager):  # type: ignore[misc]
    """transformers' manager, whose batch processor is over a ``PagedCache`` in every session."""

    def __init__(
        self, model: PreTrainedModel, generation_config: GenerationConfig, config: ContinuousBatchingConfig,
        in_place: bool,
    ) -> None:  # fmt: skip
        self._in_place, self._outside = in_place, model.config._attn_implementation
        super().__init__(model, generation_config=generation_config, continuous_batching_config=config)

    def switch_to_cb_friendly_attn(self, model: PreTrainedModel, auto_switch_to_flash: bool = False) -> None:
        """Set the attention of a session; ``stop()`` sets the model's own again."""
        if self._in_place:
            self._original_attn_impl = self._outside
            model.set_attn_implementation(IN_PLACE)
        else:
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash=False)

    def use(self, cache: PagedCache) -> None:
        """Run over ``cache`` from the next ``start()`` on."""
        config = self.continuous_batching_config
        update_cb_config_after_cache_creation(
            cb_config=config, num_blocks=cache.num_blocks, max_batch_tokens=cache.max_batch_tokens
        )
        self._use_prefix_sharing = cache.use_prefix_sharing
        scheduler = SCHEDULER_MAPPING[config.scheduler_type](
            cache=cache, safety_margin=config.safety_margin, max_requests_per_batch=config.max_requests_per_batch
        )
        self._processor = ContinuousBatchProcessor(
            cache=cache, config=self.model.config.get_text_config(), generation_config=self.generation_config,
            continuous_batching_config=config, logit_processor=self.logit_processor, input_queue=self.input_queue,
            cancel_queue=self.cancel_queue, output_router=self.output_router,
            background_thread_status=self.background_thread_status, model_device=self.model.device,
            model_dtype=self.model.dtype, scheduler=scheduler, distributed_helper=self.distributed_helper,
        )  # fmt: skip
        if self._processor.model_runner.pad_inputs:
            raise SpecError("model: its config has a compile_config; kvmem's memory is not compiled into a graph")

    def start(self) -> None:
        """Start the session, if none runs: ``generate_batch`` starts one that does."""
        if not self.is_running():
            super().start()

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        # Without this, the second of two generate_batch() would run over transformers' own cache: stop() drops the
        # processor, unless the session is to be kept.
        self.batch_processor = self._processor
        return super()._create_batch_processor()

    @property
    def cache(self) -> PagedCache:
        """The cache; its ``allocator`` has ``stats()`` and ``check()``."""
        cache: PagedCache = self._processor.cache
        return cache

    def add_request(
        self, input_ids: list[int], request_id: str | None = None, max_new_tokens: int | None = None, **options: Any
    ) -> str | None:
        """``ContinuousBatchingManager.add_request``; ``SpecError`` for what would end the session of all requests: ids
        that the model does not have, more tokens than memory holds, an id of a request that is here.
        """
        if max_new_tokens is None:
            max_new_tokens = self.generation_config.max_new_tokens
        try:
            ids = np.asarray(input_ids)
        except ValueError:  # lists of several lengths
            ids = np.empty(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise SpecError(f"input_ids: got {brief([input_ids])}; must be one or more token ids")
        if not 0 <= ids.min() <= ids.max() < vocabulary:
            raise SpecError(f"input_ids: got {ids.min()} to {ids.max()}; the model has ids 0 to {vocabulary - 1}")
        if max_new_tokens is None:
            raise SpecError("max_new_tokens: missing; give it, or set it in the generation config")
        check_size("max_new_tokens", max_new_tokens)
        most = self.cache.most_tokens
        if ids.size + max_new_tokens > most:
            raise SpecError(
                f"got a prompt of {ids.size} tokens and max_new_tokens={max_new_tokens}; a request has room for {most} "
                "in all: raise memory= or max_tokens="
            )
        if request_id is not None and self._is_here(request_id):
            raise SpecError(f"request_id: {request_id!r} is the id of a request that has not ended")
        found: str | None = super().add_request(ids.tolist(), request_id, max_new_tokens, **options)
        return found

    def _is_here(self, request_id: str) -> bool:
        scheduler = self._processor.scheduler
        waiting = any(state.request_id == request_id for state in list(self.input_queue.queue))
        return waiting or request_id in scheduler.active_requests or request_id in scheduler.waiting_requests

    def close(self, hard_stop: bool) -> None:
        """Stop, restore the model's attention and free the memory."""
        if hasattr(self.model, _KEPT):
            delattr(self.model, _KEPT)
        try:
            if self._generation_thread is not None:
                self.stop(block=True, hard_stop=hard_stop)
            if self.model.config._attn_implementation != self._outside:
                self.model.set_attn_implementation(self._outside)
        finally:
            self.cache.close()


def open_manager(
    model: PreTrainedModel, memory: int | float | str, generation_config: GenerationConfig | None,
    config: ContinuousBatchingConfig | None, attends: str, max_tokens: int | None, options: dict[str, Any],
) -> KVMemManager:  # fmt: skip
    """Return a manager that has not started; see ``continuous_batching``."""
    check_choice("attention", attends, ("transformers", "kvmem"))
    config = ContinuousBatchingConfig(page_size=BLOCK_TOKENS) if config is None else config
    _check_config(config)
    spec, kinds = _described(model, config.page_size)
    in_place, outside = attends == "kvmem", model.config._attn_implementation
    if outside not in ("sdpa", "eager", "paged|eager", *["kvmem"] * in_place):
        raise SpecError(f"model: got attn_implementation={outside!r}; must be sdpa or eager")
    AttentionInterface.register(IN_PLACE, attention)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 17
    max_tokens = longest if max_tokens is None else check_size("max_tokens", max_tokens)
    generation_config = model.generation_config if generation_config is None else generation_config
    allocator = None
    try:
        manager = KVMemManager(model, generation_config, config, in_place)
        resolved = manager.continuous_batching_config
        batch_tokens = resolved.max_batch_tokens or BATCH_TOKENS
        requests = min(resolved.max_requests_per_batch, batch_tokens)
        sizes = {"max_sequences": 2 * requests, "max_tokens": max_tokens, "append_only": True}
        # Layers apart: tokens of a layer are gathered a quarter faster than from rows of all layers.
        own = {"memory": memory, "backend": "paged", "interleave": "none", "prefix_cache": config.allow_block_sharing}
        own |= options
        _check_options(own, config.allow_block_sharing)
        allocator = Allocator(spec, device=model.device, **sizes, **own)
        cache = PagedCache(
            allocator, kinds, max_requests=requests, max_batch_tokens=batch_tokens, share=own["prefix_cache"],
            most_tokens=_most_tokens(allocator, batch_tokens), in_place=in_place,
        )  # fmt: skip
        manager.use(cache)
    except BaseException:
        model.set_attn_implementation(outside)
        if allocator is not None:
            allocator.close()
        raise
    setattr(model, _KEPT, manager)
    return manager


def _check_config(config: ContinuousBatchingConfig) -> None:
    check_size("config.page_size", config.page_size, 4, 4096)
    if config.max_batch_tokens is not None:
        check_size("config.max_batch_tokens", config.max_batch_tokens)
    check_choice("config.scheduler_type", config.scheduler_type, tuple(SCHEDULER_MAPPING))
    usual = ContinuousBatchingConfig()
    for name, why in _REFUSED.items():
        value = getattr(config, name)
        if value not in (getattr(usual, name), False):
            raise SpecError(f"config.{name}: got {value!r}; leave it out: {why}")


def _check_options(options: dict[str, Any], share: bool) -> None:
    if options["prefix_cache"] and not share:
        raise SpecError("prefix_cache=True, but config.allow_block_sharing=False: leave out one of them")
    if options.get("tiers") is not None and not options["prefix_cache"]:
        raise SpecError("tiers: blocks are found there by their tokens, which needs config.allow_block_sharing=True")


def _described(model: PreTrainedModel, block_size: int) -> tuple[CacheSpec, dict[str, int | None]]:
    """Return what a token stores, and the window of each kind of attention; ``SpecError`` for what is not served."""
    if not isinstance(model, PreTrainedModel):
        raise SpecError(f"model: got {type(model).__name__}; must be a model of transformers")
    if model.device.type != "cpu" or getattr(model, "_device_mesh", None) is not None:
        raise SpecError(f"model: on {model.device}; continuous_batching serves models on one CPU")
    if getattr(model, _KEPT, None) is not None:
        raise SpecError("model: keeps a manager already; model.destroy_cached_continuous_batching_manager() ends it")
    config = model.config.get_text_config()
    try:
        kinds = group_layers_by_attn_type(config)
    except ValueError as error:
        raise SpecError(f"model: {error}; continuous batching has full and sliding attention only") from error
    spec = CacheSpec.from_config(as_stored(config), dtype=model.dtype, block_size=block_size)
    windows: dict[str, int | None] = {}
    for kind, layers in kinds.items():
        windows[kind] = None if kind == "full_attention" else config.sliding_window
        for layer in layers:
            stored = {c.name: c for c in spec.layer_components(layer)}
            usual = stored.keys() == {"k", "v"} and all(c.scope == "layer" for c in stored.values())
            group = spec.groups[spec.group_of(layer, "k")] if usual else None
            if group is None or group.growth != "token" or group.window_tokens != windows[kind]:
                what = ", ".join(stored) or "nothing"
                raise SpecError(
                    f"model: layer {layer}, {kind}, stores {what} (shared, compressed or in another window); "
                    "continuous_batching serves layers with K and V of their own"
                )
    return spec, windows


def _most_tokens(allocator: Allocator, chunk: int) -> int:
    """Return how many tokens a request can have that is alone, found without memory: device="meta" decides the same."""
    pool, limit = allocator.pool, allocator.core.stats().limit_bytes
    with Allocator(
        allocator.spec, backend=allocator.backend, device="meta", memory=limit, page_bytes=pool.page_bytes,
        interleave=allocator.interleave, max_sequences=1, max_tokens=allocator.max_tokens, prefix_cache=False,
        map_ahead_tokens=0, tail_guard_tokens=allocator.tail_guard_tokens,
    ) as twin, twin.sequence() as sequence:  # fmt: skip
        while chunk and sequence.num_tokens < twin.max_tokens:
            count = min(chunk, twin.max_tokens - sequence.num_tokens)
            if sequence.try_extend(count):
                sequence.commit(count=count)
            else:
                chunk //= 2
        if sequence.num_tokens < allocator.spec.groups[0].block_size:
            raise OutOfMemory(
                f"memory: {limit:,} bytes hold no block of {allocator.spec.groups[0].block_size} tokens in pages of "
                f"{pool.page_bytes:,} bytes: raise memory=, or lower page_bytes= or config.page_size"
            )
        return sequence.num_tokens
