"""Triton kernels: each with its launcher and its reference in plain PyTorch."""
