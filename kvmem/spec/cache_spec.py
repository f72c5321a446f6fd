"""What one token stores, as pure data with exact integer arithmetic. No device, no tensor, no strides.

A :class:`CacheSpec` has :class:`Group`s; a group has :class:`Component`s (K, V, latents, state) and the layers whose
tokens live and die together. All are frozen and hashable. Each refusal is a ``SpecError`` that names the field, the
value and the reason. Byte counts are payload: the bytes of the elements, without rounding to blocks or pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, fields, replace
from functools import cached_property
from numbers import Integral
from os import PathLike
from typing import Any, Final, Literal, TypeVar, get_args

import torch

from kvmem import arguments as check
from kvmem.errors import SpecError
from kvmem.spec.component import Component, Growth, Rope, assign, canonical
from kvmem.spec.dtypes import dtype_name, parse_dtype
from kvmem.spec.group_rules import GROUP_RULES

__all__ = ["CacheSpec", "Group"]

_FORMAT: Final = 1  # version of to_dict(), and part of the fingerprint: raise it when the meaning of a field changes
_T = TypeVar("_T")
BlockOrder = Literal["tokens", "heads", "joined"]
#: Fields of a group that to_dict() leaves out at their defaults, so that older dicts and fingerprints stay valid.
_OPTIONAL: Final = {"block_order": "tokens", "packing": ""}


@dataclass(frozen=True)
class Group:
    """Components and layers whose tokens live and die together: they share one block table and one set of lengths.

    name: unique in the spec.
    components: what each layer of the group stores for a token; all of the same ``growth``.
    layers: the model's layer numbers, ascending. Tuples "per layer" in a component have one entry for each, in order.
    window_tokens: the sliding window, as the number of tokens that a query attends to, itself included (as
        ``sliding_window`` in transformers); None for full attention.
    max_tokens: with ``growth="prefill"``, the largest number of encoder tokens (Whisper: 1,500); None for no limit.
    block_size: tokens of a block; None takes the spec's value. In a ``CacheSpec`` it is always an int, and 1 with
        ``growth="fixed"``.
    block_order: of a layer's bytes in a block. ``"tokens"``: ``[block_size, heads, width]`` for each component;
        ``"heads"`` (head-major): ``[heads, block_size, width]``; ``"joined"``: ``[heads, components, block_size,
        width]``, of each head all of K, then all of V.
    packing: the name of a format that a kernel packs blocks in, such as ``"vllm_cpu.vec16"``; empty for plain elements.
        Packed blocks are opaque: only that kernel reads and writes them, and no caller sees elements. Caches of
        different packings never mix, because the name is part of the fingerprint.

    With any order but ``"tokens"``, blocks are copied whole and prefixes match whole blocks only.

    Raises ``SpecError`` for fields that are invalid or contradict each other.
    """

    name: str
    components: tuple[Component, ...]
    layers: tuple[int, ...]
    _: KW_ONLY
    window_tokens: int | None = None
    max_tokens: int | None = None
    block_size: int = None  # type: ignore[assignment]  # None only before a CacheSpec takes the group: readers see an int
    block_order: BlockOrder = "tokens"
    packing: str = ""

    def __post_init__(self) -> None:
        check.check_name("Group.name", self.name)
        here = f"group {self.name!r}: "
        layers = check.check_layers(here + "layers", self.layers)
        components = check.check_members(here + "components", self.components, Component)
        check.check_unique(here + "components", [c.name for c in components])
        components = tuple(canonical(c, len(layers), f"{here}component {c.name!r}: ") for c in components)
        assign(self, layers=layers, components=components)
        for field in ("window_tokens", "max_tokens", "block_size"):
            if getattr(self, field) is not None:
                assign(self, **{field: check.check_size(here + field, getattr(self, field))})
        if self.growth == "fixed" and self.block_size is None:
            assign(self, block_size=1)
        check.check_choice(here + "block_order", self.block_order, get_args(BlockOrder))
        if self.packing != "":
            check.check_name(here + "packing", self.packing)
        for field, refused, why in GROUP_RULES:
            if refused(self):
                raise SpecError(f"{here}{field}: got {check.brief(getattr(self, field))}; {why}")
        tokens = max(self.block_size or 1, self.window_tokens or 1, self.max_tokens or 1)
        if tokens * self.bytes_per_token + self.fixed_bytes >= 2**63:
            raise SpecError(
                f"{here}got {self.bytes_per_token} bytes a token, {tokens} tokens and {self.fixed_bytes} fixed bytes; "
                "a group must stay under 2**63 bytes: check heads, width, layers, block_size and window_tokens"
            )

    @property
    def growth(self) -> Growth:
        """How all components of the group grow; see :class:`Component`."""
        return self.components[0].growth

    @property
    def ragged(self) -> bool:
        """True if each (sequence, head) of the group has a length of its own."""
        return self.components[0].ragged

    @property
    def k_only(self) -> bool:
        """True if the group stores K but no V: V is derived from the K of all heads (Slim attention)."""
        return len(self.components) == 1 and self.components[0].name in ("k", "cross_k")

    @cached_property
    def bytes_per_token(self) -> int:
        """The payload bytes of one token, over all layers and components; 0 with ``growth="fixed"``."""
        return 0 if self.growth == "fixed" else self._row_total

    @cached_property
    def fixed_bytes(self) -> int:
        """The payload bytes of one sequence with ``growth="fixed"``; otherwise 0."""
        return self._row_total if self.growth == "fixed" else 0

    @property
    def _row_total(self) -> int:
        copies = {"layer": range(len(self.layers)), "shared": range(1)}
        return sum(c.elements_at(index) * c.dtype.itemsize for c in self.components for index in copies[c.scope])

    def component(self, name: str) -> Component:
        """Return the component of this name; ``SpecError`` if the group has none."""
        for component in self.components:
            if component.name == name:
                return component
        raise SpecError(f"group {self.name!r}: component: got {name!r}; it has {check.brief(self.components)}")

    def heads(self, component: str, layer: int) -> int:
        """Return the number of heads of ``component`` in ``layer``."""
        return self.component(component).heads_at(self._index(component, layer))

    def widths(self, component: str, layer: int) -> tuple[int, ...]:
        """Return the elements of a head, one entry for each head group; a single entry if all heads are equal."""
        return self.component(component).widths_at(self._index(component, layer))

    def rope(self, component: str, layer: int) -> Rope:
        """Return how ``component`` is rotated in ``layer``: ``"none"``, ``"pre"`` or ``"post"``."""
        rope = self.component(component).rope
        return rope[self._index(component, layer)] if isinstance(rope, tuple) else rope

    def row_bytes(self, component: str, layer: int) -> int:
        """Return the payload bytes of one token (``fixed``: of one sequence) in ``layer``.

        All layers that share a copy report the size of that copy.
        """
        found = self.component(component)
        return found.elements_at(self._index(component, layer)) * found.dtype.itemsize

    def _index(self, component: str, layer: int) -> int:
        if layer not in self.layers:
            raise SpecError(f"group {self.name!r}: layer: got {layer!r}; it has {check.brief(self.layers)}")
        return 0 if self.component(component).scope == "shared" else self.layers.index(layer)


@dataclass(frozen=True)
class CacheSpec:
    """Everything that a model caches: ``CacheSpec(groups)``, or ``CacheSpec(components=[...], num_layers=32)`` for a
    single group with all layers.

    groups: the groups. A component of a layer belongs to exactly one of them.
    num_layers: layers of the model; by default one more than the highest layer of a group. A layer need not have a
        component.
    block_size: tokens of a block, for the groups that do not set their own. With different sizes, prefixes are shared
        in units of the least common multiple, over the groups that grow by token: hits, pins, snapshots and events
        count such units, and a window releases one unit at a time. If the unit exceeds 4,096 tokens, nothing is shared
        (``PrefixMatch.reason`` says so).
    num_query_heads: query heads of the model, if known. Layouts that need the K of each query head are refused then
        where heads are shared (GQA).

    Raises ``SpecError`` for fields that are invalid or contradict each other.
    """

    groups: tuple[Group, ...] = ()
    _: KW_ONLY
    components: InitVar[Sequence[Component] | None] = None
    num_layers: int = None  # type: ignore[assignment]  # None only as an argument: __post_init__ makes it an int
    block_size: int = 16
    num_query_heads: int | None = None

    def __post_init__(self, components: Sequence[Component] | None) -> None:
        assign(self, block_size=check.check_size("block_size", self.block_size))
        if self.num_query_heads is not None:
            assign(self, num_query_heads=check.check_size("num_query_heads", self.num_query_heads))
        if self.num_layers is not None and check.check_size("num_layers", self.num_layers) > check.MAX_LAYERS:
            raise SpecError(f"num_layers: got {self.num_layers!r}; at most {check.MAX_LAYERS}")
        groups = (
            check.check_members("groups", self.groups, Group) if components is None else self._one_group(components)
        )
        check.check_unique("groups", [g.name for g in groups])
        top = max(g.layers[-1] for g in groups)
        if self.num_layers is not None and self.num_layers <= top:
            raise SpecError(f"num_layers: got {self.num_layers!r}; a group holds layer {top}")
        assign(self, num_layers=top + 1 if self.num_layers is None else int(self.num_layers))
        assign(
            self,
            groups=tuple(g if g.block_size is not None else replace(g, block_size=self.block_size) for g in groups),
        )
        self._check_owners()
        self._check_query_heads()
        total = sum(g.bytes_per_token * g.block_size + g.fixed_bytes for g in self.groups)
        if total >= 2**63:
            raise SpecError(f"groups: got {total} bytes for one block of each; a spec must stay under 2**63 bytes")

    def _one_group(self, components: Sequence[Component]) -> tuple[Group, ...]:
        if self.groups:
            raise SpecError(
                f"components: got groups {check.brief(self.groups)} too; give groups, or components for one group"
            )
        if self.num_layers is None:
            raise SpecError("num_layers: got None; with components, the number of layers is required")
        return (Group("all", check.check_members("components", components, Component), tuple(range(self.num_layers))),)

    def _check_owners(self) -> None:
        owner: dict[tuple[int, str], Group] = {}
        for group in self.groups:
            for key in ((layer, c.name) for layer in group.layers for c in group.components):
                if key in owner:
                    raise SpecError(
                        f"groups: got component {key[1]!r} of layer {key[0]} in {owner[key].name!r} and "
                        f"{group.name!r}; it lives in one group: rename it, or take the layer out of the other"
                    )
                owner[key] = group

    def _check_query_heads(self) -> None:
        if (queries := self.num_query_heads) is None:
            return
        pairs = [(g, c.name) for g in self.groups for c in g.components if c.name in ("k", "v", "cross_k", "cross_v")]
        for group, name in pairs:
            for heads in sorted({group.heads(name, layer) for layer in group.layers}):
                if queries % heads:
                    raise SpecError(f"num_query_heads: got {queries}, not a multiple of the {heads} heads of {name!r}")
                if group.k_only and heads < queries:
                    raise SpecError(
                        f"group {group.name!r}: heads: got {heads} of {name!r} with no V for {queries} query heads; V "
                        "is derived by inverting W_K, and under GQA the K of a token has too low a rank: store V"
                    )

    @classmethod
    def kv(
        cls, *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype | str, block_size: int = 16,
        window_tokens: int | None = None, num_query_heads: int | None = None,
    ) -> CacheSpec:  # fmt: skip
        """Return the usual spec: K (after rotation) and V, equal in all layers.

        head_dim: elements of a head. dtype: of the elements, a ``torch.dtype`` or a name such as ``"bfloat16"``.
        window_tokens: the sliding window of all layers; None for full attention.
        """
        if check.check_size("num_layers", num_layers) > check.MAX_LAYERS:
            raise SpecError(f"num_layers: got {num_layers!r}; at most {check.MAX_LAYERS}")
        check.check_size("num_kv_heads", num_kv_heads), check.check_size("head_dim", head_dim)
        k = Component("k", heads=num_kv_heads, width=head_dim, dtype=parse_dtype(dtype), rope="post")
        group = Group(
            "all", (k, replace(k, name="v", rope="none")), tuple(range(num_layers)), window_tokens=window_tokens
        )
        return cls((group,), block_size=block_size, num_query_heads=num_query_heads)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | PathLike[str] | object,
        *,
        dtype: torch.dtype | str | None = None,
        block_size: int = 16,
        assume: str | None = None,
    ) -> CacheSpec:
        """Return the spec of a published model; see :func:`kvmem.spec.from_config.spec_from_config`."""
        from kvmem.spec.from_config import spec_from_config  # imported late, because it imports this module

        return spec_from_config(config, dtype=dtype, block_size=block_size, assume=assume)

    def with_blocks(self, block_order: BlockOrder, *, packing: str = "", block_size: int | None = None) -> CacheSpec:
        """Return this spec with other blocks in all groups that hold tokens; see :class:`Group`. block_size: default as
        it is. ``SpecError`` where a group cannot have them.
        """

        def changed(group: Group) -> Group:
            size = group.block_size if block_size is None else block_size
            return replace(group, block_order=block_order, packing=packing, block_size=size)

        groups = tuple(g if g.growth == "fixed" else changed(g) for g in self.groups)
        size = self.block_size if block_size is None else block_size
        return replace(self, groups=groups, block_size=size, components=None)

    @cached_property
    def bytes_per_token(self) -> int:
        """The payload bytes of one new token, over all groups that grow by token.

        A group with a sliding window releases as much once its window is full.
        """
        return sum(g.bytes_per_token for g in self.groups if g.growth == "token")

    @cached_property
    def prefill_bytes_per_token(self) -> int:
        """The payload bytes of one encoder token, over all groups that are fixed after prefill."""
        return sum(g.bytes_per_token for g in self.groups if g.growth == "prefill")

    @cached_property
    def fixed_bytes(self) -> int:
        """The payload bytes of a sequence that do not depend on its length."""
        return sum(g.fixed_bytes for g in self.groups)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the canonical JSON of ``to_dict()``, as 64 hex digits. Equal specs have equal fingerprints, in
        every process.
        """
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def group_of(self, layer: int, component: str) -> int:
        """Return the index in ``groups`` of the group that holds ``component`` for ``layer``; ``SpecError`` if none."""
        self._check_layer(layer)
        check.check_name("component", component)
        for index, group in enumerate(self.groups):
            if layer in group.layers and any(c.name == component for c in group.components):
                return index
        there = ", ".join(c.name for c in self.layer_components(layer))
        raise SpecError(f"component: got {check.brief(component)} of layer {layer}; that layer has {there or 'none'}")

    def layer_components(self, layer: int) -> tuple[Component, ...]:
        """Return all components that ``layer`` reads, in the order of the groups; empty for a layer without a cache."""
        self._check_layer(layer)
        return tuple(c for g in self.groups if layer in g.layers for c in g.components)

    def _check_layer(self, layer: object) -> None:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= int(layer) < self.num_layers:
            raise SpecError(f"layer: got {check.brief(layer)}; the spec has layers 0 to {self.num_layers - 1}")

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain JSON data: ``CacheSpec.from_dict(spec.to_dict()) == spec``."""
        groups = [_plain(g) | {"components": [_plain(c) for c in g.components]} for g in self.groups]
        return {"format": _FORMAT} | _plain(self) | {"groups": groups}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CacheSpec:
        """Return the spec of which ``data`` is the ``to_dict()``; ``SpecError`` for an unknown or missing field."""
        rest = dict(_mapping("spec", data))
        if (found := rest.pop("format", None)) != _FORMAT:
            raise SpecError(f"format: got {found!r}; this version reads {_FORMAT}")
        groups = [dict(_mapping("groups", group)) for group in check.check_members("groups", rest.get("groups"), dict)]
        for group in groups:
            components = check.check_members("components", group.get("components"), dict)
            group["components"] = tuple(_build(Component, c) for c in components)
        return _build(cls, rest | {"groups": tuple(_build(Group, g) for g in groups)})


def _plain(instance: Component | Group | CacheSpec) -> dict[str, Any]:
    values = {f.name: getattr(instance, f.name) for f in fields(instance)}
    plain = {
        name: dtype_name(v) if isinstance(v, torch.dtype) else v
        for name, v in values.items()
        if name not in ("groups", "components") and v != _OPTIONAL.get(name, object)
    }
    return {name: _lists(value) for name, value in plain.items()}


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _mapping(field: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SpecError(f"{field}: got {check.brief(value)}; must be a dict")
    return value


def _build(cls: type[_T], data: Mapping[str, Any]) -> _T:
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for field in sorted(data.keys() - known):
        raise SpecError(f"{field}: got {check.brief(data[field])}; {cls.__name__} has no such field")
    for field in sorted(known - data.keys() - _OPTIONAL.keys()):
        raise SpecError(f"{field}: missing from a {cls.__name__}")
    return cls(**data)
