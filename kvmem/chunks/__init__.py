"""KV that leaves its sequence: chunks in files and stores, composed anew, and whole caches on disk."""

from kvmem.chunks.chunk import Chunk, Head, export, export_layers, import_, import_layers
from kvmem.chunks.compose import Composition, compose
from kvmem.chunks.folder import FolderTier
from kvmem.chunks.format import ChunkFile, read_chunk, write_chunk
from kvmem.chunks.saved import Session, load, save
from kvmem.chunks.store import ChunkStore, Found

__all__ = [
    "Chunk", "ChunkFile", "ChunkStore", "Composition", "FolderTier", "Found", "Head", "Session", "compose",
    "export", "export_layers", "import_", "import_layers", "load", "read_chunk", "save", "write_chunk",
]  # fmt: skip
