"""A serving engine over kvmem: continuous batching, chunked prefill, preemption, prefix cache, tiers; OpenAI's HTTP.

``scheduler`` has the calls of kvmem. docs/engines/engine.md tells how to start it, and how a step goes.
"""
