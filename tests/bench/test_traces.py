"""Trace readers: four formats read right; every way a file can be wrong ends in a `TraceError` with file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kvmem.bench.text import TraceError
from kvmem.bench.traces import EXCERPT, Trace, load_trace
from kvmem.errors import KVMemError

MOONCAKE = [
    {"timestamp": 500, "input_length": 700, "output_length": 3, "hash_ids": [0, 7]},
    {"timestamp": 2000, "input_length": 512, "output_length": 0, "hash_ids": [0]},
]
QWEN = [
    {"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.5, "input_length": 20, "output_length": 9, "type": "text",
     "turn": 1, "hash_ids": [11, 12]},
    {"chat_id": 2, "parent_chat_id": 1, "timestamp": 63.0, "input_length": 40, "output_length": 5, "type": "text",
     "turn": 2, "hash_ids": [11, 12, 13]},
]  # fmt: skip
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8\r\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,110,27\n2024-05-10 00:00:01+00:00,50,1\n"
)
BURST_6 = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n9,GPT-4,0,0,0,API log\n45,GPT-4,1087,230,1317,API log\n"
)
BURST_8 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5.5,7,1.25,ChatGPT,472,18,490,Conversation log\n45,,3,GPT-4,1087,230,1317,API log\n"
)


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(tmp_path: Path, text: str, name: str = "trace", format: str | None = None) -> Trace:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return load_trace(path, format)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(TraceError) as caught:
        read(tmp_path, text)
    assert isinstance(caught.value, KVMemError)
    assert isinstance(caught.value, ValueError)
    assert str(tmp_path / "trace") in str(caught.value)
    return str(caught.value)


def test_mooncake(tmp_path):
    trace = read(tmp_path, json_lines(MOONCAKE))
    assert trace.format == "mooncake"
    assert trace.prefix_block_tokens == 512
    np.testing.assert_allclose(trace.arrival_seconds, [0, 1.5])
    assert trace.input_tokens.tolist() == [700, 512]
    assert trace.output_tokens.tolist() == [3, 0]
    assert trace.total_tokens.tolist() == [703, 512]
    assert trace.prefix_ids.tolist() == [0, 7, 0]
    assert trace.prefix_offsets.tolist() == [0, 2, 3]
    assert trace.notes == ()


def test_qwen_is_not_taken_for_mooncake(tmp_path):
    trace = read(tmp_path, json_lines(QWEN))
    assert (trace.format, trace.prefix_block_tokens) == ("qwen", 16)
    np.testing.assert_allclose(trace.arrival_seconds, [0, 1.5])  # seconds, where Mooncake has milliseconds
    assert trace.prefix_ids.tolist() == [11, 12, 11, 12, 13]


@pytest.mark.parametrize(("text", "gap"), [(AZURE, 0.052), (AZURE_2024, 0.99007), (AZURE.replace("\r\n", "\n"), 0.052)])
def test_azure(tmp_path, text, gap):
    trace = read(tmp_path, text)
    assert (trace.format, trace.num_requests, trace.prefix_ids) == ("azure", 2, None)
    np.testing.assert_allclose(trace.arrival_seconds, [0, gap], atol=1e-6)
    assert trace.notes == ()


def test_azure_without_a_last_line_end_carries_a_note(tmp_path):
    trace = read(tmp_path, AZURE.rstrip())
    assert trace.output_tokens.tolist() == [10, 8]
    assert len(trace.notes) == 1
    assert "line end" in trace.notes[0]


@pytest.mark.parametrize(("text", "failed"), [(BURST_6, 1), (BURST_8, 0)])
def test_burstgpt(tmp_path, text, failed):
    trace = read(tmp_path, text)
    assert (trace.format, trace.failed_requests) == ("burstgpt", failed)
    assert trace.input_tokens.tolist() == [472, 1087]
    assert trace.output_tokens.tolist() == [18, 230]


def test_requests_come_sorted_and_ties_keep_their_order(tmp_path):
    rows = [dict(MOONCAKE[0], timestamp=t, output_length=i) for i, t in enumerate([2000, 1000, 2000, 1000])]
    trace = read(tmp_path, json_lines(rows))
    assert trace.output_tokens.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(trace.arrival_seconds, [0, 0, 1, 1])


def test_head(tmp_path):
    trace = read(tmp_path, json_lines(MOONCAKE)).head(1)
    assert (trace.num_requests, trace.prefix_ids.tolist(), trace.prefix_offsets.tolist()) == (1, [0, 7], [0, 2])
    with pytest.raises(TraceError, match="1 to 1"):
        trace.head(0)


def test_blank_lines_are_skipped_and_counted(tmp_path):
    assert read(tmp_path, "\n" + json_lines(MOONCAKE[:1]) + "\n\n").num_requests == 1
    assert "line 4" in refusal(tmp_path, "\n" + json_lines(MOONCAKE[:1]) + '\n{"timestamp": \n')


@pytest.mark.parametrize(
    "text",
    [json_lines(MOONCAKE), json_lines(QWEN), AZURE, BURST_6, BURST_8],
    ids=["mooncake", "qwen", "azure", "burst6", "burst8"],
)
def test_a_file_cut_anywhere_is_refused_or_is_whole_lines_or_carries_a_note(tmp_path, text):
    whole, refused = read(tmp_path, text), 0
    for cut in range(1, len(text) - 1):
        try:
            trace = read(tmp_path, text[:cut])
        except TraceError:
            refused += 1
            continue
        if trace.notes:  # only a CSV without a line end, whose last number may be short
            continue
        n = trace.num_requests
        assert text[cut - 1] in "\n}" or text[cut] == "\n" or text[cut] == "\r"
        assert trace.input_tokens.tolist() == whole.input_tokens[:n].tolist()
        assert trace.output_tokens.tolist() == whole.output_tokens[:n].tolist()
    assert refused > 0.8 * len(text)


def test_the_excerpt_cut_in_half_names_the_line(tmp_path):
    text = EXCERPT.read_text()
    half = text[: len(text) // 2]
    assert half[-1] not in "}\n"
    message = refusal(tmp_path, half)
    assert f"line {half.count(chr(10)) + 1}:" in message
    assert "cut" in message


@pytest.mark.parametrize("text", ["", "\n\n", "   \n"])
def test_an_empty_file(tmp_path, text):
    assert "empty" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "header",
    [AZURE.split("\r")[0] + "\n", BURST_6.split("\n")[0] + "\n", BURST_6.split("5,")[0] + "1,GPT-4,0,0,0,API log\n"],
)
def test_a_header_without_requests(tmp_path, header):
    assert "no request" in refusal(tmp_path, header)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"timestamp": 0}', "no known trace format"),
        ("[1, 2]", "no known trace format"),
        ("a,b,c\n1,2,3", "no known trace format"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}', "`input_length` is 0"),
        ('{"timestamp": 0, "input_length": -4, "output_length": 1, "hash_ids": []}', "`input_length` is -4"),
        ('{"timestamp": 0, "input_length": 1.5, "output_length": 1, "hash_ids": []}', "`input_length` is 1.5"),
        ('{"timestamp": 0, "input_length": true, "output_length": 1, "hash_ids": []}', "`input_length` is True"),
        ('{"timestamp": 0, "input_length": 99999999999, "output_length": 1, "hash_ids": []}', "is 99999999999"),
        ('{"timestamp": 0, "input_length": 5, "output_length": null, "hash_ids": []}', "`output_length` is missing"),
        ('{"timestamp": "now", "input_length": 5, "output_length": 1, "hash_ids": []}', "`timestamp` is 'now'"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1, "hash_ids": []}', "`timestamp` is nan"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}', "have 1 blocks of 512"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": ["x"]}', "list of whole numbers"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": 3}', "list of whole numbers"),
        (AZURE.replace("4808", "many"), "`ContextTokens` is 'many'"),
        (AZURE.replace("4808", "-8"), "`ContextTokens` is '-8'"),
        (AZURE.replace("2023-11-16", "16/11/2023"), "`TIMESTAMP` is '16/11/2023"),
        (AZURE.replace(",10", ",10,11"), "4 columns where the header has 3"),
        (AZURE.replace(",10", ""), "2 columns where the header has 3"),
        (BURST_6.replace("490", "491"), "472 request and 18 response tokens make 490"),
        (BURST_6.replace("Conversation log", "Conversation"), "`Log Type` is 'Conversation'"),
        (BURST_6.replace("\n5,", "\nnoon,"), "`Timestamp` is 'noon'"),
        (BURST_6.replace("ChatGPT", '"ChatGPT'), "CSV"),
    ],
)  # fmt: skip
def test_malformed_lines_say_what_is_wrong(tmp_path, line, reason):
    message = refusal(tmp_path, line)
    assert reason in message
    assert ", line " in message


def test_a_later_line_that_is_not_an_object(tmp_path):
    assert "line 3: expected a JSON object" in refusal(tmp_path, json_lines(MOONCAKE) + "[]\n")


def test_not_text_not_there_not_a_file(tmp_path):
    (tmp_path / "trace").write_bytes(b"\x80\x81\xff")
    with pytest.raises(TraceError, match="not a text file"):
        load_trace(tmp_path / "trace")
    with pytest.raises(TraceError, match="No such file"):
        load_trace(tmp_path / "absent")
    with pytest.raises(TraceError, match="directory"):
        load_trace(tmp_path)


def test_a_named_format_is_not_guessed(tmp_path):
    qwen = [dict(row, hash_ids=[1]) for row in QWEN]  # valid in both formats
    assert read(tmp_path, json_lines(qwen)).prefix_block_tokens == 16
    assert read(tmp_path, json_lines(qwen), format="mooncake").prefix_block_tokens == 512
    with pytest.raises(TraceError, match=r"Expected qwen: chat_id"):
        read(tmp_path, json_lines(MOONCAKE), format="qwen")
    with pytest.raises(TraceError, match="known: qwen, mooncake, azure, burstgpt"):
        read(tmp_path, AZURE, format="azur")


def test_the_packaged_excerpt():
    """Against a reading that shares nothing with the loader."""
    rows = [json.loads(line) for line in EXCERPT.read_text().splitlines()]
    trace = load_trace(EXCERPT)
    assert (trace.format, trace.num_requests, trace.notes) == ("mooncake", 1000, ())
    assert trace.input_tokens.tolist() == [row["input_length"] for row in rows]
    assert trace.output_tokens.tolist() == [row["output_length"] for row in rows]
    assert trace.prefix_ids.tolist() == [block for row in rows for block in row["hash_ids"]]
    assert trace.arrival_seconds[-1] == pytest.approx(330.0)
    assert EXCERPT.stat().st_size < 400_000
    assert "kvcache-ai/Mooncake" in (EXCERPT.parent / "README.md").read_text()


@pytest.mark.skipif(not os.environ.get("KVMEM_TRACES"), reason="KVMEM_TRACES names no folder with the full traces")
@pytest.mark.parametrize(
    ("file", "requests", "inputs", "outputs", "longest"),
    [
        ("mooncake_conversation.jsonl", 12_031, 144.8e6, 4.12e6, 126_195),
        ("azure2023_code.csv", 8_819, 18.1e6, 0.25e6, 7_437),
    ],
)
def test_the_full_traces(file, requests, inputs, outputs, longest):
    trace = load_trace(Path(os.environ["KVMEM_TRACES"]) / file)
    assert trace.num_requests == requests
    assert trace.input_tokens.max() == longest
    assert trace.input_tokens.sum() == pytest.approx(inputs, rel=5e-3)
    assert trace.output_tokens.sum() == pytest.approx(outputs, rel=2e-2)
