"""Tiers of an allocator: which block lies where, the threads that move blocks, the calls about them, their events."""
