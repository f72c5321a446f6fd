"""The measurements of kvmem: ``python -m kvmem.bench``.

One file a question: ``replay`` (a real trace against every pool), ``waste`` (rounding), ``reuse`` (eviction policies),
``host`` and ``attention`` (what calls and reads cost on real memory), ``gpu/``. ``run`` fills a result from them,
``document`` is its JSON form, ``render`` and ``plots`` show it.
"""
