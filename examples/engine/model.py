"""A model of transformers over the flat tokens of a step: prompts, chunks of them and single tokens, without padding.
Its attention, ``_attend``, writes K and V where the batch says, and reads the cache where it lies."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

import kvmem
from kvmem.bench.language_models import byte_tokenizer, load_language_model
from kvmem.kernels import cpu
from kvmem.kernels.write import write_kv

_ATTENTION = "kvmem_flat"


def load(name: str) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer. name: ``"smollm2"``, ``"tiny"`` (random), or a folder of a model's files."""
    if name in ("smollm2", "tiny"):
        found = load_language_model(name)
        return found.model, found.tokenizer or byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(name, local_files_only=True)


class Runner:
    """Forward passes of a causal language model of transformers on the CPU, whose attention is replaced. ``SpecError``
    for one with sliding windows or states."""

    def __init__(self, model: Any, allocator: kvmem.Allocator, *, max_rows: int, max_tokens: int) -> None:
        if len(allocator.spec.groups) > 1 or allocator.spec.groups[0].window_tokens is not None:
            raise kvmem.SpecError(f"{model.config.model_type}: this engine needs full attention in all layers")
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
        model.set_attn_implementation(_ATTENTION)
        self._model, self._allocator = model, allocator
        self._batch = allocator.make_batch(max_sequences=max_rows, max_new_tokens=max_tokens)

    @torch.inference_mode()
    def __call__(self, handles: npt.NDArray[np.int32], tokens: list[int], rows: list[int]) -> Any:
        """Logits ``[len(rows), vocab]`` behind the last token of each of ``rows``. All K and V are in the cache then.

        handles: of sequences with room for the tokens. tokens: of one sequence after the other.
        """
        self._allocator.fill(handles, self._batch)
        self._plans: dict[Any, Any] = {}
        last, positions = self._batch.cu_seqlens_q[1:].long()[rows] - 1, self._batch.positions.long()[None]
        options = {"position_ids": positions, "logits_to_keep": last, "use_cache": False, "runner": self}
        return self._model(torch.tensor([tokens]), **options).logits[0]

    def attend(self, layer: int, how: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        """q, and the result: ``[T, heads, width]``. Layers that are alike share a plan. how: its options."""
        cache = self._allocator.kv(layer)
        write_kv(cache, self._batch, k, v)
        key = (*q.shape[1:], *k.shape[1:], *v.shape[1:], *how.values())
        if key not in self._plans:
            self._plans[key] = cpu.plan(
                self._batch, num_query_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2],
                value_dim=v.shape[2], dtype=q.dtype, return_lse=False, **how,
            )  # fmt: skip
        return self._plans[key](q, cache)[0]


def _attend(module: Any, q: Any, k: Any, v: Any, mask: None, *, runner: Runner, **options: Any) -> tuple[Any, None]:
    """As transformers calls it: ``[1, heads, T, width]`` in, ``[1, T, heads, width]`` out."""
    how = {"scale": options.get("scaling"), "soft_cap": options.get("softcap"), "sinks": options.get("s_aux")}
    flat = (x[0].transpose(0, 1) for x in (q, k, v))
    return runner.attend(module.layer_idx, how, *flat)[None], None
