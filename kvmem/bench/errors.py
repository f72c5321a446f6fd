"""Errors of the benchmark. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

from kvmem.errors import KVMemError

__all__ = ["BenchError", "TraceError"]


class BenchError(KVMemError, ValueError):
    """An argument or a file that the benchmark cannot use."""


class TraceError(BenchError):
    """A trace file that is missing, of no known format, malformed or cut. Names file, line and what is wrong."""
