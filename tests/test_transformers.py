"""KVMemCache against DynamicCache on tiny random models, on both backends: tokens, scores and memory."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvmem

pytest.importorskip("transformers", minversion="5.23", reason="needs the extra kvmem[transformers]")

from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from kvmem.transformers import KVMemCache, KVMemEncoderDecoderCache

BACKENDS = ["virtual", "paged"]
VOCABULARY = 97
NEW_TOKENS = 24  # with 17 of prompt: several blocks, several pages, and far past the sliding window
# No model may stop early, so every mode compares the same number of tokens, and none may repeat one token for ever, as
# random models with tied embeddings do.
IDS = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# Scores may differ in the last bits, as attention reads memory with other strides.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are tiny: several threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_llama(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, max_position_embeddings=512, **IDS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def make_gemma() -> Gemma3ForCausalLM:
    """Three sliding layers, then a full one; the window is shorter than the prompt."""
    torch.manual_seed(1)
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3TextConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
        head_dim=16, sliding_window=11, layer_types=kinds, initializer_range=0.2, max_position_embeddings=512, **IDS,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def make_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(2)
    config = T5Config(
        d_model=48,
        d_kv=12,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=3.0,
        **IDS,
    )
    return T5ForConditionalGeneration(config).eval()


def make_bart() -> BartForConditionalGeneration:
    torch.manual_seed(3)
    config = BartConfig(
        d_model=48, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=256, decoder_start_token_id=2,
        forced_eos_token_id=None, init_std=0.3, **IDS,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": make_llama,
    "gemma3": make_gemma,
    "t5": make_t5,
    "bart": make_bart,
}
_models: dict[str, PreTrainedModel] = {}


def model_of(name: str) -> PreTrainedModel:
    if name not in _models:
        _models[name] = MAKERS[name]()
    return _models[name]


def prompts(rows: int = 3, length: int = 17, pad: int = 0) -> dict[str, torch.Tensor]:
    """A batch of random prompts; row i is padded on the left by ``i * pad`` tokens."""
    torch.manual_seed(rows + length)
    ids = torch.randint(3, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : row * pad] = 0
        mask[row, : row * pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def open_cache(model: PreTrainedModel, backend: str, **options: Any) -> KVMemCache | KVMemEncoderDecoderCache:
    """Pages and blocks far smaller than a prompt, and ``check()`` after every call."""
    kind = KVMemEncoderDecoderCache if model.config.is_encoder_decoder else KVMemCache
    sizes = {"memory": "16MiB", "max_batch": 12, "max_tokens": 96, "page_bytes": 4096, "debug": True}
    return kind(model, backend=backend, **(sizes | options))


def dynamic_cache(model: PreTrainedModel) -> DynamicCache | EncoderDecoderCache:
    if model.config.is_encoder_decoder:
        # Not from the config: for T5 that counts the encoder's layers.
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=model.config)


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any, **mode: Any) -> Any:
    torch.manual_seed(11)  # for sampling: both caches draw the same numbers
    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_scores=True,
        **mode,
    )  # fmt: skip


def assert_same(got: Any, expected: Any) -> None:
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert len(got.scores) == len(expected.scores)
    for step, (a, b) in enumerate(zip(got.scores, expected.scores, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda m, step=step: f"step {step}: {m}", **CLOSE)


def assert_freed(alloc: kvmem.Allocator) -> None:
    stats = alloc.stats()
    assert alloc.check() == []
    assert (stats.used_bytes, stats.shared_bytes, stats.num_sequences) == (0, 0, 0)


MODES = {
    "greedy": {},
    "beam": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_second_turn_and_a_prompt_in_chunks(name: str, backend: str) -> None:
    model, inputs = model_of(name), prompts(rows=2)
    turns = []
    for cache in (dynamic_cache(model), open_cache(model, backend)):
        first = generate(model, inputs, cache, prefill_chunk_size=5).sequences
        more = torch.cat([first, prompts(rows=2, length=9)["input_ids"]], dim=1)
        turns.append(generate(model, {"input_ids": more, "attention_mask": torch.ones_like(more)}, cache))
    assert_same(turns[1], turns[0])


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gemma3", "t5"])
def test_generates_the_same_with_keys_and_values_apart(name: str, backend: str) -> None:
    model, inputs = model_of(name), prompts(pad=2)
    cache = open_cache(model, backend, interleave="none")
    expected = generate(model, inputs, dynamic_cache(model), **MODES["beam"])
    assert_same(generate(model, inputs, cache, **MODES["beam"]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_beams_use_less_memory_than_rows_of_their_own(backend: str) -> None:
    model, inputs = model_of("llama"), prompts(rows=1, length=64)
    cache = open_cache(model, backend)
    generate(model, inputs, cache, num_beams=4)
    stats, tokens = cache.allocator.stats(), 4 * (64 + NEW_TOKENS - 1)
    alone = tokens * cache.allocator.spec.bytes_per_token
    assert stats.used_bytes < 0.8 * alone, f"{stats.used_bytes} bytes for what takes {alone} unshared"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_gives_back_what_it_has_passed(backend: str) -> None:
    model = model_of("gemma3")
    cache = open_cache(model, backend, max_tokens=512, max_batch=1)
    spec = cache.allocator.spec
    sliding = next(g for g in spec.groups if g.window_tokens)
    generate(model, prompts(rows=1, length=400), cache)
    tokens = cache.get_seq_length()
    full = sum(g.bytes_per_token for g in spec.groups if not g.window_tokens) * tokens
    window = sliding.bytes_per_token * (sliding.window_tokens + 2 * sliding.block_size)
    assert full < cache.allocator.stats().used_bytes <= full + window


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_out_of_memory_leaves_the_cache_usable(name: str, backend: str) -> None:
    model, inputs = model_of(name), prompts(rows=2, length=30)
    expected = generate(model, inputs, dynamic_cache(model))
    fits, budget, said = False, 1, ""
    while not fits:  # one page more each time, so that it fails at every place where it can
        budget += 1
        cache = open_cache(model, backend, memory=budget * 4096)
        try:
            assert_same(generate(model, inputs, cache), expected)
            fits = True
        except kvmem.OutOfMemory as error:
            said = str(error)
        assert fits or "set_memory" in said
        assert cache.allocator.check() == []
        cache.reset()
        assert_freed(cache.allocator)
        if not fits and budget % 4 == 0:
            cache.allocator.set_memory("1MiB")
            assert_same(generate(model, inputs, cache), expected)
    assert budget > 8


def test_out_of_memory_in_a_step_keeps_the_tokens_before_it() -> None:
    """Free something and go on: the step that failed runs again."""
    model, inputs = model_of("llama"), prompts(rows=1, length=80)
    full, small = dynamic_cache(model), open_cache(model, "virtual", memory=6 * 4096)
    with torch.no_grad():
        for cache in (full, small):
            model(inputs["input_ids"][:, :40], past_key_values=cache)
        with pytest.raises(kvmem.OutOfMemory):
            model(inputs["input_ids"][:, 40:], past_key_values=small)
        assert small.get_seq_length() == 40
        small.allocator.set_memory("1MiB")
        outputs = [model(inputs["input_ids"][:, 40:], past_key_values=cache).logits for cache in (full, small)]
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


def test_fork_without_memory_changes_nothing() -> None:
    model, inputs = model_of("llama"), prompts(rows=1, length=40)
    cache = open_cache(model, "virtual", memory=7 * 4096)
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=cache)
        keys = cache.layers[0].keys.clone()
        with pytest.raises(kvmem.OutOfMemory, match="fork"):
            cache.batch_repeat_interleave(12)
    assert cache.allocator.stats().num_sequences == 1
    assert torch.equal(cache.layers[0].keys, keys)
    assert cache.allocator.check() == []


def test_refusals_say_what_would_fit() -> None:
    model, inputs = model_of("llama"), prompts(rows=2)
    with pytest.raises(kvmem.SpecError, match=r"batch of 8, beams .* made for 4"):
        generate(model, inputs, open_cache(model, "virtual", max_batch=4), num_beams=4)
    cache = open_cache(model, "virtual", max_tokens=30)
    with pytest.raises(kvmem.SpecError, match=r"it can hold 30 \(max_tokens\), so at most 0 more"):
        generate(model, inputs, cache)
    with pytest.raises(kvmem.SpecError, match=r"torch.float32 on cpu; .* torch.bfloat16"):
        generate(model, inputs, open_cache(model, "virtual", dtype=torch.bfloat16))
    with pytest.raises(kvmem.SpecError, match="carries no gradients"):
        model(**inputs, past_key_values=open_cache(model, "virtual"))
    with pytest.raises(kvmem.SpecError, match="KVMemEncoderDecoderCache"):
        KVMemCache(model_of("t5"), memory="1MiB", max_batch=1, max_tokens=16)
    with pytest.raises(kvmem.SpecError, match="use KVMemCache"):
        KVMemEncoderDecoderCache(model, memory="1MiB", max_batch=1, max_tokens=16)
    with pytest.raises(kvmem.SpecError, match="max_tokens: got 1 and None"):
        KVMemCache(model, memory="1MiB", max_batch=1)
    latent = kvmem.Component("ckv", width=32, dtype=torch.float32)
    alloc = kvmem.Allocator(
        kvmem.CacheSpec(components=[latent], num_layers=2), memory="1MiB", max_sequences=2, max_tokens=16
    )
    with pytest.raises(kvmem.SpecError, match="stores ckv; the attention of transformers stores k and v"):
        KVMemCache(alloc)
    with pytest.raises(kvmem.SpecError, match="max_batch: an allocator brings its own"):
        KVMemCache(alloc, max_batch=3)


def test_crop() -> None:
    model, inputs = model_of("gemma3"), prompts(rows=1, length=30)
    cache = open_cache(model, "paged")
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match="give -3 to remove 3"):
            cache.crop(3)
        cache.crop(-2)
        assert cache.get_seq_length() == 28
        model(inputs["input_ids"][:, :1], past_key_values=cache)
        with pytest.raises(kvmem.SpecError, match="sliding window of 11 has dropped"):
            cache.crop(-25)
        assert cache.get_seq_length() == 29
    assert cache.allocator.check() == []


def test_a_step_that_stops_half_way_is_noticed_and_undone() -> None:
    model, inputs = model_of("llama"), prompts(rows=1)
    cache, other = open_cache(model, "virtual"), dynamic_cache(model)
    k = torch.randn(1, 2, 1, 12)
    with torch.no_grad():
        for c in (cache, other):
            model(inputs["input_ids"], past_key_values=c)
        cache.update(k, k, 0)  # and layers 1 and 2 never follow
        with pytest.raises(kvmem.SpecError, match="stopped half-way"):
            model(inputs["input_ids"][:, :2], past_key_values=cache)
        cache.crop(-(cache.get_seq_length() - 17))
        logits = [model(inputs["input_ids"][:, :2], past_key_values=c).logits for c in (cache, other)]
    torch.testing.assert_close(logits[0], logits[1], **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_computed_once_is_continued_twice(name: str, backend: str) -> None:
    """deepcopy is how transformers users reuse a prefix; here it shares the memory."""
    model = model_of(name)
    system, alloc = prompts(rows=1, length=33)["input_ids"], None
    cache = open_cache(model, backend)
    with torch.no_grad():
        model(system, past_key_values=cache)
    alloc = cache.allocator
    alone = alloc.stats().used_bytes
    for length in (4, 7):
        turn = torch.cat([system, prompts(rows=1, length=length)["input_ids"]], dim=1)
        inputs = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
        branch = copy.deepcopy(cache)
        assert alloc.stats().used_bytes < 1.5 * alone
        assert_same(generate(model, inputs, branch), generate(model, inputs, dynamic_cache(model)))
        branch.reset()
    assert cache.get_seq_length() == 33
    assert alloc.stats().used_bytes <= alone  # less where the fork let a window move on
    assert alloc.check() == []


def test_rows_are_freed_with_the_cache() -> None:
    model, inputs = model_of("llama"), prompts(rows=2)
    spec = kvmem.CacheSpec.from_config(model.config, dtype=torch.float32)
    alloc = kvmem.Allocator(spec, memory="4MiB", max_sequences=4, max_tokens=96)
    other = alloc.sequence()
    other.extend(20)
    cache = KVMemCache(alloc)
    generate(model, inputs, cache)
    assert alloc.stats().num_sequences == 3
    del cache
    gc.collect()
    assert alloc.stats().num_sequences == 1
    with KVMemCache(alloc) as cache:
        generate(model, inputs, cache)
        assert alloc.stats().num_sequences == 3
    assert alloc.stats().parked_bytes == 0
    other.free()
    assert_freed(alloc)


def test_it_is_imported_only_when_asked_for() -> None:
    code = "import sys, kvmem; assert 'transformers' not in sys.modules; from kvmem.transformers import KVMemCache"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
