"""The kernels' packages, real ones and those by hand, under one set of names: what calls them cannot tell which it has."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import kernel_oracle_flash_attention as flash_by_hand
import kernel_oracle_flashinfer as flashinfer_by_hand
import kernel_oracle_flashinfer_mla as mla_by_hand
import torch

from kvmem.kernels import torch_ops
from kvmem.kernels.checks import flat_tokens

Result = tuple[torch.Tensor, torch.Tensor | None]


class Unavailable(Exception):
    """A package, or a part of it, that is not there; the text is the reason for the skip."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest number; infinite where NaN, or infinities, do not agree."""
    actual, expected = actual.detach().double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    infinite = expected.isinf()
    if actual.isnan().any() or not torch.equal(actual[infinite], expected[infinite]):
        return float("inf")
    finite = expected[~infinite]
    if not finite.numel():
        return 0.0
    return float((actual[~infinite] - finite).abs().max() / finite.abs().max().clamp(min=1e-6))


class ByHand:
    """The stand-ins of kernel_oracle_*.py: float64, on a CPU."""

    device = "cpu"
    decode = staticmethod(
        lambda tensor_cores=False, graph=None: flashinfer_by_hand.BatchDecodeWithPagedKVCacheWrapper()
    )
    prefill = staticmethod(lambda backend: flashinfer_by_hand.BatchPrefillWithPagedKVCacheWrapper())
    ragged = staticmethod(lambda backend: flashinfer_by_hand.BatchPrefillWithRaggedKVCacheWrapper())
    batch_attention = staticmethod(flashinfer_by_hand.BatchAttention)
    cascade = staticmethod(flashinfer_by_hand.MultiLevelCascadeAttentionWrapper)
    mla = staticmethod(mla_by_hand.NewBatchMLAPagedAttentionWrapper)
    append = staticmethod(flashinfer_by_hand.append_paged_kv_cache)
    fa2 = staticmethod(flash_by_hand.fa2_with_kvcache)
    fa2_varlen = staticmethod(flash_by_hand.fa2_varlen)
    fa4_varlen = staticmethod(flash_by_hand.fa4_varlen)

    def __init__(self, package: str) -> None:
        pass

    def torch_flash(self, q: torch.Tensor, cache: Any, batch: Any, **how: Any) -> Result:
        """As ``torch_ops.attention`` picks: the operator over rows, ``varlen_attn`` over blocks."""
        if batch.rows is not None:
            args = torch_ops.flash_op_args(batch, **how)
            out, lse, *_ = flash_by_hand.flash_op(q, *map(flat_tokens, cache), **args)
        else:
            from torch.nn.attention.varlen import AuxRequest

            args = torch_ops.varlen_args(batch, **how)
            aux = AuxRequest(lse=True)
            out, lse = flash_by_hand.varlen_attn(q, *map(torch_ops.plain, cache), return_aux=aux, **args)
        return out, torch_ops.natural_lse(lse)

    def fa3(self, *given: Any, **args: Any) -> Any:
        return _descaled(flash_by_hand.fa3_with_kvcache, *given, **args)

    def fa3_varlen(self, *given: Any, **args: Any) -> Any:
        return _descaled(flash_by_hand.fa3_varlen, *given, **args)


def _descaled(kernel: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **args: Any) -> Any:
    """FlashAttention 3's 8-bit form: one factor each for Q, K and V, float32 ``[B, H]``, here all the same number."""
    k_scale, v_scale = (float(args.pop(name, torch.ones(1, 1))[0, 0]) for name in ("k_descale", "v_descale"))
    args.pop("q_descale", None)
    scale = (args.pop("softmax_scale") or q.shape[-1] ** -0.5) * k_scale
    result = kernel(q, k, v, softmax_scale=scale, **args)
    if isinstance(result, torch.Tensor):  # no lse was asked for
        return result * v_scale
    return result[0] * v_scale, *result[1:]


class Real:
    """What is installed, on a GPU. ``Unavailable`` where it is not."""

    device = "cuda"

    def __init__(self, package: str) -> None:
        self.package = package
        if package == "torch":
            return
        try:
            self.module = importlib.import_module(package)
        except (ImportError, OSError) as error:  # OSError: a library that it loads is not there
            raise Unavailable(f"{package} is not installed: {error}") from error
        if package == "flashinfer":
            self.workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
            self.append = self.module.append_paged_kv_cache

    def decode(self, tensor_cores: bool = False, graph: tuple[int, int] | None = None) -> Any:
        """graph: the rows and the blocks in all of a batch that is to be captured; the wrapper then has buffers."""
        options: dict[str, Any] = {"backend": "fa2"} if tensor_cores else {}
        if graph:
            rows, blocks = graph
            names = ("indptr", rows + 1), ("indices", blocks), ("last_page_len", rows)
            options |= {
                f"paged_kv_{n}_buffer": torch.zeros(size, dtype=torch.int32, device="cuda") for n, size in names
            }
            options["use_cuda_graph"] = True
        make = self.module.BatchDecodeWithPagedKVCacheWrapper
        return make(self.workspace, "NHD", use_tensor_cores=tensor_cores, **options)

    # Said always, because "auto" takes fa3 on Hopper, which compiles for minutes.
    def prefill(self, backend: str) -> Any:
        return self.module.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend=backend)

    def ragged(self, backend: str) -> Any:
        return self.module.BatchPrefillWithRaggedKVCacheWrapper(self.workspace, "NHD", backend=backend)

    def batch_attention(self) -> Any:
        return self.module.BatchAttention("NHD", "cuda")

    def cascade(self, num_levels: int) -> Any:
        wrapper = self.module.MultiLevelCascadeAttentionWrapper(num_levels, self.workspace, "NHD")
        if not os.environ.get("KVMEM_GPU_FA3"):  # it has no argument for the same choice
            for level in wrapper._batch_prefill_wrappers:
                level._backend = "fa2"
        return wrapper

    def mla(self) -> Any:
        module = importlib.import_module("flashinfer.mla")
        return module.BatchMLAPagedAttentionWrapper(self.workspace, backend="fa2")

    def torch_flash(self, q: torch.Tensor, cache: Any, batch: Any, **how: Any) -> Result:
        if batch.rows is None and not torch_ops.supports("block_table"):
            raise Unavailable(f"torch {torch.__version__} cannot follow block tables")
        return torch_ops.attention(q, cache, batch, **how)

    def fa2(self, *given: Any, **args: Any) -> Any:
        return self.module.flash_attn_with_kvcache(*given, **args)

    def fa2_varlen(self, *given: Any, **args: Any) -> Any:
        return self.module.flash_attn_varlen_func(*given, **args)

    fa3, fa3_varlen, fa4_varlen = fa2, fa2_varlen, fa2_varlen  # the names are the same; the module is not
