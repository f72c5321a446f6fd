"""Shows eviction by a gate, of other tokens in each layer and KV head. Asserts that generation goes on as if they were
masked, that their memory is given back, and that an eviction in a fork leaves the other as it is."""

import torch
import torch.nn.functional as F

from kvmem.layouts.attention import normalise
from kvmem.layouts.lanes import LaneCache
from kvmem.layouts.policies import Gate, apply
from kvmem.layouts.rope import Rope

LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB, PROMPT, STEPS = 3, 4, 2, 16, 97, 600, 24
HIDDEN, GROUP, ROPE = HEADS * WIDTH, HEADS // KV_HEADS, Rope.default(WIDTH)
torch.set_num_threads(1)  # the tensors are tiny
draw = torch.Generator().manual_seed(0)
shapes = {"q": HIDDEN, "k": KV_HEADS * WIDTH, "v": KV_HEADS * WIDTH, "o": HIDDEN, "gate": HEADS}
weights = [{n: torch.randn(HIDDEN, w, generator=draw) * HIDDEN**-0.5 for n, w in shapes.items()} for _ in range(LAYERS)]
embed = torch.randn(VOCAB, HIDDEN, generator=draw)


def run(tokens, first, attend):
    """The next token of a decoder. attend(layer, hidden, q, k, v): out [T, HEADS, WIDTH], all after rotation."""
    x, at = embed[tokens], torch.arange(first, first + len(tokens))
    for layer, w in enumerate(weights):
        h = F.rms_norm(x, (HIDDEN,))
        q, k, v = ((h @ w[name]).unflatten(1, (-1, WIDTH)) for name in "qkv")
        x = x + attend(layer, h, ROPE.apply(q, at), ROPE.apply(k, at), v).flatten(1) @ w["o"]
    return int((F.rms_norm(x[-1], (HIDDEN,)) @ embed.T).argmax())


def generate(prompt, attend):
    tokens = [run(prompt, 0, attend)]
    while len(tokens) <= STEPS:
        tokens.append(run(tokens[-1:], PROMPT + len(tokens) - 1, attend))
    return tokens


def masked():
    """The reference: all K and V stay in tensors, and a mask hides what the gate drops once it has seen the prompt."""
    stored, keep = {}, {}

    def attend(layer, hidden, q, k, v):
        old = stored.get(layer, (k[:0], v[:0]))
        stored[layer] = torch.cat((old[0], k)), torch.cat((old[1], v))
        k, v = (x.repeat_interleave(GROUP, 1) for x in stored[layer])
        scores = torch.einsum("qhd,khd->hqk", q, k) * WIDTH**-0.5
        scores = scores.masked_fill(torch.ones(len(q), len(k)).tril(len(old[0])).logical_not(), -torch.inf)
        flags = (hidden @ weights[layer]["gate"]).view(-1, KV_HEADS, GROUP) > 1.2
        if len(q) < keep.setdefault(layer, flags.any(2).T).shape[1]:  # kept by any query head of the KV head
            scores[:, :, :PROMPT].masked_fill_(~keep[layer].repeat_interleave(GROUP, 0).unsqueeze(1), -torch.inf)
        return torch.einsum("hqk,khd->qhd", normalise(scores)[0], v)

    return attend


model = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": torch.float32, "device": "cpu"}
cache = LaneCache(**model, memory="4MiB", page_bytes=4096, max_sequences=2, max_tokens=1024)
policy = Gate("random", lambda layer, given: (given.hidden @ weights[layer]["gate"]).T, threshold=1.2)
prompt = torch.randint(VOCAB, (PROMPT,), generator=draw).tolist()
with cache.sequence() as seq:

    def attend(layer, hidden, q, k, v):
        seq.append(layer, k, v)
        out, _ = seq.attend(q, layer)
        if len(q) == PROMPT:  # the gate sees all of it
            apply(policy, seq, layer, hidden=hidden)
        return out

    tokens = generate(prompt, attend)
    assert tokens == generate(prompt, masked()), "eviction is exact: it equals a mask"
    kept = [int(n) for layer in range(LAYERS) for n in seq.lengths(layer)]
    cache.trim()
    share = cache.alloc.stats().physical_bytes / ((PROMPT + STEPS) * len(kept) * 2 * WIDTH * 4)
    assert share <= (sum(kept) / len(kept) + 32) / (PROMPT + STEPS), "what is kept, in whole blocks and pages"
    before = seq.padded(0)[0]
    with seq.fork() as fork:
        fork.evict(0, torch.zeros(before.shape[:2], dtype=torch.bool))
        assert not fork.lengths(0).any() and torch.equal(seq.padded(0)[0], before), "the fork alone has changed"
    print(f"{len(tokens)} tokens as with a mask; {share:.1%} of the memory is left; rows by layer and KV head: {kept}")
