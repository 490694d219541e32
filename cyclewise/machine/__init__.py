"""Executing programs of moments: kernels, packed weights, threads."""
