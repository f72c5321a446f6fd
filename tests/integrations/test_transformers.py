"""KVMemCache against DynamicCache on tiny random models, on both backends: tokens and scores."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from support_transformers import (
    MAKERS,
    assert_freed,
    assert_same,
    dynamic_cache,
    generate,
    model_of,
    one_thread,
    open_cache,
    prompts,
)
from transformers import PreTrainedModel

__all__ = ["one_thread"]  # a fixture of every test here

MODES = {
    "greedy": {},
    "beam": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MAKERS)
def test_generates_what_the_dynamic_cache_does(name: str, mode: str, backend: str) -> None:
    """A left-padded batch; afterwards every byte is accounted for."""
    model, inputs = model_of(name), prompts(pad=2)
    expected = generate(model, inputs, dynamic_cache(model), **MODES[mode])
    cache = open_cache(model, backend)
    assert_same(generate(model, inputs, cache, **MODES[mode]), expected)
    assert cache.allocator.stats().used_bytes > 0
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_freed(cache.allocator)
    # What the last run left parked must not be read as if it were new.
    assert_same(generate(model, inputs, cache, **MODES[mode]), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "bart"])
def test_generate_does_not_warn_of_how_the_cache_is_given(name: str, mode: str) -> None:
    """``generate(past_key_values=...)``, as examples and documentation have it, with warnings as errors. A library that
    gives the argument another name logs that, or warns, before it takes the old one away.
    """
    model, inputs, said = model_of(name), prompts(), []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("transformers")
    handler.emit = said.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # transformers': once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(model, inputs, open_cache(model, "virtual"), pad_token_id=0, **MODES[mode])
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in said] == []


NOISE = {"llama": 0.2, "gemma3": 0.2, "t5": 0.05, "bart": 0.2}


def drafting(model: PreTrainedModel, noise: float) -> PreTrainedModel:
    """The model with noise in its weights, so that some of its drafts are right and some are wrong."""
    assistant = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for weights in assistant.parameters():
            weights += noise * weights.std() * torch.randn_like(weights) if weights.ndim > 1 else 0
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0
    return assistant


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_assisted_decoding(name: str, sampled: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected drafts are cropped, also after a sliding window has moved past its first tokens."""
    model = model_of(name)
    inputs, mode = prompts(rows=1), {"assistant_model": drafting(model, NOISE[name]), "do_sample": sampled}
    expected = generate(model, inputs, dynamic_cache(model), **mode)
    cache = open_cache(model, backend)
    crops, crop = [], cache.crop
    monkeypatch.setattr(cache, "crop", lambda count: (crops.append(-count), crop(count)))
    assert_same(generate(model, inputs, cache, **mode), expected)
    assert max(crops) > 0, "no draft was rejected, so nothing was cropped"
    assert sampled or min(crops[:-4]) < 4, "no draft was accepted (the last ones are short)"
    cache.reset()
    assert_freed(cache.allocator)


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16_under_inference_mode(name: str, backend: str) -> None:
    model = copy.deepcopy(model_of(name)).to(torch.bfloat16)
    inputs = prompts(pad=3)
    expected = generate(model, inputs, dynamic_cache(model)).sequences
    cache = open_cache(model, backend)
    with torch.inference_mode():  # the first use: what the cache keeps is made here
        assert generate(model, inputs, cache).sequences.tolist() == expected.tolist()
    cache.reset()
    assert generate(model, inputs, cache).sequences.tolist() == expected.tolist()  # and used outside


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_second_turn_and_a_prompt_in_chunks(name: str, backend: str) -> None:
    model, inputs = model_of(name), prompts(rows=2)
    turns = []
    for cache in (dynamic_cache(model), open_cache(model, backend)):
        first = generate(model, inputs, cache, prefill_chunk_size=5).sequences
        more = torch.cat([first, prompts(rows=2, length=9)["input_ids"]], dim=1)
        turns.append(generate(model, {"input_ids": more, "attention_mask": torch.ones_like(more)}, cache))
    assert_same(turns[1], turns[0])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_layers_answer_as_those_of_the_dynamic_cache(name: str, backend: str) -> None:
    """Keys, values, lengths and mask sizes at every step: single tokens, several, and past the window."""
    model = model_of(name)
    ours, theirs = open_cache(model, backend), dynamic_cache(model)
    torch.manual_seed(4)
    assert ours.is_sliding == theirs.is_sliding
    assert not ours.is_compileable
    for count in (3, 1, 1, 9, 1, 1, 14, 1):
        for number, layer in enumerate(ours.layers):
            group = ours.allocator.spec.groups[ours.allocator.spec.group_of(number, "k")]
            shape = (2, group.heads("k", number), count, group.widths("k", number)[0])
            k, v = torch.randn(shape), torch.randn(shape)
            assert ours.get_mask_sizes(count, number) == theirs.get_mask_sizes(count, number)
            got, expected = ours.update(k, v, number), theirs.update(k, v, number)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
            assert ours.get_seq_length(number) == theirs.get_seq_length(number)
            assert layer.get_max_length() == 96
    ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
    ours.batch_select_indices(torch.tensor([3, 0, 0])), theirs.batch_select_indices(torch.tensor([3, 0, 0]))
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        length = other.keys.shape[2]
        assert torch.equal(mine.keys[:, :, -length:], other.keys)
        assert torch.equal(mine.values[:, :, -length:], other.values)


def test_rows_that_start_together_are_read_in_place() -> None:
    """No copy on the virtual backend: what a layer returns lies in the cache's own memory."""
    model = model_of("llama")
    cache = open_cache(model, "virtual")
    k, v = torch.randn(2, 5, 2, 7, 12).unbind()
    keys, _ = cache.update(k, v, 0)
    row_bytes = cache.allocator.rows(0, "k").stride(0) * 4
    assert keys.stride(0) * 4 == row_bytes
    assert keys.untyped_storage().data_ptr() == cache.allocator.rows(0, "k").untyped_storage().data_ptr()


def test_keys_and_values_apart_are_read_as_contiguous_tensors() -> None:
    """``interleave="none"``: nothing lies between the tokens of a row, and several rows differ in their distance only."""
    model = model_of("llama")
    cache = open_cache(model, "virtual", interleave="none")
    k, v = torch.randn(2, 5, 2, 7, 12).unbind()
    keys, values = cache.update(k, v, 1)
    assert torch.equal(keys, k) and torch.equal(values, v) and keys.stride() == values.stride()
    assert all(row.transpose(0, 1).is_contiguous() for row in (*keys, *values))


@pytest.mark.parametrize("name", ["gemma3", "t5"])
def test_generates_the_same_with_keys_and_values_apart(name: str, backend: str) -> None:
    model, inputs = model_of(name), prompts(pad=2)
    cache = open_cache(model, backend, interleave="none")
    expected = generate(model, inputs, dynamic_cache(model), **MODES["beam"])
    assert_same(generate(model, inputs, cache, **MODES["beam"]), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_beams_share_their_past(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork copies no more than its last page or block in each group, and what beams have in common is held once."""
    model = model_of(name)
    cache = open_cache(model, backend, record_ops=True)
    alloc, forks, shared = cache.allocator, [], []
    page_bytes = alloc.pool.page_bytes
    block_bytes = sum(g.block_size * -(-g.bytes_per_token // 16) * 16 for g in alloc.spec.groups)
    most = len(alloc.spec.groups) * page_bytes if backend == "virtual" else block_bytes
    reorder = cache.reorder_cache

    def watched(beams: torch.Tensor) -> None:
        before = alloc.take_ops()
        assert not [op for op in before if op[0] == "copy"], "a step copied something"
        reorder(beams)
        copied = sum(op[4] for op in alloc.take_ops() if op[0] == "copy")
        forks.append(len(beams) - len(set(beams.tolist())))
        assert copied <= forks[-1] * most
        shared.append(alloc.stats().shared_bytes)

    monkeypatch.setattr(cache, "reorder_cache", watched)
    inputs = prompts(rows=1, length=40)
    generate(model, inputs, cache, num_beams=4)
    assert sum(forks) > 0, "no beam ever left another behind"
    assert max(shared) > 0
    assert alloc.stats().num_sequences == 4
    assert alloc.check() == []
