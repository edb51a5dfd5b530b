"""Ingest: reads a catalog of rasters and writes a dataset of records, one per tile of ground."""
