"""A name of a model's or an adapter's weights, so that blocks of others are never found."""

from __future__ import annotations

import json
import os
from typing import Final

__all__ = ["weights_name"]

_CONFIGS: Final = ("config.json", "adapter_config.json", "params.json")  # one of them is in each repository


def weights_name(path: str, revision: str | None) -> str:
    """Return a name of the weights: of a folder or file its path, with sizes and times of the files; of a repository
    on Hugging Face's hub the commit that lies in this machine's cache, since ``revision`` may be a branch.
    """
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            files = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file())
        return f"{path}@{revision}" + json.dumps(files)
    if os.path.isfile(path):
        return f"{path}@{revision}" + json.dumps([os.stat(path).st_size, os.stat(path).st_mtime_ns])
    return f"{path}@{_commit_of(path, revision) or revision}"


def _commit_of(repository: str, revision: str | None) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for name in _CONFIGS:
        try:
            found = try_to_load_from_cache(repository, name, revision=revision)
        except ValueError:  # no repository has such a name
            return None
        if isinstance(found, str):  # .../snapshots/<commit>/<name>
            return os.path.basename(os.path.dirname(found))
    return None
