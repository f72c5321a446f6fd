"""What every test file shares: the seed of the run, the module under test, and the reason a GPU test is skipped."""

from __future__ import annotations

import gc
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Modules that hold assertions but no tests of their own: a failure in one shows its values too.
HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # the package benchmarks; last, so that a kvmem that PYTHONPATH names comes first
pytest.register_assert_rewrite(*(f.stem for f in HERE.rglob("*.py") if not f.name.startswith(("test_", "conftest"))))

# The machine's load must not fail an example. Hypothesis draws by itself, and prints the blob that repeats a failure:
# its examples shrink and are kept in its database, which a seed would defeat.
settings.register_profile("kvmem", deadline=None, print_blob=True)
settings.load_profile("kvmem")

# Before torch is imported. Tests compute on tiny tensors, for which threads only wait for each other: ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="repeat a run")
    parser.addoption(
        "--share",
        type=float,
        default=1.0,
        help="run this share of the cases of each test, at least one, drawn by the seed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """One seed for all of a run, also in the workers of pytest-xdist."""
    if hasattr(config, "workerinput"):
        config.option.seed = config.workerinput["seed"]
    elif config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> list[str]:
    from kvmem import _core

    return [f"kvmem._core: {_core.__file__}", f"seed: {config.getoption('--seed')} (repeat with --seed)"]


def pytest_sessionstart(session: pytest.Session) -> None:
    """A run that means to test one build must not quietly test another."""
    expected = os.environ.get("KVMEM_EXPECT_CORE")
    if expected is None:
        return
    from kvmem import _core

    if Path(expected).resolve() not in Path(_core.__file__).resolve().parents:
        pytest.exit(f"KVMEM_EXPECT_CORE is {expected}, but {_core.__file__} was loaded", returncode=3)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (share := config.getoption("--share")) < 1:
        draw_share(config, items, share)
    put_in_order(items)


def draw_share(config: pytest.Config, items: list[pytest.Item], share: float) -> None:
    """CI has twenty minutes for all tests under three compilers' checks, and tries other cases each time."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    drawn: set[pytest.Item] = set()
    for name, of_test in cases.items():
        rng = random.Random(f"{config.getoption('--seed')} {name}")
        drawn |= set(rng.sample(of_test, math.ceil(share * len(of_test))))
    config.hook.pytest_deselected(items=[item for item in items if item not in drawn])
    items[:] = [item for item in items if item in drawn]


def put_in_order(items: list[pytest.Item]) -> None:
    """On a GPU: first the driver's rules, which are timed and want it for themselves; last the kernels, which compile."""
    order = {"test_gpu_rules": 0, "test_gpu_kernels": 2}
    items.sort(key=lambda item: order.get(item.path.stem, 1) if item.get_closest_marker("gpu") else 1)


def pytest_collection_finish() -> None:
    """What the imports left is no garbage. The collector would walk a million objects of torch and transformers each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or the interpreter's end would leave it, and the native module would report a leak


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device; torch sees none")


TABLES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def tables(request: pytest.FixtureRequest) -> list[str]:
    """Lines that are printed when all tests have run: what a GPU was found to do."""
    return request.config.stash.setdefault(TABLES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(TABLES, [])
    for line in lines:
        terminalreporter.write_line(line)
    if lines and (report := os.environ.get("KVMEM_GPU_REPORT")):
        Path(report).write_text("\n".join(lines) + "\n")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run, the same for every test. pytest shows it in the header, and here when a test fails."""
    value: int = request.config.getoption("--seed")
    print(f"seed: {value}")
    return value


@pytest.fixture(autouse=True)
def torch_generator(seed: int) -> None:
    """Tensors that a test draws without a generator of its own follow from the seed, too."""
    import torch

    torch.manual_seed(seed)


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A generator of its own for each test, so that a test repeats alone what it did in the whole run."""
    return random.Random(seed)


@pytest.fixture(params=["virtual", "paged"])
def backend(request: pytest.FixtureRequest) -> str:
    """A test that takes it runs on each; with ``parametrize`` a test has others."""
    return request.param  # type: ignore[no-any-return]
