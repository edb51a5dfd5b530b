"""Batches: reads records and makes training and evaluation batches of them."""
