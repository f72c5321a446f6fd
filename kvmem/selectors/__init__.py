"""Choosing which blocks attention reads: selectors, and the batch over chosen blocks that paged kernels take."""

from kvmem.selectors.base import LayerView, Selector
from kvmem.selectors.chooser import Chooser
from kvmem.selectors.chosen import ChosenBatch
from kvmem.selectors.clustered import Clustered
from kvmem.selectors.quest import Quest
from kvmem.selectors.recent import Recent
from kvmem.selectors.sparf import SparF

__all__ = ["Chooser", "ChosenBatch", "Clustered", "LayerView", "Quest", "Recent", "Selector", "SparF"]
