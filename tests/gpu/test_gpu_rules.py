"""The probes of the driver's own rules: on a GPU, where they judge what kvmem assumes, and over the stand-in, which must
keep the same rules."""

from __future__ import annotations

import gpu_rules
import pytest
from gpu_rules import BY_NAME, RULES, Finding, probe_apart, table
from support_drivers import STUB_GRANULARITY_BYTES, CudaStub, build_stub

#: Over the stand-in these say nothing, and take time.
SLOW = ("cost_beside_another_process",)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(BY_NAME))
def test_rule(name: str, rules_found: list[Finding]) -> None:
    finding = probe_apart(BY_NAME[name])
    rules_found.append(finding)
    assert not finding.mismatch, "\n".join(table([finding]))
    if finding.missing:
        pytest.skip(finding.outcome)


@pytest.fixture(scope="module")
def rules_found(tables: list[str]) -> list[Finding]:
    found: list[Finding] = []
    yield found
    tables += table(found) if found else []


def test_the_stand_in_keeps_the_rules(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the stand-in has no context that could be lost."""
    found = []
    for rule in RULES:
        if rule.name in SLOW:
            continue
        stub = CudaStub(build_stub(), tmp_path)
        monkeypatch.setenv("KVMEM_CUDA_DRIVER", str(stub.path))
        found.append(Finding(rule, **gpu_rules.probe_here(rule)))
    text = "\n".join(table(found))
    assert not [f for f in found if f.mismatch or "wrong" in f.outcome], text
    assert not [f for f in found if f.missing or f.outcome.startswith("crashed")], text
    outcomes = {f.rule.name: f.outcome for f in found}
    assert outcomes["map_during_graph_capture_unrelaxed"] == "refused with CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    assert outcomes["map_over_a_mapping"] == "refused with CUDA_ERROR_INVALID_VALUE"
    assert "assumes nothing that is not so" in text and f"pages of {STUB_GRANULARITY_BYTES >> 10} KiB" in text


def test_a_broken_assumption_is_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = CudaStub(build_stub(), tmp_path)
    monkeypatch.setenv("KVMEM_CUDA_DRIVER", str(stub.path))
    stubborn = gpu_rules.Rule("set_access_over_several_mappings", gpu_rules.REFUSED, "nobody")
    finding = Finding(stubborn, **gpu_rules.probe_here(stubborn))
    assert finding.mismatch and "wrong about: set_access_over_several_mappings" in "\n".join(table([finding]))


def test_allowed_but_with_other_bytes_is_not_allowed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = CudaStub(build_stub(), tmp_path)
    monkeypatch.setenv("KVMEM_CUDA_DRIVER", str(stub.path))
    monkeypatch.setattr("gpu_door.Door.read", lambda self, at, size=64: b"?" * size)
    for name in ("page_at_several_addresses", "read_through_an_alias_after_a_write", "content_survives_unmap_and_map"):
        finding = Finding(BY_NAME[name], **gpu_rules.probe_here(BY_NAME[name]))
        assert finding.mismatch and finding.outcome == "allowed, but wrong", finding


def test_a_probe_apart_answers_or_has_crashed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = CudaStub(build_stub(), tmp_path)
    monkeypatch.setenv("KVMEM_CUDA_DRIVER", str(stub.path))
    assert probe_apart(BY_NAME["granularity"]).outcome == "allowed"
    monkeypatch.setenv("KVMEM_CUDA_DRIVER", str(tmp_path / "no such library.so"))
    finding = probe_apart(BY_NAME["granularity"])
    assert finding.outcome == "crashed: status 1" and "no such library" in finding.detail and finding.mismatch
