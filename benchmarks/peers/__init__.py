"""kvmem beside its peers. ``*_driver.py`` are programs that drive one manager each in a process of its own: a peer's,
inside the peer's environment, or kvmem's.
"""
