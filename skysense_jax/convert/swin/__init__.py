"""Weights of Swin-V1 networks that others have trained, and of msGFM."""
