"""Rotary position embedding as layouts need it: apply, undo and shift, for keys that are stored before rotation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from kvmem.arguments import brief, check_choice, check_count, check_number, check_size
from kvmem.errors import SpecError
from kvmem.layouts.attention import compute_dtype, described
from kvmem.spec.model_families import NO_ROPE, UNROTATED

__all__ = ["Rope", "check_rope"]

# These families pair element 2 i with element 2 i + 1.
_NEIGHBOURS = frozenset(
    {
        "blt", "chatglm", "codegen", "cohere", "cohere2", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
        "deepseek_v4", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe", "glm", "glm4", "glm4_moe_lite", "glm4v",
        "glm_moe_dsa", "gptj", "helium", "llama4", "llama4_text", "longcat_flash", "mistral4", "moonshine", "roformer",
        "youtu",
    }
)  # fmt: skip


class Rope:
    """Rotates queries and keys by their position (RoFormer, arXiv:2104.09864), as Hugging Face models do: element i of
    the first half of the rotated part is paired with element i of the second half.

    inv_freq: float64 ``[rotary_dim / 2]``, the angle of a pair at position 1. factor: what a rotated vector is
    multiplied by (YaRN's attention factor); 1 for most. The elements from ``rotary_dim`` on are not rotated.
    Vectors keep their dtype; only float64 is computed in float64. Each call copies an ``inv_freq`` on another device.
    """

    def __init__(self, inv_freq: torch.Tensor, factor: float = 1.0) -> None:
        if not isinstance(inv_freq, torch.Tensor) or inv_freq.ndim != 1 or not len(inv_freq):
            raise SpecError(f"inv_freq: got {described(inv_freq)}; must be a tensor [rotary_dim / 2]")
        if not inv_freq.isfinite().all():
            raise SpecError(f"inv_freq: got {inv_freq!r:.99}; must be finite")
        self.inv_freq, self.factor = inv_freq.double(), check_number("factor", factor, above=0)

    @classmethod
    def default(cls, head_dim: int, *, theta: float = 10_000.0) -> Rope:
        """Return the plain form: pair i turns by ``theta ** (-2 i / head_dim)`` each position. head_dim: even."""
        if check_size("head_dim", head_dim, 2, 1 << 20) % 2:
            raise SpecError(f"head_dim: got {head_dim}; must be even")
        theta = check_number("theta", theta, above=0)
        return cls(theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim))

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | object) -> Rope | None:
        """Return the rotation of a transformers config, or of its ``to_dict()``; None for a model that rotates nothing.

        Understood: ``default``, ``linear``, ``llama3`` and ``yarn`` (arXiv:2309.00071), each with
        ``partial_rotary_factor``. Layers that do not rotate although others do (NoPE) are the caller's to know.
        ``SpecError`` for others: ``dynamic`` and ``longrope`` change the angles with the length, so a key that was
        rotated once cannot be rotated anew; for a config with one rotation for each kind of layer: give that kind's
        part; for families that pair neighbouring elements; and for a dict without ``rope_theta``, whose default only
        the config's class knows.
        """
        data: Any = config.to_dict() if hasattr(config, "to_dict") else config
        data = data.get("text_config") or data if isinstance(data, Mapping) else {}
        given = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if not data or not isinstance(given, Mapping):
            raise SpecError(f"config: got {brief(config)}; must be a transformers config, or its to_dict()")
        if any(isinstance(value, Mapping) for value in given.values()):
            raise SpecError(f"rope_parameters: got one for each of {sorted(given)}; give those of one kind of layer")
        family = data.get("model_type")
        if family in _NEIGHBOURS or data.get("rope_interleave"):
            why = "pairs neighbouring elements; reorder those of Q and K, even ones first, and use Rope(inv_freq)"
            raise SpecError(f"model_type: got {family!r}, which {why}")
        theta = given.get("rope_theta") or data.get("rope_theta")
        if data.get("alibi") or data.get("position_embedding_type") in UNROTATED or (not theta and family in NO_ROPE):
            return None
        if not theta:
            raise SpecError(f"rope_theta: missing from the config of {family!r}; give it, or the config as an object")
        head_dim = data.get("qk_rope_head_dim") or data.get("head_dim")
        head_dim = head_dim or (data.get("hidden_size") or 0) // (data.get("num_attention_heads") or 1)
        partial = given.get("partial_rotary_factor") or data.get("partial_rotary_factor") or 1.0
        kind = given.get("rope_type") or given.get("type") or "default"
        check_choice("rope_type", kind, ("default", *_SCALED))
        try:
            plain = cls.default(int(head_dim * partial), theta=float(theta))
            scaled = _SCALED.get(kind)
            return scaled(plain.inv_freq, float(theta), _with_lengths(given, data)) if scaled else plain
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise SpecError(f"rope_parameters: got {given}; {kind} needs another number: {error}") from error

    def apply(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return ``x [T, heads, width]`` rotated to ``positions [T]``."""
        return self._turn(x, positions, self.inv_freq, self.factor)

    def undo(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what ``apply`` was given: exact up to rounding."""
        return self._turn(x, positions, -self.inv_freq, 1 / self.factor)

    def shift(self, x: torch.Tensor, by: torch.Tensor | int) -> torch.Tensor:
        """Return rotated keys as if ``by`` positions later, an int or ints ``[T]``. Short dtypes are rounded again."""
        if not isinstance(x, torch.Tensor):
            raise SpecError(f"x: got {described(x)}; must be floats [T, heads, width]")
        positions = by if isinstance(by, torch.Tensor) else torch.full((len(x),), check_count("by", by))
        return self._turn(x, positions, self.inv_freq, 1.0)

    def _turn(self, x: torch.Tensor, positions: Any, angle: torch.Tensor, factor: float) -> torch.Tensor:
        """angle: of each pair, for one position."""
        half, fits = len(angle), isinstance(x, torch.Tensor) and isinstance(positions, torch.Tensor)
        fits = fits and x.is_floating_point() and x.ndim == 3 and positions.shape == x.shape[:1]
        if not fits or x.shape[2] < 2 * half:
            fit = f"floats [T, heads, width], a width of at least {2 * half}, and a tensor [T]"
            raise SpecError(f"x, positions: got {described((x, positions))}; must be {fit}")
        dtype = compute_dtype(x)
        angles = positions.to(x.device).double().unsqueeze(1) * angle.to(x.device)  # float32 loses 1e-3 at 1e5
        cos, sin = ((f(angles) * factor).to(dtype).unsqueeze(1) for f in (torch.cos, torch.sin))
        first, second, rest = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype), x[..., 2 * half :]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def check_rope(rope: object, head_dim: float = math.inf) -> None:
    """``SpecError`` unless rope is None, or a ``Rope`` that turns no more elements than a head has."""
    turned = 2 * len(rope.inv_freq) if isinstance(rope, Rope) else type(rope).__name__
    if rope is not None and (isinstance(turned, str) or turned > head_dim):
        raise SpecError(f"rope: got {turned}; must be None, or a Rope of at most head_dim={head_dim} elements")


def _with_lengths(given: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, with what transformers takes from the config itself."""
    longest = data.get("max_position_embeddings")
    original = data.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or longest
    factor = given["factor"] if given.get("factor") is not None else longest / original  # type: ignore[operator]
    return {**given, "original_max_position_embeddings": original, "factor": factor}


def _linear(inv_freq: torch.Tensor, theta: float, given: Mapping[str, Any]) -> Rope:
    return Rope(inv_freq / given["factor"])


def _llama3(inv_freq: torch.Tensor, theta: float, given: Mapping[str, Any]) -> Rope:
    """Long wavelengths are stretched by ``factor``, short ones kept, those in between blended."""
    low, high, length = (
        given["low_freq_factor"], given["high_freq_factor"], given["original_max_position_embeddings"]
    )  # fmt: skip
    turns = length * inv_freq / (2 * math.pi)  # how often a pair turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return Rope(inv_freq * keep + inv_freq / given["factor"] * (1 - keep))


def _yarn(inv_freq: torch.Tensor, theta: float, given: Mapping[str, Any]) -> Rope:
    """As ``_llama3``, with a blend that is linear in the index of a pair, and a factor for the attention."""
    dim, factor, length = 2 * len(inv_freq), given["factor"], given["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(given.get("beta_fast") or 32), pair(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low if high != low else 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return Rope(inv_freq * keep + inv_freq / factor * (1 - keep), _yarn_attention(factor, given))


def _yarn_attention(factor: float, given: Mapping[str, Any]) -> float:
    def mscale(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1.0)


_SCALED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
