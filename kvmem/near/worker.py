"""The process beside the disk: ``python -m kvmem.near.worker DESCRIPTOR OWNER``, started by ``DiskAttention`` with one
end of a socket and its own number. It answers one message after the other, and ends when its owner does.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from typing import Any

import torch

from kvmem.errors import SpecError
from kvmem.near.base import Part
from kvmem.near.store import Store
from kvmem.near.wire import Closed, receive, send

__all__ = ["CALLS", "main"]

CALLS = ("open", "append", "attend", "truncate", "free", "num_tokens", "used_pages")  # of a Store
_LOOK_SECONDS = 1.0  # how often it looks whether its owner lives: a child of the owner may hold the other end too
_SEND_SECONDS = 600.0  # an owner may be busy with other things, or stopped


def main(descriptor: int, owner: int) -> None:
    """Serve the process ``owner`` at the other end of the socket until it has gone. The first message opens a store."""
    link, store = socket.socket(fileno=descriptor), None

    def wait() -> None:
        if os.getppid() != owner:
            raise Closed("the owner has gone")

    torch.set_grad_enabled(False)
    with suppress(OSError):  # nobody listens any more
        while True:
            link.settimeout(_LOOK_SECONDS)
            header, tensors, _ = receive(link, wait)
            answer: dict[str, Any] = {}
            found: list[torch.Tensor] = []
            try:
                if store is None:
                    store = Store(**header["arguments"])
                elif header["call"] in CALLS:
                    result = getattr(store, header["call"])(*tensors, **header["arguments"])
                    if isinstance(result, Part):
                        answer["result"], found = result.exact, [result.out, result.lse]
                    elif isinstance(result, int):
                        answer["result"] = result
            except Exception as error:  # noqa: BLE001  # whatever it is, the owner is told, and nothing is lost
                answer = {"error": str(error) or type(error).__name__, "refused": isinstance(error, SpecError)}
            link.settimeout(_SEND_SECONDS)
            send(link, {**answer, "traffic": {} if store is None else store.traffic}, found)
            if store is not None:
                store.traffic.clear()
    if store is not None:
        store.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
