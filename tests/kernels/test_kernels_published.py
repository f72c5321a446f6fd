"""Every dict that kvmem.kernels makes, against the signatures of the libraries as they were published: the oldest and
the newest that are promised. ``make kernel-peers`` puts them where they are looked for; nothing of them is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cascade_world import kv_spec, make_world, mla_spec, step
from kernel_cases import make_case
from kernel_peers import VERSIONS, folder_of
from support_signatures import defined, signature

import kvmem
from kvmem.kernels import flash_attention, flash_attention_4, flashinfer, flashinfer_mla

PUBLISHED = Path(__file__).resolve().parents[2] / "build/published"
SHAPE = {"num_query_heads": 4, "num_kv_heads": 2, "head_dim": 16}
HALF: dict[str, Any] = {**SHAPE, "dtype": torch.bfloat16}
MIXED: dict[str, Any] = {**HALF, "kv_dtype": torch.float8_e4m3fn}


def look_up(package: str, version: str) -> Path:
    folder = folder_of(PUBLISHED, package, version)
    if not folder.is_dir():
        pytest.skip(f"{package} {version} is not in {PUBLISHED}: `make kernel-peers`")
    return folder


def every_version(package: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("version", VERSIONS[package])


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


def callable_as(shape: Signature) -> Callable[..., None]:
    """A function with that signature, which ``inspect`` cannot tell from the published one."""

    def function(*given: object, **named: object) -> None:
        shape.bind(*given, **named)

    function.__signature__ = shape  # type: ignore[attr-defined]
    return function


def windowed(step_name: str, window_tokens: int | None, seed: int) -> kvmem.Batch:
    return make_case("virtual", step_name, block_size=256, window_tokens=window_tokens, seed=seed).batch


# ---- FlashInfer ------------------------------------------------------------------------------------------------------


@every_version("flashinfer-python")
@pytest.mark.parametrize("how", [HALF, MIXED], ids=["one dtype", "8 bits"])
def test_flashinfer_plans(version: str, how: dict[str, Any], seed: int) -> None:
    folder, batch = look_up("flashinfer-python", version), windowed("decode", None, seed)
    plans = {
        "BatchDecodeWithPagedKVCacheWrapper": flashinfer.decode_plan(batch, **how),
        "BatchPrefillWithPagedKVCacheWrapper": flashinfer.prefill_plan(batch, **how),
        "BatchPrefillWithRaggedKVCacheWrapper": flashinfer.ragged_plan(batch, **how).plan,
        "BatchAttention": flashinfer.batch_attention_plan(batch, **how),
    }
    assert defined(folder, "BatchAttention") == (numbers(version) >= (0, 2, 7))
    for name, plan in plans.items():
        if not defined(folder, name):
            continue
        found = signature(folder, f"{name}.plan")
        if any(p.kind is p.VAR_KEYWORD for p in found.parameters.values()):
            found = signature(folder, f"{name}._plan_impl")  # plan(**kwargs) takes anything; this is where it goes
        found.bind(None, **plan)


@every_version("flashinfer-python")
def test_flashinfer_runs(version: str, seed: int) -> None:
    """As the modules' examples call them."""
    folder = look_up("flashinfer-python", version)
    scales = {"k_scale": 0.5, "v_scale": 2.0}
    for name, given, named in [
        ("BatchDecodeWithPagedKVCacheWrapper", "q cache", {"return_lse": True, "out": None, **scales}),
        ("BatchPrefillWithPagedKVCacheWrapper", "q cache", {"return_lse": True, **scales}),
        ("BatchPrefillWithRaggedKVCacheWrapper", "q k v", {"return_lse": True}),
        ("MultiLevelCascadeAttentionWrapper", "q cache", {}),
    ]:
        signature(folder, f"{name}.run").bind(None, *given.split(), **named)
    if defined(folder, "BatchAttention"):
        found = signature(folder, "BatchAttention.run")
        found.bind(None, "q", "cache")
        assert (set(scales) <= set(found.parameters)) == (numbers(version) >= (0, 4, 0))
    made = flashinfer.append_args(windowed("mixed", None, seed))
    signature(folder, "append_paged_kv_cache").bind("k", "v", paged_kv_cache="cache", **made)


@every_version("flashinfer-python")
def test_flashinfer_cascade(version: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    folder = look_up("flashinfer-python", version)
    monkeypatch.setattr(flashinfer, "installed", lambda package: numbers(version))
    world = make_world(kv_spec(), "paged", seed)
    cascade = step(world, [world.open(3)], [1]).cascade()
    found = signature(folder, "MultiLevelCascadeAttentionWrapper.plan")
    found.bind(None, **flashinfer.cascade_plan(cascade, **HALF))
    if "kv_data_type" in found.parameters:
        found.bind(None, **flashinfer.cascade_plan(cascade, **MIXED))
    else:
        with pytest.raises(kvmem.SpecError, match="kv_dtype"):
            flashinfer.cascade_plan(cascade, **MIXED)


def mla_wrapper(folder: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """A class with the published signatures, in a module with a published ``MLAPlanMetadata`` where there is one."""
    made = ModuleType("published_mla")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    if defined(folder, "MLAPlanMetadata"):
        csr = signature(folder, "MLAPlanMetadata.csr")
        made.MLAPlanMetadata = type("MLAPlanMetadata", (), {"csr": classmethod(callable_as(csr))})  # type: ignore[attr-defined]
    methods = {n: callable_as(signature(folder, f"BatchMLAPagedAttentionWrapper.{n}")) for n in ("plan", "run")}
    return type("BatchMLAPagedAttentionWrapper", (), {**methods, "__module__": made.__name__})


FLAT = {"qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr", "q_nope", "q_pe", "ckv_cache", "kpe_cache"}


@every_version("flashinfer-python")
@pytest.mark.parametrize("return_lse", [False, True])
def test_flashinfer_mla(version: str, return_lse: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    folder = look_up("flashinfer-python", version)
    wrapper = mla_wrapper(folder, monkeypatch)
    world = make_world(mla_spec(), "paged", seed)
    batch = step(world, [world.open(3)], [1])
    how: dict[str, Any] = {"num_heads": 3, "head_dim_ckv": 48, "head_dim_kpe": 16, "scale": 0.1, "dtype": torch.float16}
    cache = flashinfer_mla.mla_cache_of(world.alloc.tensor(0, "ckv"), world.alloc.tensor(0, "kpe"))
    q = torch.zeros(1, 3, 48), torch.zeros(1, 3, 16)
    for form in ({}, {"wrapper": wrapper}):
        plans = flashinfer_mla.mla_cascade_plans(batch.cascade(), **how, **form)
        run = flashinfer_mla.mla_run(*q, cache, **form, return_lse=return_lse)
        for plan in [flashinfer_mla.mla_plan(batch, **how, **form, return_lse=return_lse), *plans]:
            wrapper().plan(**plan)
            wrapper().run(**run)
            if form and numbers(version) >= (0, 7, 0):
                assert FLAT.isdisjoint({*plan, *run}), "deprecated there"


# ---- FlashAttention --------------------------------------------------------------------------------------------------


@every_version("flash-attn")
@pytest.mark.parametrize("window_tokens", [None, 20])
def test_flash_attention_2(version: str, window_tokens: int | None, seed: int) -> None:
    folder, batch = look_up("flash-attn", version) / "flash_attn", windowed("decode", window_tokens, seed)
    how: dict[str, Any] = {"window_tokens": window_tokens, "return_lse": True}
    for form in ("rows", "blocks"):
        made = flash_attention.fa2_args(batch, form=form, **how)
        signature(folder, "flash_attn_with_kvcache").bind("q", "k", "v", **made)
    signature(folder, "flash_attn_varlen_func").bind("q", "k", "v", **flash_attention.fa2_varlen_args(batch, **how))


THREE = [("flash-attn", VERSIONS["flash-attn"][-1], "hopper"), *(("fa3-fwd", v, "") for v in VERSIONS["fa3-fwd"])]


@pytest.mark.parametrize(("package", "version", "inside"), THREE)
@pytest.mark.parametrize("window_tokens", [None, 20])
def test_flash_attention_3(package: str, version: str, inside: str, window_tokens: int | None, seed: int) -> None:
    folder, batch = look_up(package, version) / inside, windowed("mixed", window_tokens, seed)
    how: dict[str, Any] = {"window_tokens": window_tokens, "return_lse": True}
    for form in ("rows", "blocks"):
        made = flash_attention.fa3_args(batch, form=form, **how)
        signature(folder, "flash_attn_with_kvcache").bind("q", "k", "v", **made)
    function = callable_as(signature(folder, "flash_attn_varlen_func"))
    function("q", "k", "v", **flash_attention.fa3_varlen_args(batch, window_tokens=window_tokens, function=function))
    if inside:
        with pytest.raises(kvmem.SpecError, match="return_lse: got True, .*fa3_args"):
            flash_attention.fa3_varlen_args(batch, function=function, **how)
    else:
        function("q", "k", "v", **flash_attention.fa3_varlen_args(batch, function=function, **how))


@every_version("flash-attn-4")
@pytest.mark.parametrize("form", ["rows", "blocks"])
@pytest.mark.parametrize("window_tokens", [None, 20])
def test_flash_attention_4(version: str, form: flash_attention.Form, window_tokens: int | None, seed: int) -> None:
    folder, batch = look_up("flash-attn-4", version), windowed("mixed", window_tokens, seed)
    assert not defined(folder, "flash_attn_with_kvcache"), "there is one now: kvmem should use it"
    made = flash_attention_4.fa4_varlen_args(
        batch, head_dim=64, dtype=torch.bfloat16, form=form, window_tokens=window_tokens, return_lse=True
    )
    signature(folder, "flash_attn_varlen_func").bind("q", "k", "v", **made)
