"""A serving engine over kvmem: ``scheduler`` has its calls; docs/engines/engine.md tells how to start it."""
