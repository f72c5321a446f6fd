"""How the next token is chosen from the logits: greedily, or by temperature, top-k and top-p."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy. top_k: below 1 is all. seed: None draws another one each time."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The id of the next token. logits: ``[vocab]``. top_p: nucleus sampling (arXiv:1904.09751), within the top_k."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.double()  # as the options are: in float32 a small temperature, or top_p, would be 0
    values, ids = logits.topk(sampling.top_k) if 0 < sampling.top_k < len(logits) else logits.sort(descending=True)
    weights = ((values - values[0]) / sampling.temperature).softmax(-1)  # the largest is 0: no temperature overflows
    weights = weights[weights.cumsum(-1) - weights < sampling.top_p]  # the likeliest always stays
    return int(ids[weights.multinomial(1, generator=generator)])
