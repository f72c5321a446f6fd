"""The package as it is shipped: sdist, wheel from that sdist, installed elsewhere; and the stub of the native module.

The build runs with no package index and with a torch and a numpy that raise on import: neither may be needed to build.
"""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import version
from pathlib import Path

import pytest

from kvmem import _core

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ("torch", "numpy")
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "demo-out")


@dataclass(frozen=True)
class Shipped:
    sdist: Path
    wheel: Path
    site: Path  # where the wheel is installed, nothing else


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    tmp = tmp_path_factory.mktemp("shipped")
    poison = tmp / "poison"
    for name in REQUIRED:
        (poison / name).mkdir(parents=True)
        (poison / name / "__init__.py").write_text(f"raise RuntimeError('the build imported {name}')")
    shutil.copytree(ROOT, tmp / "tree", ignore=NOT_SOURCE)
    make_sdist = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp)!r})"
    run(sys.executable, "-c", make_sdist, cwd=tmp / "tree", PYTHONPATH=str(poison))
    (sdist,) = tmp.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
    offline = ("--no-deps", "--no-index")
    quick = {"CFLAGS": "-O0", "CXXFLAGS": "-O0"}  # newer setuptools reads CXXFLAGS, older ones CFLAGS
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp, sdist, cwd=tmp, PYTHONPATH=str(poison), **quick)
    (wheel,) = tmp.glob("*.whl")
    run(*pip, "install", *offline, "--target", tmp / "site", wheel, cwd=tmp)
    return Shipped(sdist, wheel, tmp / "site")


def builds(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that may be the first to ask for `shipped`, and so waits for the compiler."""
    return pytest.mark.slow(pytest.mark.timeout(400)(test))


@builds
def test_sdist_holds_what_a_build_and_a_test_run_need(shipped: Shipped) -> None:
    with tarfile.open(shipped.sdist) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    sources = {
        f.relative_to(ROOT).as_posix()
        for folder in ("csrc", "kvmem", "tests", "benchmarks")
        for f in (ROOT / folder).rglob("*")
        if f.suffix in (".cpp", ".h", ".py", ".pyi", ".mk")
    }
    needed = sources | {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "NOTICE"}
    assert needed - held == set()


@builds
def test_wheel_holds_the_package_and_nothing_else(shipped: Shipped) -> None:
    with zipfile.ZipFile(shipped.wheel) as wheel:
        held = set(wheel.namelist())
    package = {n for n in held if ".dist-info/" not in n}
    assert {n.partition("/")[0] for n in package} == {"kvmem"}
    python = {f.relative_to(ROOT).as_posix() for f in (ROOT / "kvmem").rglob("*.py*") if f.suffix in (".py", ".pyi")}
    (native,) = {n for n in package if n.endswith(".so")}
    assert re.fullmatch(r"kvmem/_core\..*\.so", native)
    assert package >= python | {"kvmem/py.typed", "kvmem/_core.pyi"}
    assert {Path(n).name for n in held if ".dist-info/" in n} >= {"LICENSE", "NOTICE", "METADATA"}


@builds
def test_installed_package_imports_far_from_the_checkout(shipped: Shipped, tmp_path: Path) -> None:
    code = "import kvmem, kvmem._core; print(kvmem.__file__); print(kvmem._core.__file__)"
    for line in run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(shipped.site)).splitlines():
        assert shipped.site in Path(line).parents


@builds
def test_metadata(shipped: Shipped) -> None:
    (path,) = shipped.site.glob("kvmem-*.dist-info/METADATA")
    metadata: Message = email.message_from_string(path.read_text())
    needs = metadata.get_all("Requires-Dist", [])
    assert sorted(n for n in needs if "extra ==" not in n) == ["numpy", "torch>=2.6"]
    assert set(metadata.get_all("Provides-Extra", [])) >= {"flashinfer", "transformers", "bench", "test"}
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert metadata["Requires-Python"] == ">=3.10"


@builds
def test_native_module_links_the_c_and_cxx_libraries_only_and_exports_its_entry_point_only(shipped: Shipped) -> None:
    (native,) = (shipped.site / "kvmem").glob("_core*.so")
    needed = set(re.findall(r"\(NEEDED\).*\[(\w+)[\w.+-]*\]", run("readelf", "-d", native, cwd=ROOT)))
    assert needed <= {"libc", "libm", "libdl", "libpthread", "libstdc", "libgcc_s", "ld"}, needed
    symbols = [line.split() for line in run("nm", "-D", "--defined-only", native, cwd=ROOT).splitlines()]
    # Weak and unique ones (V, W, u) are the C++ library's templates; every module has them.
    assert [name for _, kind, name in symbols if kind not in "VWu"] == ["PyInit__core"]


def test_extras_have_names_that_every_pip_knows() -> None:
    """Metadata has names with hyphens; older versions of pip then find no extra with an underscore, and install nothing."""
    named = set(
        re.findall(r"^([\w.-]+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dep")[2], re.M)
    )
    texts = [f.read_text() for folder in ("kvmem", "docs", "examples") for f in (ROOT / folder).rglob("*.[mp][dy]")]
    (installed,) = re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    asked = [installed, *re.findall(r"kvmem\[([\w,.-]+)\]", " ".join(texts) + (ROOT / "README.md").read_text())]
    used = {extra for extras in asked for extra in extras.split(",")}
    assert used <= named
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", extra) for extra in used)


def stub_names() -> dict[str, set[str]]:
    """Public names in kvmem/_core.pyi: "" for the module, else the class."""
    tree = ast.parse((ROOT / "kvmem" / "_core.pyi").read_text())
    classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    return {owner: set(filter(is_public, map(defined, body))) for owner, body in {"": tree.body, **classes}.items()}


def defined(node: ast.stmt) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    if isinstance(target, ast.Name):
        return target.id
    return node.name if isinstance(node, ast.ClassDef | ast.FunctionDef) else "_"


def is_public(name: str) -> bool:
    return not name.startswith("_")


@pytest.mark.core
def test_stub_names_what_the_module_has() -> None:
    owners: dict[str, object] = {"": _core}
    owners |= {name: value for name, value in vars(_core).items() if isinstance(value, type) and is_public(name)}
    real = {name: set(filter(is_public, vars(owner))) for name, owner in owners.items()}
    assert stub_names() == real, "run `make stubs`"


def test_stub_is_current(tmp_path: Path) -> None:
    (pinned,) = re.findall(r"^nanobind==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if version("nanobind") != pinned:
        pytest.skip(f"each nanobind writes its own stub: pinned {pinned}, installed {version('nanobind')}")
    fresh = tmp_path / "_core.pyi"
    run(sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "kvmem._core", "-o", fresh, cwd=ROOT)
    assert (ROOT / "kvmem" / "_core.pyi").read_text() == fresh.read_text(), "run `make stubs`"
