"""Tuning: the parameters of kernels, chosen by measuring them where they will run."""
