"""Layers and encoders as flax modules."""
