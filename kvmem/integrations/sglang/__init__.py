"""kvmem's tiers behind SGLang's prefix cache: ``linker.KVMemLinker`` and ``storage.KVMemStorage``.

SGLang loads both by module path (``docs/engines/sglang.md``). This module imports neither, so it needs no SGLang.
"""
