"""Text to samples: tokenizer -> prepare (or bundled) -> corpus -> sampler (training) and validation.

megatron-core writes, reads and orders the corpora. Importing it takes seconds, so it happens where it is used.
"""
