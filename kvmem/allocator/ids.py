"""Which sequences a call names, in every form that is taken. The core reads lists of ints and int32 arrays by itself
and asks ``handles()`` about all else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvmem import _core
from kvmem.allocator.sequence import Sequence
from kvmem.arguments import as_int32, check_count
from kvmem.errors import SpecError

if TYPE_CHECKING:
    from kvmem.arguments import Handles

__all__ = ["handle", "handles", "several"]


def handles(field: str, given: Any, core: _core.Allocator) -> Handles:
    """Handles of ``core``, or sequences for theirs. Where all are integers, none is looked at by itself."""
    if isinstance(given, Sequence):
        raise SpecError(f"{field}: got {given!r}; must be several of them: [seq] for one")
    return as_int32(field, given, lambda name, one: handle(name, one, core))


def handle(field: str, sequence: Sequence | int, core: _core.Allocator) -> int:
    """The handle of one sequence of ``core``."""
    if not isinstance(sequence, Sequence):
        return check_count(field, sequence)
    if sequence.allocator.core is not core:
        raise SpecError(f"{sequence!r} belongs to another allocator")
    return sequence.id


def several(sequences: Iterable[Sequence | int] | Handles, core: _core.Allocator) -> Handles:
    """``handles()`` of any iterable."""
    if isinstance(sequences, (Sequence, int, np.integer)) or not isinstance(sequences, (Iterable, torch.Tensor)):
        raise SpecError(f"sequences: got {sequences!r}; must be several of them: [seq] for one, as batch([seq])")
    listed = sequences if isinstance(sequences, (list, tuple, np.ndarray, torch.Tensor)) else list(sequences)
    return handles("sequences", listed, core)
