"""The operators of hybrid Mamba-Transformer models: a leaf package that knows torch and nothing of nemohybrid.

Every folder is one operator. Its `reference.py` is plain PyTorch, runs anywhere and is the documentation; its
`__init__.py` is the face callers import, which checks shapes and picks the backend. A faster form stands beside its
reference and is held to it, value by value and gradient by gradient, in `tests/kernels`.
"""
