"""Evaluation on frozen features: rows, probes, scores, intervals, and what prototypes say about a region."""
