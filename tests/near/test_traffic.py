"""What crosses the link, is read from the medium and is delivered, from the ledger; what SparF saves, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from near_world import LocalStore, Text, difference, filled

import kvmem
from kvmem import SpecError
from kvmem.near import DiskAttention, HeadShards, HostAttention, SparF, merge

WIDTH, TOKENS = 128, 4096


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskAttention]:
    """K by token only."""
    spec = Text(0, heads=1, width=WIDTH).spec
    with DiskAttention(tmp_path_factory.mktemp("rows"), spec, capacity="16MiB") as disk:
        yield disk


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskAttention]:
    """K by channel too."""
    spec = Text(0, heads=1, width=WIDTH).spec
    with DiskAttention(tmp_path_factory.mktemp("channels"), spec, capacity="24MiB", k_channels_per_page=4) as disk:
        yield disk


@pytest.mark.parametrize("group", [1, 4])
def test_the_link_carries_one_part_in_s_over_group_plus_one(disk: DiskAttention, group: int) -> None:
    """2 * S * hkv * D against 2 * h * D + 2 * hkv * D, the lse apart: 2,048 and 819 times less at S = 4,096."""
    text = Text(TOKENS, heads=1, group=group, width=WIDTH)
    disk.open(1)
    disk.traffic.clear()
    disk.append(0, [1], text.k[:-1], text.v[:-1])
    pushed = Counter(disk.traffic)
    disk.traffic.clear()
    size = text.k.nbytes + text.v.nbytes
    assert pushed["media_written_bytes"] == (TOKENS - 1) // 16 * 16 * size // TOKENS  # each byte once; the rest waits
    assert pushed["link_bytes"] == (TOKENS - 1) * size // TOKENS and pushed["media_read_bytes"] == 0
    found = disk.attend(0, [1], text.q[-1:], text.k[-1:], text.v[-1:])
    seen = disk.traffic
    assert seen["link_bytes"] == 4 * (2 * group * WIDTH + 2 * WIDTH) and seen["lse_bytes"] == 4 * group
    assert seen["delivered_bytes"] == size and seen["delivered_bytes"] / seen["link_bytes"] == TOKENS / (group + 1)
    assert seen["media_read_bytes"] == seen["delivered_bytes"] and seen["page_writes"] == 1
    assert 0 < seen["control_bytes"] < 1000
    assert difference(found, text.full(TOKENS - 1, TOKENS)) < 1e-6
    disk.free(1)


def test_the_host_counts_the_same_link(backend: str) -> None:
    text = Text(65, group=4)
    with kvmem.Allocator(text.spec, backend=backend, device="cpu", memory="2MiB", max_sequences=1, max_tokens=128) as a:
        host, sequence = HostAttention(a), filled(a, text, list(range(64)))
        sequence.extend(1)
        host.attend(1, [sequence], text.q[-1:], text.k[-1:], text.v[-1:])
    assert host.traffic["delivered_bytes"] / host.traffic["link_bytes"] == 65 / 5


def test_rows_wait_until_a_page_is_full(channels: DiskAttention) -> None:
    """One token at a time: ceil(tokens / 16) page writes, not one a token. A sequence gives back all its pages."""
    text, tokens = Text(600, heads=1, width=WIDTH), 600
    channels.open(3)
    channels.traffic.clear()
    for i in range(tokens):
        channels.append(1, [3], text.k[i : i + 1], text.v[i : i + 1])
    assert channels.traffic["page_writes"] == tokens // 16
    ranges = tokens // (4096 // 4 // 4)  # of tokens that fill pages of four channels
    assert channels.traffic["channel_page_writes"] == ranges * WIDTH // 4
    assert channels.used_pages() == tokens // 16 + ranges * WIDTH // 4
    assert difference(channels.attend(1, [3], text.q[-1:]), text.full(tokens - 1, tokens)) < 1e-6
    channels.free(3)
    assert channels.used_pages() == 0


def test_scattered_tokens_touch_64_percent_of_the_pages(disk: DiskAttention) -> None:
    """1 - (15/16) ** 16, on random data: far more is read from the medium than is delivered. Without K by channel, the
    choice reads K of every page too: only the second step is looked at, as what a choice of all pages has more."""
    text = Text(TOKENS, heads=1, group=1, width=WIDTH)
    disk.open(1)
    disk.append(0, [1], text.k, text.v)
    disk.traffic.clear()
    shares, page_bytes, steps = [], 16 * 2 * WIDTH * 4, 8
    for i in range(steps):
        disk.attend(0, [1], text.q[i : i + 1], sparse=SparF(WIDTH // 8, TOKENS // 16, recent=1))
        seen = Counter(disk.traffic)
        disk.traffic.clear()
        shares.append((seen["media_read_bytes"] - TOKENS // 16 * page_bytes // 2) / (TOKENS // 16 * page_bytes))
        assert (
            seen["delivered_bytes"] == 4 * (TOKENS * WIDTH // 8 + TOKENS // 16 * 2 * WIDTH) == 4 * TOKENS * WIDTH // 4
        )
        assert seen["media_read_bytes"] > 4 * seen["delivered_bytes"]
    assert abs(sum(shares) / steps - 0.64) < 0.03
    disk.free(1)


def dominant(text: Text) -> Text:
    """12 channels carry the scores."""
    scale = torch.full((WIDTH,), 0.01)
    scale[torch.randperm(WIDTH)[:12]] = 6.0
    text.k, text.q = text.k * scale, text.q * scale
    return text


def test_an_eighth_is_enough_where_some_channels_dominate(channels: DiskAttention, backend: str) -> None:
    text, eighth = dominant(Text(TOKENS, heads=1, group=2, width=WIDTH)), SparF(WIDTH // 8, TOKENS // 16)
    channels.open(1)
    channels.append(0, [1], text.k[:-1], text.v[:-1])
    channels.traffic.clear()
    found = channels.attend(0, [1], text.q[-1:], text.k[-1:], text.v[-1:], sparse=eighth)
    assert not found.exact and (found.out - text.full(TOKENS - 1, TOKENS).out).abs().max() < 1e-3
    assert channels.traffic["delivered_bytes"] * 8 == 2 * text.k.nbytes  # an eighth of K and V
    channels.free(1)
    with kvmem.Allocator(
        text.spec, backend=backend, device="cpu", memory="16MiB", max_sequences=1, max_tokens=TOKENS
    ) as a:
        host, sequence = HostAttention(a), filled(a, text, list(range(TOKENS - 1)))
        sequence.extend(1)
        here = host.attend(1, [sequence], text.q[-1:], text.k[-1:], text.v[-1:], sparse=eighth)
    assert difference(here, found) < 1e-5
    assert host.traffic["delivered_bytes"] * 8 == 2 * text.k.nbytes


def test_the_mean_of_v_helps(channels: DiskAttention) -> None:
    """On Gaussian data, where no token stands out; over many queries, so that it does not depend on one."""
    text = Text(TOKENS, heads=1, group=4, width=WIDTH)
    channels.open(1)
    channels.append(0, [1], text.k, text.v)
    q, errors = text.q[:12], {}
    exact = channels.attend(0, [1], q)
    for blend in (True, False):
        found = channels.attend(0, [1], q, sparse=SparF(WIDTH // 8, TOKENS // 16, blend=blend))
        errors[blend] = (found.out - exact.out).norm().item()
    assert errors[True] < 0.6 * errors[False]
    channels.free(1)


@pytest.mark.parametrize("place", ["disk", "channels"])
def test_sparf_of_everything_is_dense(place: str, backend: str, request: pytest.FixtureRequest) -> None:
    """All channels and all tokens; also with fewer channels, since no token is left out. Several new tokens at once."""
    store: DiskAttention = request.getfixturevalue(place)
    text = Text(350, heads=1, width=WIDTH)
    store.open(1)
    store.append(0, [1], text.k[:-3], text.v[:-3])
    for r in (WIDTH, 1):
        found = store.attend(0, [1], text.q[-3:], text.k[-3:], text.v[-3:], sparse=SparF(r, 350))
        assert found.exact and difference(found, text.full(347, 350)) < 1e-6
        store.truncate(1, 347)
    dense_by_all_channels = store.attend(0, [1], text.q[-1:], text.k[-3:-2], text.v[-3:-2], sparse=SparF(WIDTH, 347))
    assert not dense_by_all_channels.exact
    store.free(1)


def test_the_mean_of_v_follows_truncation_and_several_new_tokens(channels: DiskAttention, backend: str) -> None:
    """With k = 1 almost everything is the mean, so a wrong one shows. What was cut off may even have been infinite."""
    text, only_mean = Text(700, heads=1, group=1, width=WIDTH), SparF(WIDTH, 1, recent=0)
    with kvmem.Allocator(text.spec, backend=backend, device="cpu", memory="2MiB", max_sequences=2, max_tokens=800) as a:
        host = HostAttention(a)
        channels.open(1)
        channels.append(0, [1], text.k[:600], text.v[:600])
        cut = text.v[600:620].clone()
        cut[7] = torch.inf
        channels.append(0, [1], text.k[600:620], cut)
        sequence = filled(a, text, list(range(600)))
        host.attend(1, [sequence], text.q[:1], sparse=only_mean)
        for length in (600, 513, 512, 290, 5, 0):
            channels.truncate(1, length)
            sequence.truncate(length)
            host.forget(sequence)
            for first, new in ((length, 4), (length + 4, 1)):
                rows = slice(first, first + new)
                sequence.extend(new)
                steps = [store.attend(layer, [one], text.q[rows], text.k[rows], text.v[rows], sparse=only_mean)
                         for store, layer, one in ((channels, 0, 1), (host, 1, sequence))]  # fmt: skip
                sequence.commit(count=new)
                assert difference(*steps) < 1e-5
                best = [expected_with_mean(text, at) for at in range(first, first + new)]
                assert (steps[0].out - torch.stack(best)).abs().max() < 1e-5
        channels.free(1)


def expected_with_mean(text: Text, at: int) -> torch.Tensor:
    """SparF with all channels and one token, of the query of token ``at``."""
    weights = (text.k[: at + 1, 0].double() @ text.q[at, 0].double() * WIDTH**-0.5).softmax(0)
    best = weights.argmax()
    v = text.v[: at + 1, 0].double()
    return (weights[best] * v[best] + (1 - weights[best]) * v.mean(0))[None]


def test_an_estimated_lse_is_not_merged_unnoticed(disk: DiskAttention) -> None:
    text = Text(64, heads=1, width=WIDTH)
    disk.open(1)
    disk.append(0, [1], text.k, text.v)
    sparse, dense = (disk.attend(0, [1], text.q[-1:], sparse=s) for s in (SparF(16, 32), None))
    disk.free(1)
    with pytest.raises(SpecError, match="approximate=True"):
        merge([sparse, dense])
    assert not merge([dense, sparse], approximate=True).exact and merge([tuple(sparse)]).out.equal(sparse.out)
    with pytest.raises(SpecError, match="none"):
        merge([])


def test_shards_by_head_give_identical_output(tmp_path: Path) -> None:
    """1, 2 and 4 shards: the same bits, and the load of each within one head."""
    text, found = Text(100, heads=4, width=16), {}
    for number in (1, 2, 4):
        spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=4 // number, head_dim=16, dtype=torch.float32)
        shards = [LocalStore(spec, tmp_path) for _ in range(number)]
        with HeadShards(shards) as whole:
            whole.open(1)
            whole.append(1, [1], text.k[:-2], text.v[:-2])
            dense = whole.attend(1, [1], text.q[-2:], text.k[-2:], text.v[-2:])
            assert {shard.traffic["media_read_bytes"] for shard in shards} == {
                whole.traffic["media_read_bytes"] // number
            }
            assert whole.num_tokens(1, 1) == 100 and whole.num_tokens(1, 0) == 0
            found[number] = dense, whole.attend(1, [1], text.q[:3], sparse=SparF(4, 20))
    assert difference(found[1][0], text.full(98, 100)) < 1e-6
    for number in (2, 4):
        for one, other in zip(found[1], found[number], strict=True):
            assert one.out.equal(other.out) and one.lse.equal(other.lse)


def test_a_shard_takes_back_what_another_could_not_append(tmp_path: Path) -> None:
    text = Text(40, heads=4, width=16)
    shards = [
        LocalStore(kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=heads, head_dim=16, dtype=torch.float32), tmp_path)
        for heads in (3, 1)
    ]
    with HeadShards(shards) as whole:
        whole.open(1)
        whole.append(0, [1], text.k[:20], text.v[:20])
        shards[1].free(1)
        for call in (whole.append, lambda *rows: whole.attend(rows[0], rows[1], text.q[20:], *rows[2:])):
            with pytest.raises(SpecError, match="not open"):
                call(0, [1], text.k[20:], text.v[20:])
            assert shards[0].num_tokens(1, 0) == 20 and shards[0].store.used_pages() == 3
        with pytest.raises(SpecError, match="only the number of heads"):
            HeadShards([shards[0], LocalStore(text.spec, tmp_path), LocalStore(Text(0, width=8).spec, tmp_path)])


def test_the_newest_tokens_are_read_in_any_case(tmp_path: Path) -> None:
    """With recent = k they are all that is read, however little they weigh."""
    text = Text(200, heads=2, width=16)
    text.k[-5:] *= -100  # no query wants the last token
    text.q[:] = text.k[-1].repeat_interleave(2, 0).neg()
    last = Text(20, heads=2, width=16)
    last.k, last.v, last.q = text.k[-20:], text.v[-20:], text.q[-20:]
    with LocalStore(text.spec, tmp_path, channels_per_page=8) as store:
        store.open(1)
        store.append(0, [1], text.k, text.v)
        found = store.attend(0, [1], text.q[:1], sparse=SparF(4, 20, blend=False, recent=20))
        assert difference(found, last.full(19, 20)) < 1e-5 and not found.exact


def test_the_estimate_of_the_lse_is_right_where_all_channels_are_read(tmp_path: Path, backend: str) -> None:
    """Then the share of the chosen tokens is no estimate."""
    text = Text(300, heads=2, width=16)
    with kvmem.Allocator(
        text.spec, backend=backend, device="cpu", memory="2MiB", max_sequences=1, max_tokens=512
    ) as alloc:
        found = HostAttention(alloc).attend(
            1, [filled(alloc, text, list(range(300)))], text.q[-1:], sparse=SparF(16, 30)
        )
    assert not found.exact and (found.lse - text.full(299, 300).lse).abs().max() < 1e-5
