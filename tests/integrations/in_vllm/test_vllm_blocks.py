"""Keys of vLLM's blocks: equal where the bytes are equal, different where anything differs that they depend on."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace as Thing
from typing import Any

import pytest
import torch

from kvmem import SpecError
from kvmem.integrations.vllm.blocks import (
    Report,
    chain_of,
    groups_of,
    names_images,
    ranks_of,
    storage_of,
    tier_key,
)
from kvmem.integrations.vllm.config import Options
from kvmem.integrations.weights import weights_name
from kvmem.tiers.keys import BlockKeys

KEYS = BlockKeys(b"test", 4)


class FullAttentionSpec:
    sliding_window = None

    def __init__(self, block_size: int = 4, page_size_bytes: int = 64) -> None:
        self.block_size, self.page_size_bytes = block_size, page_size_bytes

    def __repr__(self) -> str:
        return f"FullAttentionSpec({self.block_size}, {self.page_size_bytes})"


class SlidingWindowSpec(FullAttentionSpec):
    sliding_window = 6  # type: ignore[assignment]


class MambaSpec(FullAttentionSpec):
    pass


def cache_config(*specs: Any, **changed: Any) -> Any:
    groups = [
        Thing(layer_names=[f"{g}.0", f"{g}.1"], kv_cache_spec=spec, is_eagle_group=False, host_resident=False)
        for g, spec in enumerate(specs)
    ]
    tensors = [Thing(layers=["0.0", "1.0"][: len(specs)], offset=0, layer_stride=0, block_stride=64),
               Thing(layers=["0.1", "1.1"][: len(specs)], offset=640, layer_stride=0, block_stride=64)]  # fmt: skip
    return Thing(kv_cache_groups=groups, kv_cache_tensors=tensors, kv_cache_layout="LBHNC", **changed)


def engine(**changed: Any) -> Any:
    given = {"model": "org/model", "revision": "abc", "dtype": torch.float32, "quantization": None, "cache_dtype": "auto",
             "config": {"rope_theta": 1e4, "_name_or_path": "anywhere"}, "ranks": 1, "pipeline": 1, "max_len": 4096,
             "load_format": "auto", "images": None} | changed  # fmt: skip
    model = Thing(model=given["model"], revision=given["revision"], dtype=given["dtype"], quantization=given["quantization"],
                  max_model_len=given["max_len"], multimodal_config=Thing(mm_processor_kwargs=given["images"]),
                  hf_config=Thing(to_dict=lambda: given["config"]))  # fmt: skip
    parallel = Thing(tensor_parallel_size=given["ranks"], pipeline_parallel_size=given["pipeline"],
                     decode_context_parallel_size=1, prefill_context_parallel_size=1)  # fmt: skip
    return Thing(model_config=model, parallel_config=parallel, cache_config=Thing(cache_dtype=given["cache_dtype"]),
                 load_config=Thing(load_format=given["load_format"]))  # fmt: skip


def test_the_fingerprint_covers_what_the_bytes_depend_on() -> None:
    plain = cache_config(FullAttentionSpec())
    other_layout = cache_config(FullAttentionSpec())
    other_layout.kv_cache_layout = "BLHNC"
    cases = {
        "plain": (engine(), plain, "0.32.0", ["cpu", "vec"], ""),
        "model": (engine(model="org/other"), plain, "0.32.0", ["cpu", "vec"], ""),
        "revision": (engine(revision="abd"), plain, "0.32.0", ["cpu", "vec"], ""),
        "named": (engine(), plain, "0.32.0", ["cpu", "vec"], "mine"),
        "dtype": (engine(dtype=torch.bfloat16), plain, "0.32.0", ["cpu", "vec"], ""),
        "quantization": (engine(quantization="awq"), plain, "0.32.0", ["cpu", "vec"], ""),
        "cache dtype": (engine(cache_dtype="fp8"), plain, "0.32.0", ["cpu", "vec"], ""),
        "rope": (engine(config={"rope_theta": 5e5}), plain, "0.32.0", ["cpu", "vec"], ""),
        "block size": (engine(), cache_config(FullAttentionSpec(8)), "0.32.0", ["cpu", "vec"], ""),
        "page": (engine(), cache_config(FullAttentionSpec(4, 128)), "0.32.0", ["cpu", "vec"], ""),
        "groups": (engine(), cache_config(FullAttentionSpec(), SlidingWindowSpec()), "0.32.0", ["cpu", "vec"], ""),
        "layout": (engine(), other_layout, "0.32.0", ["cpu", "vec"], ""),
        "version": (engine(), plain, "0.33.0", ["cpu", "vec"], ""),
        "longest request": (engine(max_len=8192), plain, "0.32.0", ["cpu", "vec"], ""),
        "random weights": (engine(load_format="dummy"), plain, "0.32.0", ["cpu", "vec"], ""),
        "pictures": (engine(images={"max_pixels": 9}), plain, "0.32.0", ["cpu", "vec"], ""),
        "isa": (engine(), plain, "0.32.0", ["cpu", "amx"], ""),
        "ranks": (engine(ranks=2), plain, "0.32.0", ["cpu", "vec"], ""),
    }
    seen = {name: ranks_of(*case) for name, case in cases.items()}
    everything = [rank for ranks in seen.values() for rank in ranks]
    assert len(set(everything)) == len(everything) == len(cases) + 1  # two ranks in one of them
    assert seen["plain"] == ranks_of(
        engine(config={"rope_theta": 1e4, "_name_or_path": "elsewhere"}), *cases["plain"][1:]
    )


def test_weights_that_lie_in_files_are_named_by_them(tmp_path: Any) -> None:
    """A folder, a file, and an adapter."""

    def found(path: Any, adapter: int) -> list[Any]:
        adapted = request(list(range(8)), lora_request=lora("x", str(path), number=adapter))
        config = engine(model=str(path), revision=None)
        return [ranks_of(config, cache_config(FullAttentionSpec()), "0", [], ""), names(adapted, list(range(8)))]

    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"weights")
    before = [found(path, 1) for path in (tmp_path, weights)]
    assert before == [found(path, 1) for path in (tmp_path, weights)]
    weights.write_bytes(b"other weights")
    after = [found(path, 2) for path in (tmp_path, weights)]  # the engine loads an adapter again under another number
    assert all(
        one != other for old, new in zip(before, after, strict=True) for one, other in zip(old, new, strict=True)
    )


def test_weights_of_a_hub_are_named_by_the_commit(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers no longer keeps the commit in a model's config, and a branch moves."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub keeps the cache that is read")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    named = [weights_name("org/model", None)]
    repository = tmp_path / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs" / "main").write_text(commit)
        named += [weights_name("org/model", None), weights_name("org/model", "a" * 40)]
        assert weights_name("org/model", "main") == named[-2]
    assert len(set(named)) == 3 and named[1] == named[2] == named[4]


def request(tokens: list[int], **given: Any) -> Any:
    return Thing(**({"all_token_ids": tokens, "prompt_embeds": None, "prompt_is_token_ids": None, "resumable": False,
                     "lora_request": None, "cache_salt": None, "mm_features": []} | given))  # fmt: skip


def lora(name: str, path: str, inplace: bool = False, number: int = 1) -> Any:
    return Thing(lora_name=name, lora_path=path, load_inplace=inplace, lora_int_id=number)


def image(offset: int, identifier: str) -> Any:
    return Thing(mm_position=Thing(offset=offset), modality="image", identifier=identifier)


def names(one: Any, tokens: list[int]) -> list[Any]:
    chain = chain_of(one, KEYS)
    assert chain is not None
    chain.extend(tokens, len(tokens))
    return [chain.name(0, 4, block) for block in range(len(tokens) // 4)]


def test_names_cover_tokens_salt_adapter_and_what_is_no_token() -> None:
    tokens = list(range(16))
    different = [
        request(tokens), request(tokens, cache_salt="a"), request(tokens, cache_salt="b"),
        request(tokens, lora_request=lora("x", "/x")), request(tokens, lora_request=lora("x", "/y")),
        request(tokens, lora_request=lora("y", "/x")), request(tokens, mm_features=[image(1, "cat")]),
        request(tokens, mm_features=[image(1, "dog")]), request(tokens, mm_features=[image(2, "cat")]),
    ]  # fmt: skip
    found = [names(one, tokens) for one in different]
    for block in range(4):
        assert len({n[block] for n in found}) == len(different)
    assert names(request(tokens, mm_features=[image(9, "cat")]), tokens)[:2] == found[0][:2]  # it begins behind them
    changed = [0, 1, 2, 99, *tokens[4:]]
    assert not set(names(request(changed), changed)) & set(found[0])
    for unknown in ({"prompt_embeds": object()}, {"prompt_is_token_ids": [True]}, {"resumable": True},
                    {"lora_request": lora("x", "/x", inplace=True)}):  # fmt: skip
        assert chain_of(request(tokens, **unknown), KEYS) is None
    assert len({tier_key(rank, (g, b"d")) for rank in (b"a" * 32, b"b" * 32) for g in (0, 1)}) == 4


def test_images_that_are_only_numbered_have_no_name() -> None:
    def config(caches: tuple[float, bool] | None) -> Any:
        images = None if caches is None else Thing(mm_processor_cache_gb=caches[0])
        cache = Thing(enable_prefix_caching=caches is not None and caches[1])
        return Thing(model_config=Thing(multimodal_config=images), cache_config=cache)

    assert [names_images(config(c)) for c in (None, (4.0, False), (0.0, True), (0.0, False))] == [
        True,
        True,
        True,
        False,
    ]


def test_an_adapter_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, revision: str | None) -> str:
        raise PermissionError(path)

    monkeypatch.setattr("kvmem.integrations.vllm.blocks.weights_name", refused)
    assert chain_of(request([1], lora_request=lora("x", "/unreadable")), KEYS) is None


def test_a_chain_grows_with_its_tokens(rng: random.Random) -> None:
    tokens = [rng.randrange(1000) for _ in range(50)]
    chain = chain_of(request(tokens), KEYS)
    assert chain is not None
    for stop in sorted(rng.randint(0, 50) for _ in range(9)):
        chain.extend(tokens, stop)
    chain.extend(tokens, 50)
    assert [chain.name(0, 4, block) for block in range(12)] == names(request(tokens), tokens)
    assert chain.name(0, 8, 2) == (0, chain.name(0, 4, 5)[1])  # a group with larger blocks: the same tokens


def test_groups_are_read_from_vllms_config_and_others_are_refused() -> None:
    full, window = groups_of(cache_config(FullAttentionSpec(), SlidingWindowSpec()))
    assert (full.window_tokens, window.window_tokens, full.payload_bytes) == (0, 6, 128)
    assert full.layers["0.1"] == (640, 64, 64) and window.layers["1.0"] == (0, 64, 64)
    assert [window.first_needed(n) for n in (0, 5, 9, 12, 13)] == [0, 0, 1, 1, 2]
    with pytest.raises(SpecError, match="MambaSpec"):
        groups_of(cache_config(FullAttentionSpec(), MambaSpec()))
    drafting = cache_config(FullAttentionSpec())
    drafting.kv_cache_groups[0].is_eagle_group = True
    with pytest.raises(SpecError, match="draft layers"):
        groups_of(drafting)
    with pytest.raises(SpecError, match="no KV cache"):
        groups_of(cache_config())
    with pytest.raises(SpecError, match="pipeline_parallel_size is 2"):
        ranks_of(engine(pipeline=2), cache_config(FullAttentionSpec()), "0", [], "")
    with pytest.raises(SpecError, match="2 allocations"):
        storage_of({"a": torch.zeros(4), "b": torch.zeros(4)})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"tier": []}, "tier is not known"),
        ({"memory": "lots"}, "memory"),
        ({"layerwise": 1}, "layerwise"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"staging": "many"}, "staging"),
        ({"tiers": {"type": "host"}}, "must be a list"),
        ({"tiers": [{"type": "tape"}]}, "type is host, disk"),
        ({"tiers": [{"capacity": 1}]}, "type is host, disk"),
        ({"tiers": [{"type": "host"}, {"type": "host"}]}, "two of type host"),
    ],
)
def test_options_that_are_wrong(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        Options.of(given)


def test_tiers_are_opened_by_type(tmp_path: Any) -> None:
    disk = {"type": "disk", "path": str(tmp_path), "capacity": "1MiB"}
    options = Options.of({"tiers": [{"type": "host", "capacity": "1MiB"}, disk]})
    writers = options.open_tiers("rank-1", 1000)
    (reader,) = options.open_tiers("rank-1", 1000, read_only=True)
    assert [tier.name for tier in (*writers, reader)] == ["host", "disk", "disk"] and (tmp_path / "rank-1").is_dir()
    writers[1].put([b"k" * 32], [memoryview(b"x" * 10)])
    until = time.monotonic() + 10
    while not (found := reader.contains([b"k" * 32])) and time.monotonic() < until:
        pass  # a reader looks again after ten times as long as it took
    assert found == 1
    for tier in (*writers, reader):
        tier.close()
    for wrong, complaint in (
        ({"type": "host"}, "capacity"),
        ({"type": "host", "capacity": 1}, "one block takes"),
        ({"type": "disk"}, "capacity|path"),
        ({"type": "no.such.module:Tier"}, "no.such.module"),
        ({"type": "collections:OrderedDict"}, "is no kvmem.tiers.Tier"),
    ):
        with pytest.raises(SpecError, match=complaint):
            Options.of({"tiers": [wrong]}).open_tiers("rank-0", 1000)


def test_reports_of_ranks_are_added() -> None:
    one, other = Report(), Report()
    assert not one
    one.saved.update([(0, b"a")])
    other.saved.update([(0, b"a"), (0, b"b")])
    other.requests.add("r")
    one.add(other)
    assert one and one.saved[(0, b"a")] == 2 and one.saved[(0, b"b")] == 1 and one.requests == {"r"}
