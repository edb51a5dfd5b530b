"""Weights between JAX and PyTorch: the tables of names, exported folders, and files that others have released."""
