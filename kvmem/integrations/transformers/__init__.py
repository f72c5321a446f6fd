"""kvmem as the cache of Hugging Face transformers: ``KVMemCache``, and for encoder-decoders a pair of them.

``model.set_attn_implementation("kvmem")`` lets decoding on a CPU read it in place: see ``attention``.
``continuous_batching(model, memory=...)`` runs transformers' continuous batching over kvmem's memory: see ``batching``.
"""

from kvmem.integrations.transformers.attention import register
from kvmem.integrations.transformers.batching import continuous_batching
from kvmem.integrations.transformers.cache import KVMemCache, KVMemEncoderDecoderCache, KVMemLayer

__all__ = ["KVMemCache", "KVMemEncoderDecoderCache", "KVMemLayer", "continuous_batching"]

register()
