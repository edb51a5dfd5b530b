"""Synthetic places: GeoTIFFs of a made-up ground, for tests of the whole pipeline without real data."""
