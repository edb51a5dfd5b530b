"""What a prototype bank and the places of a region say about each other: arithmetic of arrays, JSON-able reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from skysense_jax.evals import assignment
from skysense_jax.evals.unit import unit
from skysense_jax.ops import prototypes as banks
from skysense_jax.ops import regions
from skysense_jax.sensors import UNLABELLED

NEAREST = 3
"""Places named for every prototype, and regions named where one is not known."""


class Seen(NamedTuple):
    """The M places of a region. features: unit float32 [M, N, D] in the bank's space, N = h * w cells in the shape
    `grid`; valid: bool [M, N], any input there; label: uint8 [M, N]; names: M texts; lon, lat: [M]."""

    features: np.ndarray
    valid: np.ndarray
    label: np.ndarray
    names: list[str]
    lon: np.ndarray
    lat: np.ndarray
    grid: tuple[int, int]


def plain_cell(bank: Mapping[str, np.ndarray], lon: float, lat: float, side: int = regions.ALONE) -> int:
    """Cell of the bank's grid at a location; `side` as in regions.cell_ids."""
    return int(regions.cell_ids(np.float32([lon]), np.float32([lat]), bank["lon_edges"], bank["lat_edges"], side)[0])


def region_at(bank: Mapping[str, np.ndarray], lon: float, lat: float, side: int = regions.ALONE) -> int:
    """Row of the region a location lies in. ValueError where that was never visited, naming the nearest known ones
    unless cells share regions (`side` as in regions.cell_ids)."""
    edges, cell = (bank["lon_edges"], bank["lat_edges"]), plain_cell(bank, lon, lat, side)
    known = np.flatnonzero((bank["cells"] != regions.NOWHERE) & (bank["visits"] > 0))
    row = known[bank["cells"][known] == cell]
    if len(row):
        return int(row[0])
    if not len(known):
        raise ValueError("no region of the bank has ever been visited: its network was not pretrained with the bank on")
    if cell == regions.NOWHERE:
        raise ValueError(f"lon {lon:g} lat {lat:g} is no location: the place's is missing")
    if side != regions.ALONE:
        raise ValueError(
            f"the region that lon {lon:g} lat {lat:g} shares with other squares (table='hashed') has "
            f"never been visited; {len(known)} of {len(bank['cells'])} have"
        )
    centres = np.array([regions.cell_centre(one, *edges) for one in bank["cells"][known]])
    away = _distance(lon, lat, *centres.T)
    nearest = np.argsort(away, kind="stable")[:NEAREST]
    raise ValueError(
        f"lon {lon:g} lat {lat:g} lies in no region that the bank has visited ({len(known)} are); the nearest: "
        + "; ".join(f"{centres[k, 0]:.4f},{centres[k, 1]:.4f} ({away[k]:.0f} km away)" for k in nearest)
    )


def _distance(lon: float, lat: float, lons: np.ndarray, lats: np.ndarray) -> np.ndarray:
    """Kilometres along great circles."""
    a, b, dlon = np.radians(lat), np.radians(lats), np.radians(lons - lon)
    half = np.sin((b - a) / 2) ** 2 + np.cos(a) * np.cos(b) * np.sin(dlon / 2) ** 2
    return 2 * regions.RADIUS / 1000 * np.arcsin(np.sqrt(np.minimum(half, 1)))


def region_report(bank: Mapping[str, np.ndarray], row: int, cell: int, side: float) -> dict[str, Any]:
    """What the bank itself says about a region, JSON-able. cell: the one of its cells that is shown; side: metres of a
    cell of the grid."""
    edges = bank["lon_edges"], bank["lat_edges"]
    own = unit(bank["prototypes"][row])
    cosine = own @ own.T
    pairs = cosine[~np.eye(len(own), dtype=bool)]
    others = np.where(np.eye(len(own), dtype=bool), -np.inf, cosine)
    return {
        "region": {
            "row": row,
            "cell": cell,
            "centre": regions.cell_centre(cell, *edges),
            "bounds": regions.cell_bounds(cell, *edges),
            "side_m": side,
            "visits": int(bank["visits"][row]),
            "shared": regions.is_shared(bank["cells"]),
            "visited_regions": int(np.sum(bank["visits"] > 0)),
        },
        "bank": {
            "usage_entropy": assignment.entropy(bank["usage"][row]),
            "similarity_mean": float(pairs.mean()),
            "similarity_max": float(pairs.max()),
            "directions": float(banks.directions(own)),
        },
        "prototypes": [
            {
                "number": k,
                "usage": float(bank["usage"][row, k]),
                "like": int(others[k].argmax()),
                "like_cosine": float(others[k].max()),
            }
            for k in range(len(own))
        ],
        "similarity": np.round(cosine, 4).tolist(),
    }


def assigned(seen: Seen, prototypes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prototype and k-means cluster of every cell: uint16 [M, N] each, NODATA where nothing is valid. k-means has as
    many clusters as there are prototypes [P, D] and is fitted to all valid cells; its clusters are numbered like the
    prototypes whose cells they share, for the eye alone.
    """
    own, clusters = (np.full(seen.valid.shape, banks.NO_PROTOTYPE, np.uint16) for _ in range(2))
    nearest = (seen.features[seen.valid] @ unit(prototypes).T).argmax(-1)
    own[seen.valid] = nearest
    found = assignment.kmeans(seen.features[seen.valid], len(prototypes), seed)
    clusters[seen.valid] = assignment.matched(found, nearest, len(prototypes))
    return own, clusters


def data_report(seen: Seen, own: np.ndarray, prototypes: np.ndarray, seed: int) -> dict[str, Any]:
    """What the region's places say about its prototypes, JSON-able."""
    count = len(prototypes)
    cosine = seen.features @ unit(prototypes).T
    share = assignment.shares(own[seen.valid], count)
    order, best = assignment.best_of_places(cosine, seen.valid, NEAREST)
    return {
        "places": len(seen.names),
        "cells": int(seen.valid.sum()),
        "kmeans_seed": seed,
        "fit": float(cosine.max(-1)[seen.valid].mean()),
        "share_entropy": assignment.entropy(share),
        "share": share.tolist(),
        "nearest": [
            [
                {"place": seen.names[m], "lon": float(seen.lon[m]), "lat": float(seen.lat[m]), "cosine": float(value)}
                for m, value in zip(order[k], best[k])
                if np.isfinite(value)
            ]
            for k in range(count)
        ],
    }


def agreement(seen: Seen, own: np.ndarray, clusters: np.ndarray, places: slice) -> dict[str, Any]:
    """Adjusted mutual information with the label map over the labelled valid cells of some places; None where they
    have fewer than two classes."""
    valid = seen.valid[places]
    label, own, clusters = (one[places][valid] for one in (seen.label, own, clusters))
    labelled = label[label != UNLABELLED]
    return {
        "cells": len(labelled),
        "classes": len(np.unique(labelled)),
        "prototypes": assignment.agreement(own, label),
        "kmeans": assignment.agreement(clusters, label),
    }
