"""Every attention kernel, unchanged, over both backends: numbers against float64, and what it touches past a sequence's
end. On a GPU each kernel has a process of its own; here, the same tries with the kernels done by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import gpu_worker
import pytest
from gpu_cases import configs, pairwise_cover
from gpu_jobs import (
    PYTHON_PATH,
    WORKER,
    Pool,
    Report,
    numbers_table,
    problems,
    read_report,
    run_worker,
    tail_of,
    tails_table,
)
from gpu_kernels import BY_NAME, COMPILED, PLAIN, TRIALS, Trial
from kernel_cases import one_thread

__all__ = ["one_thread"]
NAMES = [trial.name for trial in TRIALS]
every_kernel = pytest.mark.parametrize("name", NAMES)

# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest, tables: list[str]) -> Iterator[Pool]:
    """All kernels that this run asks for, started together."""
    asked = [
        item.callspec.params["name"] for item in request.session.items if "pool" in getattr(item, "fixturenames", ())
    ]
    made = Pool(list(dict.fromkeys(asked)), request.config.getoption("--seed"))
    yield made
    made.close()
    tables += [*numbers_table(made.done()), *tails_table(made.done())]


@pytest.mark.gpu
@pytest.mark.timeout(1800)  # it compiles; the process has a limit of its own
@every_kernel
def test_numbers(pool: Pool, name: str) -> None:
    report = pool[name]
    if report.skipped:
        pytest.skip(report.skipped)
    assert not problems(report), "\n".join(problems(report))
    assert not report.ended or report.tail(""), f"nothing was tried: {report.ended}"
    if all(record.status == "skipped" for record in report.numbers()):
        pytest.skip(report.numbers()[0].why)


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@every_kernel
def test_guard_is_large_enough(pool: Pool, name: str) -> None:
    report = pool[name]
    tail = tail_of(report)
    if report.skipped or tail.touches == tail.needs_finite == "unknown":
        pytest.skip(report.skipped or f"nothing was learnt: {report.ended or 'all tries were skipped'}")
    tries = [f"{r.what}: {r.status} {r.why}" for r in report.tail("")]
    assert not tail.wrong, "\n".join([tail.verdict, *tries])


# ---- Anywhere --------------------------------------------------------------------------------------------------------


#: By hand, fa3 is fa2 and one FlashAttention 3 the other.
DISTINCT = [name for name in NAMES if not name.endswith(" fa3") and name != "FlashAttention 3, varlen"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", DISTINCT)
def test_by_hand(name: str, seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's process will do, with fewer choices."""
    kernel = BY_NAME[name]
    cheapest = min(configs(kernel), key=lambda c: (c.step == "long decode", c.model[2] * c.group))
    monkeypatch.setattr(gpu_worker, "configs", lambda kernel: [cheapest])
    monkeypatch.setattr(gpu_worker, "TAIL_LAYERS", (3,))
    gpu_worker.work(kernel, "cpu", seed)
    report = read_report(kernel, capsys.readouterr().out, "")
    assert not problems(report), "\n".join(problems(report))
    assert len(report.numbers()) >= 1 and len(report.tail("")) >= 2
    tail = tail_of(report)
    assert (tail.touches, tail.needs_finite, tail.wrong) == ("no", "no", False)
    assert ("larger than needed" in tail.verdict) == (kernel.kernel.guard_tokens > 0)


def test_every_choice_is_tried_and_every_pair_of_them() -> None:
    choices = {"a": (1, 2, 3), "b": ("x", "y", "z"), "c": (True, False), "d": (None,)}
    rows = pairwise_cover(choices)
    assert len(rows) < 14
    for one in choices:
        for other in choices:
            met = {(row[one], row[other]) for row in rows}
            pairs = {(a, b) for a in choices[one] for b in choices[other] if one != other or a == b}
            assert met == pairs
    assert {(q, head) for q, _, head in PLAIN} == {(m[0], m[2]) for m in PLAIN if m[0] == m[1]}
    assert {head for *_, head in COMPILED} == {64, 128, 256} and len({kv for _, kv, _ in COMPILED}) == 3
    for kernel in TRIALS:
        tried = configs(kernel)
        assert {c.model for c in tried} == set(kernel.models) and {c.backend for c in tried} == set(kernel.backends)
        assert len(tried) < 45, f"{kernel.name}: {len(tried)} tries are more than the default should take"


GREEDY = """
import sys; sys.path[:0] = {tests!r}
import gpu_worker, gpu_kernels
from dataclasses import replace
from kvmem.kernels import registry, torch_ops
from kvmem.kernels.checks import flat_tokens

def prepare(library, step):
    '''Loads 64 tokens past the end, as kernels of tiles do, and masks by a product with zero.'''
    plain = torch_ops.prepare_attention(library, step)
    def run(q, cache):
        out, lse = plain(q, cache)
        for start, length in zip(step.batch.row_starts.tolist(), step.batch.seq_lens.tolist()):
            out = out + 0 * flat_tokens(cache[1])[start + length : start + length + 64].sum()
        return out, lse
    return run

kernel = replace(registry.find("torch flash, rows"), prepare=prepare, guard_tokens={guard})
gpu_worker.configs = lambda kernel: []
gpu_worker.work(gpu_kernels.Trial(kernel, steps=("decode",)), "cpu", 0)
"""


@pytest.mark.parametrize(("guard", "verdict", "wrong"), [(0, "TOO SMALL", True), (256, "right", False)])
def test_a_kernel_that_touches_too_much_is_found_out(guard: int, verdict: str, wrong: bool) -> None:
    """Its process dies of it, as on a GPU. With the guard that such kernels ask for, it does not."""
    from dataclasses import replace

    code = GREEDY.format(tests=[str(WORKER.parent), *PYTHON_PATH], guard=guard)
    report = run_worker("torch flash, rows", 0, command=[sys.executable, "-c", code], limit=100)
    report.kernel = Trial(replace(report.kernel.kernel, guard_tokens=guard))
    assert "signal 11" in report.ended, report
    tail = tail_of(report)
    assert (tail.touches, tail.needs_finite, tail.wrong) == ("yes", "yes", wrong) and verdict in tail.verdict
    assert f'kvmem/kernels/registry.py "torch flash, rows": guard_tokens = {guard}' in "\n".join(tails_table([report]))


def test_what_hangs_is_killed_and_what_was_found_before_is_kept() -> None:
    found = json.dumps({"what": "one", "status": "ok", "error": 1e-4, "allowed": 1e-2, "seconds": 1.0})
    code = f"print('''{found}''', flush=True)\nprint('{{\"what\": \"two\", \"status\": \"begin\"}}', flush=True)\n"
    code += "import time; time.sleep(60)"
    report = run_worker("kvmem sdpa", 0, command=[sys.executable, "-c", code], limit=2)
    assert [(r.what, r.status) for r in report.records] == [("one", "ok"), ("two", "crashed")]
    assert "killed after 2 s" in report.ended and len(problems(report)) == 1
    assert "1 of 2 failed" in "\n".join(numbers_table([report]))


def test_a_missing_package_is_a_skip_with_its_name() -> None:
    report = read_report(BY_NAME["fa3-fwd, rows"], _skip("fa3-fwd, rows", "fa3_fwd_interface is not installed"), "")
    assert report.skipped == "fa3_fwd_interface is not installed"
    assert "not installed" in "\n".join(numbers_table([report])) and len(tails_table([report])) == 5
    assert Report(report.kernel).skipped == ""


def _skip(name: str, why: str) -> str:
    return json.dumps({"what": name, "status": "skipped", "why": why})
