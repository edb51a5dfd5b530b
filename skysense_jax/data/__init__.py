"""Data: from rasters to records (ingest), from records to batches, synthetic places for tests."""
