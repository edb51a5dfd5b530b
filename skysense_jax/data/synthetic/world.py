"""Synthetic worlds: materials, land cover, scene types, and what the label of a place means in each kind of world."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MATERIALS = (
    "water",
    "conifer",
    "deciduous",
    "grass",
    "winter_crop",
    "summer_crop",
    "soil",
    "tile_roof",
    "grey_roof",
    "metal_roof",
    "asphalt",
)
WATER, CONIFER, DECIDUOUS, GRASS, WINTER_CROP, SUMMER_CROP, SOIL, TILE_ROOF, GREY_ROOF, METAL_ROOF, ASPHALT = range(
    len(MATERIALS)
)

LAND_COVER = {1: "water", 2: "forest", 3: "grassland", 4: "cropland", 5: "built-up", 6: "bare"}
COVER_OF_MATERIAL = np.array([1, 2, 2, 3, 4, 4, 6, 5, 5, 5, 5], np.uint8)

SCENES = (
    "conifer forest",
    "deciduous forest",
    "winter crops",
    "summer crops",
    "pasture",
    "orchard",
    "residential",
    "industrial",
)
"""Scene types: pairs that share their materials and differ in season (forests, crops), in texture (pasture, orchard) or
in structure (towns)."""

REGIONS = ((10, 45.0), (13, 34.0), (15, 45.0), (18, 34.0), (31, 45.0), (34, 45.0), (36, 34.0), (49, 34.0))
"""Where the regions of a regional world lie: (northern UTM zone, latitude). Each is well inside a square of 1000 km of
the equal-area grid, and no two are in the same square; all are in the north, so that no season tells a region."""

WORLDS = {"plain": len(SCENES), "regional": 4, "permuted": len(SCENES)}
"""World -> number of scene labels.
plain: the label of a place is its scene type, wherever it lies.
regional: every region has the same four labels; which scene type each of them looks like depends on the region, and a
    region shows four of the eight types. Over all regions, a place of any type has each label equally often: an image
    says nothing about the label, image and region together say it.
permuted: the same with eight labels: every region shows all types, so that regions differ in nothing but in what the
    types are called.
The last two are constructed so that location carries information; the Earth need not be like that."""


class Site(NamedTuple):
    """What is decided before a place is drawn.

    Attributes:
        label: the scene label.
        scene: the scene type (SCENES).
        region: index into REGIONS; None = anywhere.
        turn: how many earlier places have the same label and region; a turn is complete once every label in every
            region has had it.
    """

    label: str
    scene: str
    region: int | None
    turn: int


def site(world: str, seed: int, index: int) -> Site:
    """The site of a place: labels and, in a world that has them, regions in turn, so that all are equally frequent.

    In region r label k looks like type order[(shift[r] + k) mod 8] with order and shift drawn from the seed: one label
    per type and region, and all labels over the regions.

    Args:
        world: kind of world (WORLDS).
        seed: seed of the world.
        index: number of the place.

    Returns:
        The site.

    Raises:
        ValueError: there is no such world.
    """
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; known: {', '.join(WORLDS)}")
    labels = WORLDS[world]
    turn, label = divmod(index, labels)
    if world == "plain":
        return Site(SCENES[label], SCENES[label], None, turn)
    turn, region = divmod(turn, len(REGIONS))
    rng = np.random.default_rng([seed, 0, 1])  # places are seeded by [seed, index]
    order, shift = rng.permutation(len(SCENES)), rng.permutation(len(SCENES))
    return Site(f"label {label}", SCENES[order[(shift[region] + label) % len(SCENES)]], region, turn)
