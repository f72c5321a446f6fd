"""Shows models with a recurrent state: a spec built by hand, and a snapshot from which a second prompt continues.

``CacheSpec.from_config`` refuses these models, since configs do not give the shape of a state: it is read from a run.
transformers (``kvmem[transformers]``) computes tiny random models, and kvmem stores their caches. Asserts equal logits.
"""

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

import kvmem
from kvmem.kernels.write import write_kv

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2}
MODELS = {
    "Qwen3Next": {"num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8, "num_experts": 16,
                  "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2},
    "Jamba": {"num_attention_heads": 4, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "Mamba": {"num_hidden_layers": 2},
    "Lfm2": {"num_attention_heads": 4, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
}  # fmt: skip


def parts(layer: object) -> dict[str, torch.Tensor]:
    """Return what a layer of transformers' cache holds: K and V [tokens, heads, width], or a state [rows, width]."""
    if hasattr(layer, "conv_states"):
        held = {"conv": layer.conv_states[0], "recurrent": layer.recurrent_states[0]}
        return {name: state.flatten(0, -2) for name, state in held.items() if state is not None}
    return {"k": layer.keys[0].transpose(0, 1), "v": layer.values[0].transpose(0, 1)}


def spec_of(cache: DynamicCache) -> kvmem.CacheSpec:
    """Return a spec: attention layers store K and V of each token, the others a state of the sequence."""
    layers = [{name: (*x.shape[-2:],) for name, x in parts(layer).items()} for layer in cache.layers]
    full, state = (tuple(i for i, x in enumerate(layers) if ("k" in x) == kind) for kind in (True, False))
    rows = layers[state[0]].items()
    fixed = tuple(kvmem.Component(n, heads=h, width=w, dtype="float32", growth="fixed") for n, (h, w) in rows)
    # A prefix is found by its blocks of tokens, so in a model without attention each token stores one byte.
    kept = [kvmem.Component(n, heads=h, width=w, dtype="float32") for i in full[:1] for n, (h, w) in layers[i].items()]
    tokens = kvmem.Group("tokens", tuple(kept) or (kvmem.Component("mark", width=1, dtype="uint8"),), full or (0,))
    return kvmem.CacheSpec((kvmem.Group("state", fixed, state), tokens), num_layers=len(layers))


def main(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    word = "cache_params" if name == "Mamba" else "past_key_values"
    ids, cache, again = torch.randint(3, 99, (1, 40)), DynamicCache(config=config), DynamicCache(config=config)
    model(ids[:, :32], **{word: cache}, use_cache=True)
    alloc = kvmem.Allocator(spec_of(cache), backend="paged", memory="8MiB", max_sequences=4, max_tokens=256)
    with alloc.sequence(ids[0, :32]) as seq:
        seq.extend(32)
        state, tokens = alloc.batch([seq]).groups
        for i, held in enumerate(map(parts, cache.layers)):
            if "k" in held:
                write_kv(alloc.kv(i), tokens, held["k"], held["v"])
            for part in held.keys() - {"k", "v"}:
                alloc.tensor(i, part)[state.block_table[0], 0] = held[part]
        seq.commit(ids[0, :32])
        seq.snapshot()  # caches the state at the end of these tokens
    with alloc.sequence(ids[0]) as seq:  # another request that begins with the same tokens
        assert seq.num_cached_tokens == 32, seq.num_cached_tokens
        state = int(alloc.batch([seq]).groups[0].block_table[0, 0])
        for i, layer in enumerate(cache.layers):
            if "k" in parts(layer):
                again.update(*(x.transpose(0, 1)[None] for x in seq.kv(i)), i)
            for part in parts(layer).keys() - {"k", "v"}:
                shape = getattr(layer, f"{part}_states")[0].shape
                getattr(again, f"update_{part}_state")(alloc.tensor(i, part)[state, 0].reshape(shape).clone(), i)
        got, want = (model(ids[:, 32:], **{word: held}, use_cache=True).logits for held in (again, cache))
        torch.testing.assert_close(got, want)
    print(f"{name}: 32 of 40 tokens found, with {alloc.spec.fixed_bytes:,} bytes of state; the logits are equal")


if __name__ == "__main__":
    torch.set_grad_enabled(False), torch.set_num_threads(1)  # the tensors are tiny
    for each in MODELS:
        main(each)
