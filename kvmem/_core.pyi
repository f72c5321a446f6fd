"""The native half of kvmem: drivers, pages, rows, blocks, sequences."""
