"""Configuration: schemas, composition, checks and rules. Imports neither torch nor megatron."""
