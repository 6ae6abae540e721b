"""Text from a model: sampling rules, the decode loop, and loading a checkpoint for it."""
