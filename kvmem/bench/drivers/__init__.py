"""Programs that drive one manager each in a process of its own: a peer's, inside the peer's environment, or kvmem's."""
