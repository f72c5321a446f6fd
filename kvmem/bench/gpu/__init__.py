"""``python -m kvmem.bench gpu``: what kvmem costs on a GPU, each figure beside what it is to be compared with.

===============  ===================================================================================================
``sizes``        how much is measured: on a GPU, and tiny for the tests
``device``       the device under measurement: its clock, its graphs, a load of kernels
``measure``      what all parts share: their time and report, contenders in turn
``memory``       what kernels read: both backends, and static twins with the same content and metadata
``kernels``      kernels by name, behind one interface
``decoders``     decode steps over an allocator, and over a static pool
``vmm`` ...      and ``admit``, ``decode``, ``attention`` (and layout), ``elastic``: the parts
``runner``       the parts one after the other, each in a process of its own
``tables``       the documents as tables: what was wanted, and what was measured
===============  ===================================================================================================

Each part runs on a CPU too, in tiny sizes, so that the tests run what the GPU will run.
"""
