"""Handles from every form in which a call may name sequences. The core reads lists of ints and int32 arrays itself, and
calls ``handles()`` for any other form.
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
    """Return the handles, int32 [n], of several sequences of ``core``, given as sequences, handles or a mixture.

    If all are integers, no entry costs a Python call.
    """
    if isinstance(given, Sequence):
        raise SpecError(f"{field}: got {given!r}; must be several of them: [seq] for one")
    return as_int32(field, given, lambda name, one: handle(name, one, core))


def handle(field: str, sequence: Sequence | int, core: _core.Allocator) -> int:
    """Return the handle of one sequence of ``core``, given as a sequence or a handle."""
    if not isinstance(sequence, Sequence):
        return check_count(field, sequence)
    if sequence.allocator.core is not core:
        raise SpecError(f"{sequence!r} belongs to another allocator")
    return sequence.id


def several(sequences: Iterable[Sequence | int] | Handles, core: _core.Allocator) -> Handles:
    """Return the handles, int32 [n], of any iterable of sequences or handles: the argument ``sequences`` of a call."""
    if isinstance(sequences, (Sequence, int, np.integer)) or not isinstance(sequences, (Iterable, torch.Tensor)):
        raise SpecError(f"sequences: got {sequences!r}; must be several of them: [seq] for one, as batch([seq])")
    listed = sequences if isinstance(sequences, (list, tuple, np.ndarray, torch.Tensor)) else list(sequences)
    return handles("sequences", listed, core)
