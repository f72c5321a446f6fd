"""Shows cache events for a router in vLLM's wire format, msgpack over ZeroMQ; prints them without these packages.

The router here is a subscriber in the same process. It keeps a set of block hashes, and asserts that they suffice to
know how much of a prompt is cached.
"""

import time

import torch

import kvmem
from kvmem.events import to_wire
from kvmem.events.digests import block_digests

BLOCK = 16
TOPIC = b"kv@pod-0@tiny"  # worker and model, in llm-d's form


class Printer:
    def send(self, sequence, batch):
        print(f"{TOPIC.decode()} {sequence}: {[(e['type'], len(e.get('block_hashes', ()))) for e in batch[1]]}")
        return batch


class Publisher:
    """A PUB socket on this machine only; at most 1,000 batches wait for a slow subscriber."""

    def __init__(self, msgpack, zmq):
        self.msgpack, context = msgpack, zmq.Context.instance()
        self.out, self.back = context.socket(zmq.PUB), context.socket(zmq.SUB)
        self.out.set_hwm(1000)
        port = self.out.bind_to_random_port("tcp://127.0.0.1")
        self.back.setsockopt(zmq.SUBSCRIBE, b"kv@")
        self.back.setsockopt(zmq.RCVTIMEO, 10_000)
        self.back.connect(f"tcp://127.0.0.1:{port}")
        time.sleep(0.3)  # PUB drops messages until the subscriber is connected

    def send(self, sequence, batch):
        """Send three frames: topic, number of the batch (a gap shows that some were lost), batch."""
        self.out.send_multipart([TOPIC, sequence.to_bytes(8, "big"), self.msgpack.packb(batch)])
        topic, number, payload = self.back.recv_multipart()
        print(f"{topic.decode()} {int.from_bytes(number, 'big')}: {len(payload)} bytes")
        return self.msgpack.unpackb(payload)


def publisher():
    try:
        import msgpack
        import zmq
    except ImportError:
        return Printer()
    return Publisher(msgpack, zmq)


def main():
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=2, head_dim=16, dtype=torch.float16, block_size=BLOCK)
    alloc = kvmem.Allocator(spec, device="cpu", memory="16MiB", max_sequences=8, max_tokens=512, events=1024)
    out, known = publisher(), set()
    prompts = [list(range(100)), [*range(64), *range(500, 560)], list(range(900, 980))]
    for number, prompt in enumerate(prompts):
        sequence = alloc.sequence(prompt)
        rest = prompt[sequence.num_cached_tokens :]
        sequence.extend(len(rest))
        sequence.commit(rest)
        sequence.free()
        for event in out.send(number, to_wire(alloc.events(), ts=time.time()))[1]:
            if event["type"] == "AllBlocksCleared":
                known.clear()
            else:
                hashes = set(event["block_hashes"])
                known = known | hashes if event["type"] == "BlockStored" else known - hashes
    for prompt in prompts:
        hashes = [int.from_bytes(digest[-8:], "big") for digest in block_digests(spec, prompt)]
        found = sum(hash in known for hash in hashes) * BLOCK
        assert found == len(prompt) // BLOCK * BLOCK, "the router does not know what was cached"
    print(f"the router knows {len(known)} blocks: 4 of the 7 full blocks of the second prompt are those of the first")


main()
