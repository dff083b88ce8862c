"""Triton kernels: each with its launcher and its reference in plain PyTorch."""

__version__ = "0"  # transformers 5.3 parses it where Python starts in the root of a checkout
