"""Ranks: who this process is, what parameters are made of, and the collectives. Knows no model."""
