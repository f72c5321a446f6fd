"""What ``python -m kvmem.bench near`` measures: attention where the bytes are, reading less, and planners."""
