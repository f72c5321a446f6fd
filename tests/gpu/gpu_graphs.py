"""A decode step captured once and replayed while rows grow: new K/V written, attention over all, both layers; only the
batch is refilled in place between replays, and pages are mapped ahead by the mapper's thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gpu_libraries import relative_error
from kernel_cases import TOLERANCE
from kernel_oracle import attend, pack

import kvmem
from kvmem.kernels import flash_attention, flashinfer, torch_ops
from kvmem.kernels.write import write_kv

Library = Any
LAYERS, KV_HEADS, GROUP = 2, 2, 4
#: One of them crosses the end of a page of 2 MiB (1,024 tokens here) after 24 steps.
FIRST_TOKENS = (3, 120, 1000, 37)
MAX_TOKENS = 2048


@dataclass
class Found:
    error: float
    allowed: float
    why: str = ""


@dataclass
class World:
    """Sequences that grow by a token a step, their batch, and the fixed buffers that a captured step reads and writes."""

    alloc: kvmem.Allocator
    batch: kvmem.Batch
    ids: np.ndarray
    q: torch.Tensor  # [layers, B, Hq, D]
    new: torch.Tensor  # [layers, 2, B, H, D]
    out: torch.Tensor  # as q
    kept: list[list[torch.Tensor]] = field(default_factory=list)  # per sequence: [layers, 2, tokens, H, D] in pieces

    def fill_buffers(self, draw: torch.Generator) -> None:
        for buffer in (self.q, self.new):
            buffer.copy_(torch.randn(buffer.shape, generator=draw).to(buffer.dtype))
        fresh = self.new.cpu()
        for i, pieces in enumerate(self.kept):
            pieces.append(fresh[:, :, i : i + 1].clone())

    def error(self) -> float:
        """Of the last step, over all layers, against float64."""
        q, worst = self.q.cpu(), 0.0
        for layer in range(LAYERS):
            rows = [torch.cat([piece[layer] for piece in pieces], 1) for pieces in self.kept]
            want = pack([attend(q[layer, i : i + 1], kv[0], kv[1]) for i, kv in enumerate(rows)])[0]
            worst = max(worst, relative_error(self.out[layer], want))
        return worst


def make_world(backend: str, device: str, seed: int, first_tokens: tuple[int, ...]) -> tuple[World, torch.Generator]:
    dtype, head = (torch.float64, 8) if device == "cpu" else (torch.bfloat16, 128)
    draw = torch.Generator().manual_seed(seed)
    spec = kvmem.CacheSpec.kv(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=head, dtype=dtype, block_size=16)
    small = {"page_bytes": 4096, "map_ahead_tokens": 16} if device == "cpu" else {}
    alloc = kvmem.Allocator(
        spec, backend=backend, device=device, memory="16MiB" if device == "cpu" else "256MiB", max_sequences=8,
        max_tokens=MAX_TOKENS, **small,
    )  # fmt: skip
    n = len(first_tokens)
    shape = {"dtype": dtype, "device": device}
    q = torch.zeros(LAYERS, n, KV_HEADS * GROUP, head, **shape)
    new = torch.zeros(LAYERS, 2, n, KV_HEADS, head, **shape)
    batch = alloc.make_batch(max_sequences=n, max_new_tokens=n)
    world = World(alloc, batch, alloc.open_batch(n), q, new, torch.zeros_like(q))
    for handle, tokens in zip(world.ids, first_tokens, strict=True):
        one, counts = np.array([handle], np.int32), np.array([tokens], np.int32)
        alloc.extend_batch(one, counts)
        kv = torch.randn(LAYERS, 2, tokens, KV_HEADS, head, generator=draw).to(dtype)
        fresh = alloc.batch(one)
        for layer in range(LAYERS):
            write_kv(alloc.kv(layer), fresh, *kv[layer].to(device))
        alloc.commit_batch(one, counts)
        world.kept.append([kv])
    return world, draw


# ---- What is captured ------------------------------------------------------------------------------------------------


class FlashInferDecode:
    """``plan`` reads lengths on the host, so it runs before each replay and leaves what it planned in the wrapper's
    buffers.
    """

    def __init__(self, world: World, library: Library, tensor_cores: bool) -> None:
        n = len(world.ids)
        sizes = {"indptr": n + 1, "indices": n * MAX_TOKENS // 16, "last_page_len": n}
        device = world.q.device
        options: dict[str, Any] = {
            f"paged_kv_{name}_buffer": torch.zeros(size, dtype=torch.int32, device=device)
            for name, size in sizes.items()
        }
        options |= {"backend": "fa2"} if tensor_cores else {}
        workspace = torch.zeros(128 << 20 if device.type == "cuda" else 16, dtype=torch.uint8, device=device)
        self.wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=tensor_cores, use_cuda_graph=True, **options
        )
        shape = {"num_query_heads": KV_HEADS * GROUP, "num_kv_heads": KV_HEADS, "head_dim": world.q.shape[-1]}
        self.shape: dict[str, Any] = {**shape, "dtype": world.q.dtype, "kv_dtype": world.q.dtype}

    def plan(self, world: World) -> None:
        self.wrapper.plan(**flashinfer.decode_plan(world.batch, **self.shape))

    def attend(self, world: World, layer: int) -> torch.Tensor:
        out: torch.Tensor = self.wrapper.run(world.q[layer], flashinfer.cache_of(*world.alloc.kv(layer)))
        return out


class TorchFlash:
    def __init__(self, world: World, library: Library) -> None:
        self.library = library

    def plan(self, world: World) -> None:
        """Nothing is planned on the host."""

    def attend(self, world: World, layer: int) -> torch.Tensor:
        run = torch_ops.planned(self.library, world.batch, {"max_tokens": MAX_TOKENS}, return_lse=False)
        return run(world.q[layer], world.alloc.kv(layer))[0]


class Fa3Fwd(TorchFlash):
    def attend(self, world: World, layer: int) -> torch.Tensor:
        rows = (flash_attention.plain(world.alloc.rows(layer, name)) for name in ("k", "v"))
        args = flash_attention.fa3_args(world.batch, form="rows")
        out: torch.Tensor = self.library.flash_attn_with_kvcache(world.q[layer], *rows, **args)
        return out


REPLAYED: dict[str, Callable[[World, Library], Any]] = {
    "flashinfer decode": lambda world, library: FlashInferDecode(world, library, False),
    "flashinfer decode, tensor cores": lambda world, library: FlashInferDecode(world, library, True),
    "torch flash, rows": TorchFlash,
    "fa3-fwd, rows": Fa3Fwd,
}


def replay(kernel: Any, backend: str, library: Library, device: str, seed: int, steps: int = 200) -> Found:
    """The worst error of a few of the steps; on a CPU there is nothing to capture, and the step runs as it is."""
    on_cpu = device == "cpu"
    steps, first = (20, (3, 50, 120)) if on_cpu else (steps, FIRST_TOKENS)
    world, draw = make_world(backend, device, seed, first)
    kernel_step = REPLAYED[kernel.name](world, library)
    ones = np.ones(len(first), np.int32)
    checked = {0, steps // 2, steps - 1} | (set() if on_cpu else {1, 2, 23, 24, 25})
    addresses = _addresses(world)
    graph: torch.cuda.CUDAGraph | None = None
    worst = 0.0

    def step() -> None:
        for layer in range(LAYERS):
            write_kv(world.alloc.kv(layer), world.batch, *world.new[layer])
            world.out[layer].copy_(kernel_step.attend(world, layer))

    for number in range(steps):
        world.alloc.extend_batch(world.ids, ones)
        world.alloc.fill(world.ids, world.batch)
        world.fill_buffers(draw)
        kernel_step.plan(world)
        if on_cpu:
            step()
        elif graph is None:
            graph = capture(step)
            graph.replay()
        else:
            graph.replay()
        world.alloc.commit_batch(world.ids, ones)
        if number in checked:
            worst = max(worst, world.error())
    allowed = TOLERANCE[world.q.dtype]
    grown = [a + steps for a in first] == [int(world.alloc.core.tokens(int(i))) for i in world.ids]
    moved = "" if _addresses(world) == addresses and grown else "addresses or lengths are not what they should be"
    return Found(worst, allowed, moved or ("" if worst <= allowed else f"off by {worst:.3g}; {allowed:.3g} is allowed"))


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Once on another stream first, as torch asks for: what is made at first use must not be made in the graph. The
    step writes the same numbers to the same places however often it runs.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _addresses(world: World) -> list[int]:
    names = ("slot_mapping", "seq_lens", "kv_indices", "cu_seqlens_q")
    caches = [t.data_ptr() for layer in range(LAYERS) for t in world.alloc.kv(layer)]
    return caches + [world.batch.full(name).data_ptr() for name in names]
