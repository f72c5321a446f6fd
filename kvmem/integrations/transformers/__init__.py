"""kvmem as the cache of Hugging Face transformers: ``KVMemCache``, and for encoder-decoders a pair of them."""

from kvmem.integrations.transformers.cache import KVMemCache, KVMemEncoderDecoderCache, KVMemLayer

__all__ = ["KVMemCache", "KVMemEncoderDecoderCache", "KVMemLayer"]
