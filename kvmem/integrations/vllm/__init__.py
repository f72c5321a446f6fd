"""kvmem inside vLLM: memory under the KV cache, a connector over kvmem's tiers, a block manager. Nothing is patched.

``docs/engines/vllm.md`` says which versions of vLLM this works with, and how each part is switched on.
"""

from __future__ import annotations

import logging

_registered = False


def register() -> None:
    """Make the connector, the offloading spec and the eviction policy known to vLLM by name.

    vLLM calls this in each of its processes (entry point ``vllm.general_plugins``). Imports none of them. A vLLM
    without these registries runs without kvmem, and a line in the log says so.
    """
    global _registered
    if _registered:
        return
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory
        from vllm.v1.kv_offload.factory import OffloadingSpecFactory

        calls = (
            (KVConnectorFactory.register_connector, "KvmemConnector", "connector"),
            (OffloadingSpecFactory.register_spec, "KvmemOffloadingSpec", "offloading"),
            (CachePolicyFactory.register_cache_policy, "DensityPolicy", "offloading"),
        )
    except (ImportError, AttributeError) as e:
        logging.getLogger("kvmem").warning("this vLLM does not know kvmem's parts by name (%s): name their modules", e)
        return
    _registered = True
    for call, name, module in calls:
        call(name, f"{__name__}.{module}", name)
