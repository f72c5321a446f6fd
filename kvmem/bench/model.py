"""The model whose cache is measured, and the allocators that hold it: one place that knows their arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvmem.arguments import format_bytes
from kvmem.bench.text import BenchError
from kvmem.errors import SpecError

if TYPE_CHECKING:
    from kvmem import Allocator
    from kvmem.spec import CacheSpec

LLAMA_3_8B = Path(__file__).parent / "data" / "llama-3-8b.json"
LLAMA_3_8B_WEIGHT_BYTES = 8_030_261_248 * 2  # its parameters, 16 bits each
#: As on CUDA, which "meta" simulates.
_MAP_AHEAD_TOKENS = 64

Backend = Literal["virtual", "paged"]
BACKENDS: tuple[Backend, ...] = ("virtual", "paged")


@dataclass(frozen=True)
class Model:
    """``layer_bytes[l]``: bytes of one token in each tensor (K, V, ...) of the l-th layer that caches tokens."""

    name: str
    spec: CacheSpec
    bytes_per_token: int
    layer_bytes: tuple[tuple[int, ...], ...]
    max_tokens: int | None  # longest sequence the model is made for, if its config says so

    def ranges(self, layers: int) -> tuple[int, ...]:
        """Bytes of one token in each address range of a sequence when ``layers`` layers lie side by side in a range.
        0: one range for each tensor, K and V of each layer apart.
        """
        if layers == 0:
            return tuple(size for sizes in self.layer_bytes for size in sizes)
        totals = [sum(sizes) for sizes in self.layer_bytes]
        return tuple(sum(totals[first : first + layers]) for first in range(0, len(totals), layers))


def load_model(path: Path | None, *, dtype: str, block_size: int, assume: str | None = None) -> Model:
    """The packaged Llama 3 8B, or a published ``config.json``. Raises `SpecError` where it describes no cache that
    kvmem knows. assume: as for ``CacheSpec.from_config``.
    """
    from kvmem.spec import CacheSpec

    if path is None and assume is not None:
        raise BenchError(f"--assume={assume!r} says by whose rules to read a --config; give one")
    source = path or LLAMA_3_8B
    config = _read_config(source)
    try:
        spec = CacheSpec.from_config(config, dtype=dtype, block_size=block_size, assume=assume)
    except SpecError as error:
        said = str(error).replace("assume=", "--assume=")  # in the words of the command line
        raise SpecError(f"{source}: {said}") from error
    if spec.bytes_per_token == 0:
        raise BenchError(
            f"{source}: this model stores nothing for a token ({spec.fixed_bytes} bytes a "
            "sequence); there is no growth to replay"
        )
    layers = tuple(sizes for layer in range(spec.num_layers) if (sizes := _token_bytes(spec, layer)))
    text = config.get("text_config")
    of_text = text.get("max_position_embeddings") if isinstance(text, dict) else None
    longest = config.get("max_position_embeddings") or of_text
    name = source.stem if source.stem != "config" else source.resolve().parent.name
    max_tokens = longest if isinstance(longest, int) and longest > 0 else None
    return Model(name, spec, spec.bytes_per_token, layers, max_tokens)


def _read_config(path: Path) -> dict[str, Any]:
    source = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{source}: cannot read the model config: {error.strerror}") from error
    except ValueError as error:
        raise BenchError(f"{source}: not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise BenchError(f"{source}: a model config is a JSON object, this is a {type(config).__name__}")
    return config


def _token_bytes(spec: CacheSpec, layer: int) -> tuple[int, ...]:
    """A component that all layers share counts once, in the first layer of its group."""
    return tuple(
        group.row_bytes(component.name, layer)
        for group in spec.groups
        if group.growth == "token" and layer in group.layers
        for component in group.components
        if component.scope == "layer" or layer == group.layers[0]
    )


@dataclass(frozen=True)
class Budget:
    """What a pool may take: bytes for KV, sequences at once, tokens in the longest one, bytes a physical page."""

    memory_bytes: int
    max_sequences: int
    max_tokens: int
    page_bytes: int


def open_allocator(model: Model, backend: Backend, device: str, budget: Budget) -> Allocator:
    """All layers of a token side by side: 16 tokens of an 8B model fill a stock 2 MiB page."""
    from kvmem import Allocator

    return Allocator(
        model.spec, backend=backend, device=device, memory=budget.memory_bytes, max_sequences=budget.max_sequences,
        max_tokens=budget.max_tokens, page_bytes=budget.page_bytes, interleave="all",
        map_ahead_tokens=_MAP_AHEAD_TOKENS if device == "meta" else 0, tail_guard_tokens=0,
    )  # fmt: skip


def check_fits(sequences: int, tokens: int, need: int, memory_bytes: int) -> None:
    """Raises `BenchError` where ``need`` bytes of real memory are not there."""
    if need > memory_bytes:
        raise BenchError(
            f"{sequences} sequences of {tokens} tokens need {format_bytes(need)} of real memory; there are "
            f"{format_bytes(memory_bytes)}. Give more --real-memory"
        )
