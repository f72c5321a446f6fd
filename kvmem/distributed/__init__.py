"""One cache over several ranks of a tensor-parallel group: rank 0 decides, every rank acts (docs/distributed.md)."""

from kvmem.distributed.rank_group import RankGroup

__all__ = ["RankGroup"]
