"""Programs that run inside a peer's own environment and drive its manager; nothing here imports kvmem."""
