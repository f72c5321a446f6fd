"""kvmem inside vLLM: memory under the KV cache, a connector over kvmem's tiers, a block manager. Nothing is patched.

``docs/engines/vllm.md`` says which versions of vLLM this works with, and how each part is switched on.
"""
