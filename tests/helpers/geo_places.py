"""Cells of the grid at which the tests of regions and of the prototype bank look, and unit vectors in float64."""

import numpy as np

from skysense_jax.ops import regions

EDGES = regions.grid_edges(65_536)


def cells(lon, lat):
    return regions.cell_ids(np.float32(np.atleast_1d(lon)), np.float32(np.atleast_1d(lat)), *EDGES)


def np_unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
