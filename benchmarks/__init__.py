"""The developers' benchmarks, ``python -m benchmarks.NAME`` in the source checkout: `step` and `peers` (a scheduler's
calls beside a C++ baseline, vLLM and SGLang), `instructions` (callgrind), `generate` (a language model over kvmem's
memory), `batching` (transformers' continuous batching over it), `perplexity` (through each layout of the cache),
`vllm_scheduler` (vLLM's scheduler over its own block manager and kvmem's), `vllm_memory` (physical memory under the KV
cache of both), `serve` (``examples/engine`` beside vLLM
over HTTP), `memory` (sweeps of two rows of ``python -m kvmem.bench``), `publish` (docs/results as Markdown).
"""
