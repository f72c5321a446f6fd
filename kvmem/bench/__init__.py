"""The measurements of kvmem: ``python -m kvmem.bench``.

One file a question: ``replay`` (a real trace against every pool), ``waste`` (rounding), ``steady`` (driver calls while
decoding), ``micro`` (what one call costs on real memory), ``attention`` and ``generate`` (the memory under a real
kernel and a real model).
"""
