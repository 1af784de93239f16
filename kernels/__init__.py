"""Triton kernels, installed as ``rlfast.kernels``: one file an op."""
