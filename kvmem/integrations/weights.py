"""A name of a model's weights, so that blocks of others are never found."""

from __future__ import annotations

import json
import os

__all__ = ["weights_name"]


def weights_name(path: str, revision: str | None) -> str:
    """Return a name of the weights: ``path@revision``, and of a folder also its files with their sizes and times."""
    name = f"{path}@{revision}"
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            files = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file())
        name += json.dumps(files)
    return name
