"""Attention over a kvmem cache: what unmodified kernels are to be called with, and a reference that runs anywhere.

========================  ======================================================================================
``registry``              every kernel by name: what it needs, and how it is run; ``base`` has its types
``reference``             attention in plain torch: ``sdpa`` for use on a CPU, ``oracle`` in float64 for tests
``cpu``                   kvmem's own kernel for decoding on a CPU: reads both backends in place
``write``                 new K/V into the cache by ``slot_mapping``
``blocks``                gathers, scatters, copies and zeroing of many tokens or blocks in one launch
``flashinfer``            arguments for FlashInfer's wrappers, cascades among them, and for its append
``flashinfer_mla``        arguments for FlashInfer's MLA wrapper
``flash_attention``       arguments for FlashAttention 2 and 3
``flash_attention_4``     arguments for FlashAttention 4
``torch_ops``             the FlashAttention that is inside torch
``vllm_cpu``              vLLM's attention on CPUs: loader, planner and writer, over blocks that it packs
``openvino``              OpenVINO's attention on CPUs: a layer of its own, or the inputs of a whole model
``merge``                 joins attention over two parts of a context
``checks``                what kernels need of a cache or a batch
``versions``              the arguments that the installed libraries take
========================  ======================================================================================

Shapes, everywhere: queries are packed, ``[T, Hq, D]``, the new tokens of all rows of the batch one after the other as
``batch.cu_seqlens_q`` says; a cache is the pair that ``Allocator.kv(layer)`` gives. Causal masks are aligned to the
end: the last new token of a row is its last token. ``lse`` is ``[T, Hq]``, float32, the natural logarithm of the sum of
the exponentiated scores, -inf where there is nothing to attend to; each module's ``natural_lse`` makes it of what its
kernels return. The makers return keyword arguments of the kernel they are named after. Metadata of one batch serves all
layers of its group, so call them once a step. Block ids and lengths are int32.

A cache of 8-bit floats may be stored divided by scales (``write.write_kv(k_scale=, v_scale=)``). Each kernel then needs
them: FlashInfer's ``run(k_scale=, v_scale=)``, FlashAttention 3's ``k_descale=``, ``v_descale=`` (float32
``[B, H]``, and 8-bit queries). With any other, ``scale=head_dim**-0.5 * k_scale`` and ``out * v_scale`` are the same.

Nothing here imports an optional package, but ``vllm_cpu.load()`` and ``openvino.load()``: the caller has it already.
``blocks`` uses Triton where it is installed. ``docs/kernels.md`` says what each kernel takes.
"""
