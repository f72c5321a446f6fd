"""``python -m kvmem.bench gpu``: the costs of kvmem on a GPU, each figure beside one to compare it with.

``runner`` starts the parts ``vmm``, ``admit``, ``decode``, ``attention`` (with layout) and ``elastic``, each in a
process of its own; ``tables`` shows their documents. The other files hold what the parts share.

Each part runs on a CPU too, in tiny sizes, so that the tests run what the GPU will run.
"""
