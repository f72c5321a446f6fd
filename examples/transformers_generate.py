"""Shows kvmem as the cache of transformers' ``generate()``: greedy and beam search, on both backends.

    pip install kvmem[transformers]
    python examples/transformers_generate.py

The model is tiny and random, so nothing is downloaded; for a real one, change the first lines of main(). Asserts that
the tokens are those of transformers' own cache, and that beams share memory.
"""

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvmem.integrations.transformers import KVMemCache


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def main() -> None:
    model = make_model()
    prompt = torch.randint(3, 1000, (2, 48))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 32}

    for backend in ("virtual", "paged"):
        # memory is a budget, not a reservation: pages are created as tokens arrive.
        cache = KVMemCache(model, memory="16MiB", max_batch=8, max_tokens=512, backend=backend, page_bytes=4096)
        for mode in ({}, {"num_beams": 4}):
            model.set_attn_implementation("sdpa")
            expected = model.generate(**inputs, **mode, past_key_values=DynamicCache(config=model.config))
            model.set_attn_implementation("kvmem")  # on a CPU, attention reads the cache in place
            tokens = model.generate(**inputs, **mode, past_key_values=cache)
            assert torch.equal(tokens, expected), f"{backend}: other tokens than with DynamicCache"

            stats, rows = cache.allocator.stats(), mode.get("num_beams", 1) * len(prompt)
            unshared = rows * cache.get_seq_length() * cache.allocator.spec.bytes_per_token
            print(
                f"{backend:8} {'beam search' if mode else 'greedy':12} {rows} rows of {cache.get_seq_length()} tokens: "
                f"{stats.used_bytes:,} bytes used, {unshared:,} without sharing"
            )
            assert stats.used_bytes < unshared if mode else stats.used_bytes == unshared
            cache.reset()  # frees the tokens and keeps their memory for the next call
        cache.close()  # returns the memory to the system
        assert cache.allocator.stats().mapped_bytes == 0
        assert cache.allocator.check() == []


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny
    main()
