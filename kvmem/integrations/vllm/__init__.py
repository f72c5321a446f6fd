"""kvmem inside vLLM, by its public extension points: nothing of vLLM is patched. docs/engines/vllm.md says which."""
