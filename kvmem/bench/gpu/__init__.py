"""``python -m kvmem.bench gpu``: what kvmem costs on a GPU, each figure beside what it is to be compared with.

===============  ===================================================================================================
``sizes``        how much is measured: on a GPU, and tiny for the tests
``device``       the device under measurement: its clock, its graphs, a load of kernels
``measure``      contenders in turn, and ratios of what was timed together
``memory``       what kernels read: both backends, and static twins with the same content and metadata
``kernels``      kernels by name, behind one interface; ``attend`` times one of them over several memories
``decoders``     decode steps over an allocator, and over a ``static_pool``
``vmm`` ...      and ``admit``, ``decode``, ``attention``, ``layout``, ``elastic``: the parts, listed in ``parts``
``part``         a part's time budget and its JSON document
``runner``       the parts one after the other, each in a process of its own
``goals``        what was wanted, and whether it was met
``tables``       the documents as Markdown
===============  ===================================================================================================

Each part runs on a CPU too, in tiny sizes, so that the tests run what the GPU will run.
"""
