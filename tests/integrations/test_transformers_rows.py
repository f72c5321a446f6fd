"""Random calls of KVMemCache against transformers' DynamicCache: rows that come and go, steps that stop half-way.

The reference keeps every token in every layer; what a sliding layer must show is the end of that. It is made anew when
no row or no token is left, where DynamicCache cannot go on and KVMemCache is as new."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from support_transformers import model_of, open_cache
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig

import kvmem
from kvmem.integrations.transformers import KVMemCache

WINDOW = 5
HEADS, WIDTH = 1, 8


def llama() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=HEADS, head_dim=WIDTH
    )


def gemma(kinds: str) -> Gemma3TextConfig:
    names = {"s": "sliding_attention", "f": "full_attention"}
    return Gemma3TextConfig(
        hidden_size=16, num_hidden_layers=len(kinds), num_attention_heads=2, num_key_value_heads=HEADS, head_dim=WIDTH,
        sliding_window=WINDOW, layer_types=[names[kind] for kind in kinds],
    )  # fmt: skip


CONFIGS = {"full": llama(), "hybrid": gemma("ssf"), "sliding": gemma("ss"), "full first": gemma("fss")}


class Twins:
    """A KVMemCache and what it must hold."""

    def __init__(self, kind: str, backend: str, rng: random.Random) -> None:
        self.rng, config = rng, CONFIGS[kind]
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.windows = [WINDOW if name == "sliding_attention" else None for name in types]
        self.cache = KVMemCache(
            config, backend=backend, memory=rng.choice([16, 40, 400]) * 4096, max_batch=6, max_tokens=60, page_bytes=4096,
            dtype=torch.float32, debug=True,
        )  # fmt: skip
        self.expected = DynamicCache()
        self.rows = 0
        self.floor: int | None = None  # while recording: crop() must be able to go back to here

    @property
    def length(self) -> int:
        return int(self.expected.get_seq_length()) if self.rows else 0

    def renew(self) -> None:
        if self.rows == 0 or self.length == 0:
            self.expected, self.rows = DynamicCache(), 0
        if self.floor is not None:
            self.floor = min(self.floor, self.length)

    def check(self) -> None:
        """The same length, and in each layer the tokens that the next query sees."""
        assert self.cache.get_seq_length() == self.length
        for layer, window in enumerate(self.windows):
            held = self.cache.layers[layer]
            assert held.get_seq_length() == self.length
            if self.length == 0:
                assert held.keys is None and held.values is None
                continue
            seen = self.length if window is None else min(self.length, window - 1)
            full = self.expected.layers[layer]
            assert torch.equal(held.keys, full.keys[:, :, self.length - seen :])
            assert torch.equal(held.values, full.values[:, :, self.length - seen :])
        assert self.cache.allocator.check() == []

    def new_states(self, rows: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.randn(rows, HEADS, count, WIDTH), torch.randn(rows, HEADS, count, WIDTH)) for _ in self.windows]

    def step(self, states: list[tuple[torch.Tensor, torch.Tensor]], layers: range) -> None:
        """Both caches take one step in ``layers``; ``OutOfMemory`` before the reference has."""
        for layer in layers:
            before, count = self.cache.layers[layer].get_seq_length(), states[layer][0].shape[2]
            found = self.cache.update(*states[layer], layer)
            full = self.expected.update(*states[layer], layer)
            window = self.windows[layer]
            seen = before + count if window is None else min(before, window - 1) + count
            for got, want in zip(found, full, strict=True):
                assert torch.equal(got, want[:, :, before + count - seen :])

    # ---- one random call each ----

    def update(self) -> None:
        rows = self.rows or self.rng.randint(1, 4)
        try:
            self.step(self.new_states(rows, self.rng.choice([1, 1, 2, 3, 9])), range(len(self.windows)))
            self.rows = rows
        except (kvmem.OutOfMemory, kvmem.SpecError) as error:  # max_tokens
            assert "step stopped" not in str(error)

    def other_batch(self) -> None:
        if self.rows:
            with pytest.raises(kvmem.SpecError, match="reset"):
                self.cache.update(*self.new_states(self.rows + 1, 2)[0], 0)
        with pytest.raises(kvmem.SpecError, match="batch of 0"):
            self.cache.update(*self.new_states(0, 2)[0], 0)

    def arrange(self, ours: Any, theirs: Any, rows: int) -> None:
        try:
            ours()
        except kvmem.OutOfMemory:
            return
        except kvmem.SpecError as error:
            assert rows > 6 and "max_batch" in str(error)
            return
        if self.rows:
            theirs()
            self.rows = rows

    def select(self) -> None:
        kept = [self.rng.randrange(self.rows) for _ in range(self.rng.randint(0, 4))] if self.rows else [0]
        mask = [self.rng.random() < 0.5 for _ in range(self.rows)]
        negative = [row - self.rows for row in kept]
        form, count = self.rng.choice(
            [
                (kept, len(kept)),
                (tuple(kept), len(kept)),
                (torch.tensor(kept, dtype=torch.long), len(kept)),
                (torch.tensor(negative, dtype=torch.int32), len(kept)),
                (mask, sum(mask)),
                (torch.tensor(mask, dtype=torch.bool), sum(mask)),
            ]
        )
        theirs = list(form) if isinstance(form, tuple) else form
        self.arrange(
            lambda: self.cache.batch_select_indices(form), lambda: self.expected.batch_select_indices(theirs), count
        )

    def repeat(self) -> None:
        times = self.rng.choice([0, 1, 2, 3])
        self.arrange(
            lambda: self.cache.batch_repeat_interleave(times),
            lambda: self.expected.batch_repeat_interleave(times),
            times * self.rows,
        )

    def reorder(self) -> None:
        count = self.rng.choice([0, 1, self.rows, self.rows])
        order = torch.tensor(
            [self.rng.randrange(self.rows) for _ in range(count)] if self.rows else [], dtype=torch.long
        )
        self.arrange(lambda: self.cache.reorder_cache(order), lambda: self.expected.reorder_cache(order), len(order))

    def no_such_rows(self) -> None:
        if self.rows == 0:
            return
        for wrong in (torch.tensor([self.rows]), [-self.rows - 1], torch.tensor([True] * (self.rows + 1)), ["a"], [0.5],
                      torch.tensor([[0]]), [[0], [0, 0]], slice(1), 0):  # fmt: skip
            with pytest.raises(kvmem.SpecError, match="indices: got"):
                self.cache.batch_select_indices(wrong)
        for times in (-1, "x", torch.tensor([1] * (self.rows + 1)) if self.rows > 1 else -3):
            with pytest.raises(kvmem.SpecError, match="repeats: got"):
                self.cache.batch_repeat_interleave(times)

    def crop(self) -> None:
        count = self.rng.choice([0, 1, 2, 7, 100])
        try:
            self.cache.crop(-count)
        except kvmem.SpecError as error:
            assert "sliding window" in str(error)
            assert self.floor is None or self.length - count < self.floor, "what was recorded cannot be taken back"
            return
        if self.rows and count:
            self.expected.crop(-min(count, self.length))
        if self.floor is not None:
            self.floor = self.length

    def record(self) -> None:
        """From here on, whatever becomes of the rows."""
        self.cache.activate_past_recording()
        if self.floor is None:
            self.floor = self.length

    def reset(self) -> None:
        self.cache.reset()
        self.rows = 0

    def copied(self) -> None:
        try:
            again = copy.deepcopy(self.cache)
        except kvmem.OutOfMemory:
            return
        if self.rng.random() < 0.5:
            self.cache.reset()
            self.cache = again
        else:  # what the copy does is nothing to the original
            if not any(self.windows):
                again.crop(-1)  # where windows have moved on, that is refused
            again.reset()

    def stopped(self) -> None:
        """Some layers take a step that others never see: it goes on, or is taken back whole; nothing else moves."""
        rows, layers = self.rows or self.rng.randint(1, 4), len(self.windows)
        done = self.rng.randint(1, layers - 1)
        states = self.new_states(rows, self.rng.choice([1, 2, 9]))
        before = copy.deepcopy(self.expected)
        try:
            self.step(states, range(done))
        except (kvmem.OutOfMemory, kvmem.SpecError):
            return
        self.rows, held = rows, self.cache.get_seq_length()
        added = states[0][0].shape[2]
        for attempt in (lambda: self.cache.update(*states[0], 0), lambda: copy.deepcopy(self.cache),
                        lambda: self.cache.reorder_cache([0, 0])):  # fmt: skip
            with pytest.raises(kvmem.SpecError, match="stopped half-way"):
                attempt()
        assert [x.get_seq_length() for x in self.cache.layers] == [held] * done + [held - added] * (layers - done)
        if self.rng.random() < 0.3:
            self.step(states, range(done, layers))
            return
        if added > 1 and self.rng.random() < 0.5:  # a part of it first
            self.cache.crop(-1)
            with pytest.raises(kvmem.SpecError, match="stopped half-way"):
                self.cache.update(*states[0], 0)
            added -= 1
        self.cache.crop(-added)
        self.expected = before
        if self.floor is not None:
            self.floor = self.length

    def broken(self) -> None:
        """A layer fails while it writes, or while it reads: the layer, and a step that it began, are as before."""
        layer = self.cache.layers[self.rng.randrange(len(self.windows))]
        name = self.rng.choice(["_write", "_read"])
        rows = self.rows or self.rng.randint(1, 4)
        states = self.new_states(rows, self.rng.choice([1, 3]))

        def fail(*_: object) -> None:
            raise RuntimeError("no memory for activations")

        setattr(layer, name, fail)
        with pytest.raises((RuntimeError, kvmem.KVMemError)):
            layer.update(*states[0])
        delattr(layer, name)


CALLS = ["update"] * 6 + ["select", "repeat", "reorder", "crop", "copied", "stopped", "stopped", "broken"] + [
    "other_batch", "no_such_rows", "reset", "record",
]  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_random_calls_hold_what_dynamic_cache_holds(kind: str, backend: str, seed: int) -> None:
    for run in range(6):
        rng = random.Random(f"{seed} {run}")
        torch.manual_seed(rng.randrange(2**31))
        twins = Twins(kind, backend, rng)
        for number in range(60):
            name = rng.choice(CALLS)
            getattr(twins, name)()
            twins.renew()
            try:
                twins.check()
            except AssertionError as error:
                raise AssertionError(f"run {run}, call {number}, {name}: {error}") from error
        twins.cache.reset()
        assert twins.cache.allocator.stats().num_sequences == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bart"])
def test_a_batch_that_lost_all_its_rows_starts_again(name: str, backend: str) -> None:
    model = model_of(name)
    ids = torch.randint(3, 97, (3, 20))
    encoder = {"decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {}
    empty = [
        lambda cache: cache.batch_select_indices(torch.tensor([False, False, False])),
        lambda cache: cache.batch_select_indices([]),
        lambda cache: cache.batch_repeat_interleave(0),
        lambda cache: cache.reorder_cache(torch.tensor([], dtype=torch.long)),
    ]
    cache = open_cache(model, backend)
    with torch.no_grad():
        for lose in empty:
            model(input_ids=ids, past_key_values=cache, **encoder)
            lose(cache)
            assert cache.get_seq_length() == 0
            assert cache.allocator.stats().num_sequences == 0
            cut = {key: value[:2, :4] for key, value in encoder.items()}
            want = model(input_ids=ids[:2, :5], **cut).logits  # another batch, and another encoder input
            got = model(input_ids=ids[:2, :5], past_key_values=cache, **cut).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            cache.batch_select_indices([1])
            cache.reset()
