"""Kernels for NVIDIA GPUs, written in Triton and compiled ahead of time to machine code."""
