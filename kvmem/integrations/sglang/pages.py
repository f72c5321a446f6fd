"""The pages of one of SGLang's pools, as payloads: gathered from the device for a store, scattered layer by layer on a
load. A payload is a page of each buffer, one behind the other; what a kernel keeps inside a page is opaque.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kvmem.errors import SpecError

__all__ = ["PoolPages"]


class PoolPages:
    """Views of a pool's buffers by page.

    components: lists of tensors [rows, ...], contiguous, on one device. layers: for each layer, which tensor of each
    component is its. page_rows: rows of a page. ``SpecError`` for a buffer that cannot be seen by page.

    Attributes: ``page_bytes``, of a payload; ``form``, what its layout depends on, for a fingerprint.
    """

    def __init__(
        self, components: Sequence[Sequence[torch.Tensor]], layers: Mapping[int, Sequence[int]], page_rows: int
    ) -> None:
        self.page_rows, self.page_bytes, self.form = page_rows, 0, [["rows of a page", page_rows]]
        self._views: list[tuple[torch.Tensor, slice]] = []
        self._of_layer: dict[int, list[int]] = {layer: [] for layer in layers}
        for component in components:
            first = len(self._views)
            for buffer in component:
                self._add(buffer)
            for layer, chosen in layers.items():
                self._of_layer[layer] += [first + index for index in chosen]
        self.device = self._views[0][0].device
        self.form.append([[layer, *views] for layer, views in sorted(self._of_layer.items())])

    def _add(self, buffer: torch.Tensor) -> None:
        if not buffer.is_contiguous() or buffer.shape[0] < self.page_rows:
            raise SpecError(
                f"SGLang's KV pool has a buffer of shape {list(buffer.shape)}, strides {list(buffer.stride())}, "
                f"which kvmem cannot see as pages of {self.page_rows} rows; choose another KV layout"
            )
        pages = buffer.shape[0] // self.page_rows
        view = buffer[: pages * self.page_rows].view(pages, -1).view(torch.uint8)
        self._views.append((view, slice(self.page_bytes, self.page_bytes + view.shape[1])))
        self.page_bytes += view.shape[1]
        self.form.append([str(buffer.dtype), *buffer.shape[1:]])

    def staging(self, count: int) -> torch.Tensor:
        """Return room for the payloads of ``count`` pages, uint8 [count, page_bytes], in host memory."""
        return torch.empty((count, self.page_bytes), dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def gather(self, pages: torch.Tensor, staging: torch.Tensor) -> None:
        """Copy ``pages``, int64 [n], to ``staging``, and wait for the copies."""
        at = pages.to(self.device)
        for view, columns in self._views:
            staging[:, columns].copy_(view.index_select(0, at))

    def scatter(self, layer: int, pages: torch.Tensor, staging: torch.Tensor) -> None:
        """Copy one layer's part of ``staging`` to ``pages``; on a GPU, on the current stream. Other bytes stay."""
        at = pages.to(self.device)
        for index in self._of_layer.get(layer, ()):
            view, columns = self._views[index]
            view.index_copy_(0, at, staging[:, columns].to(self.device, non_blocking=True))
