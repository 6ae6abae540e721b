"""`E`: mixture of experts. `router.py` chooses, `experts.py` computes, `layer.py` is the mixer."""
