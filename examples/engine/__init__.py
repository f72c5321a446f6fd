"""A serving engine over kvmem: continuous batching, chunked prefill, preemption, prefix cache, tiers; OpenAI's HTTP.

``scheduler`` has the calls of kvmem. Around it: ``model`` computes a step, ``sampling`` chooses tokens, ``engine`` runs
the steps in a thread, ``server`` speaks HTTP to clients (``protocol``, ``text``, ``metrics``). Start with
``python -m examples.engine``; docs/engines/engine.md shows the calls.
"""
