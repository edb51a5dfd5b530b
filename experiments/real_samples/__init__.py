"""Small real satellite data as rasters, catalogs and one dataset: `python -m experiments.real_samples`."""
