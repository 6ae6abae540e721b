"""Precision: how the GEMM of each `Linear` multiplies. Knows no model."""
