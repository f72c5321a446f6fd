"""A name of a model's or an adapter's weights, so that blocks of others are never found."""

from __future__ import annotations

import json
import os

__all__ = ["weights_name"]


def weights_name(path: str, revision: str | None) -> str:
    """Return a name of the weights: of a folder or file its path, with sizes and times of the files; of a repository
    on Hugging Face's hub the commit that lies in this machine's cache, since ``revision`` may be a branch.
    """
    if os.path.exists(path):
        files = [entry.path for entry in os.scandir(path) if entry.is_file()] if os.path.isdir(path) else [path]
        stats = [(os.path.basename(file), os.stat(file)) for file in sorted(files)]
        return f"{path}@{revision}" + json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return f"{path}@{_commit_of(path, revision) or revision}"


def _commit_of(repository: str, revision: str | None) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        for name in ("config.json", "adapter_config.json", "params.json"):  # each repository has one
            found = try_to_load_from_cache(repository, name, revision=revision)
            if isinstance(found, str):  # .../snapshots/<commit>/<name>
                return os.path.basename(os.path.dirname(found))
    except (ImportError, ValueError):  # no client of the hub, or no name that a repository can have
        pass
    return None
