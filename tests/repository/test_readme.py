"""What the README shows runs as it stands, on both backends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


@pytest.mark.parametrize("backend", ["virtual", "paged"])
def test_the_code_of_the_readme_runs(backend: str) -> None:
    """All of it in one process, from top to bottom: what comes later goes on with what came first."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    assert 'backend="virtual"' in code
    code = code.replace('backend="virtual"', f'backend="{backend}"')
    code = "import torch; torch.manual_seed(1)\n" + code
    code += "\nassert alloc.stats().num_sequences == 0 and alloc.check() == []\nprint('done')\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_the_readme_names_commands_that_exist() -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
