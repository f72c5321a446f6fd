"""A serving engine over kvmem: continuous batching, chunked prefill, preemption, prefix cache, tiers; OpenAI's HTTP.

``scheduler`` has the calls of kvmem. ``model`` computes a step, ``sampling`` chooses tokens, ``engine`` runs the steps
in a thread, ``server`` speaks HTTP (``protocol``, ``answer``, ``metrics``). docs/engines/engine.md shows how to start.
"""
