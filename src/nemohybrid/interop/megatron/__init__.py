"""From Megatron-LM: argument lists and Megatron-Bridge dumps become overrides. Nothing of what is read is executed."""
