"""kvmem inside other libraries: one file or folder for each. ``import kvmem`` imports none of them."""
