"""Components and groups of an ordinary model, with single fields changed."""

from __future__ import annotations

from typing import Any

import torch

from kvmem.spec import Component, Group

BF16 = torch.bfloat16


def k(**changes: Any) -> Component:
    return Component(**({"name": "k", "heads": 8, "width": 128, "dtype": BF16, "rope": "post"} | changes))


def v(**changes: Any) -> Component:
    return k(**({"name": "v", "rope": "none"} | changes))


def group(*components: Component, **changes: Any) -> Group:
    return Group(**({"name": "full", "components": components or (k(), v()), "layers": range(4)} | changes))
