"""kvmem inside what others wrote. One file or folder each, and nothing here is imported by ``import kvmem``."""
