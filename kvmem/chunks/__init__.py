"""KV that leaves its sequence: chunks in files and stores, composed anew, and whole caches on disk."""

from kvmem.chunks.chunk import Chunk, Head, export, export_layers, import_, import_layers
from kvmem.chunks.format import ChunkFile, read_chunk, write_chunk

__all__ = [
    "Chunk", "ChunkFile", "Head", "export", "export_layers", "import_", "import_layers", "read_chunk", "write_chunk",
]  # fmt: skip
