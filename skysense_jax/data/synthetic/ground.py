"""The ground of a synthetic place of one scene type: materials, land cover, heights, texture on the fine (HR) grid.

Everything is procedural and drawn from one numpy Generator: rotated lots, parcels, jittered crowns and smooth random
fields. A scene type sets what most of the ground is; every place also gets patches of other cover, roads and terrain,
so that no scene type is one colour. The sensors (:mod:`skysense_jax.data.synthetic.instruments`) see nothing but what
is defined here. Synthetic: made for testing a pipeline, not for claims about the Earth.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from skysense_jax.data.synthetic.world import (
    ASPHALT,
    CONIFER,
    COVER_OF_MATERIAL,
    DECIDUOUS,
    GRASS,
    GREY_ROOF,
    METAL_ROOF,
    SCENES,
    SOIL,
    SUMMER_CROP,
    TILE_ROOF,
    WATER,
    WINTER_CROP,
)


class Land(NamedTuple):
    """Ground of one place, S = tile * ratio fine pixels along it.

    Attributes:
        material: uint8 [S, S] index into MATERIALS.
        cover: uint8 [S, S] key of LAND_COVER.
        canopy: float32 [S, S] metres above the terrain.
        terrain: float32 [S, S] metres above sea level.
        tone: float32 [S, S] brightness factor of crowns, rows, roofs (mean about 1).
        vigour: float32 [S, S] factor of green cover (mean about 1).
    """

    material: np.ndarray
    cover: np.ndarray
    canopy: np.ndarray
    terrain: np.ndarray
    tone: np.ndarray
    vigour: np.ndarray


class _Axes(NamedTuple):
    """Positions of fine pixels in metres along the two turned axes of a place, along which parcels and rows lie."""

    u: np.ndarray
    v: np.ndarray

    def within(self, region: np.ndarray) -> _Axes:
        """The positions of the pixels of a region."""
        return _Axes(self.u[region], self.v[region])


class _Stand(NamedTuple):
    """Trees on a jittered lattice.

    Attributes:
        spacing: metres between trees.
        jitter: 0 = a regular lattice, 1 = anywhere in the lattice cell.
        keep: share of the lattice cells that have a tree.
        height: metres, on average.
        cone: whether a crown is a cone (else half a sphere).
    """

    spacing: float
    jitter: float
    keep: float
    height: float
    cone: bool = False


class _Town(NamedTuple):
    """How a town is built.

    Attributes:
        lot_u, lot_v: least and largest size of a lot, in metres.
        street: width of a street, in metres.
        cross_street: number of lots between two cross streets.
        fill: least and largest share of the lot under the building, along each side.
        heights: least and largest height of the eaves, in metres.
        roofs: share of tile, grey and metal roofs.
        pitch: height of the ridge above the eaves, in metres.
        paved: whether the ground between the buildings is asphalt (else gardens).
    """

    lot_u: tuple[float, float]
    lot_v: tuple[float, float]
    street: float
    cross_street: int
    fill: tuple[float, float]
    heights: tuple[float, float]
    roofs: tuple[float, float, float]
    pitch: float
    paved: bool


_INDUSTRIAL = _Town(
    lot_u=(50, 75),
    lot_v=(45, 70),
    street=9.0,
    cross_street=1,
    fill=(0.5, 0.85),
    heights=(6, 14),
    roofs=(0.1, 0.45, 0.45),
    pitch=0.0,
    paved=True,
)
_RESIDENTIAL = _Town(
    lot_u=(18, 26),
    lot_v=(24, 32),
    street=6.0,
    cross_street=4,
    fill=(0.35, 0.6),
    heights=(4, 9),
    roofs=(0.45, 0.4, 0.15),
    pitch=2.5,
    paved=False,
)


def smooth_field(rng: np.random.Generator, size: int, waves: float) -> np.ndarray:
    """A Gaussian random field of mean 0 and deviation 1.

    Args:
        rng: source of all randomness.
        size: pixels along the field.
        waves: undulations across the field, about.

    Returns:
        float32 [size, size].
    """
    n = min(int(3 * waves) + 1, size // 2)
    f = np.arange(-n, n + 1)
    decay = np.exp(-0.5 * (f[:, None] ** 2 + np.arange(n + 1)[None, :] ** 2) / waves**2)
    spectrum = np.zeros((size, size // 2 + 1), np.complex64)
    noise = rng.standard_normal((2, 2 * n + 1, n + 1), np.float32)
    spectrum[f[:, None] % size, np.arange(n + 1)[None, :]] = (noise[0] + 1j * noise[1]) * decay
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, (size, size)).astype(np.float32)
    return field / field.std()


def _cells(axes: _Axes, du: float, dv: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """The cells of a lattice of du x dv metres: (i, j, x, y, shape).

    i, j: cell indices from 1, so that neighbours exist. x, y: position inside the cell in metres. shape: shape of a
    table that covers all cells.
    """
    i, j = np.floor(axes.u / du).astype(np.int32), np.floor(axes.v / dv).astype(np.int32)
    x, y = axes.u - i * np.float32(du), axes.v - j * np.float32(dv)
    i, j = i - i.min() + 1, j - j.min() + 1
    return i, j, x, y, (int(i.max()) + 2, int(j.max()) + 2)


def _crowns(rng: np.random.Generator, axes: _Axes, stand: _Stand) -> tuple[np.ndarray, np.ndarray]:
    """Tree crowns at the positions of `axes`, float32: (height in metres, 0 between crowns; tone of the top crown)."""
    size, spacing = axes.u.shape, stand.spacing
    if not axes.u.size:
        return np.zeros(size, np.float32), np.ones(size, np.float32)
    i, j, x, y, shape = _cells(axes, spacing, spacing)
    offset = (0.5 + stand.jitter * rng.uniform(-0.5, 0.5, (2, *shape))).astype(np.float32) * spacing
    radius = (spacing * rng.uniform(0.4, 0.68, shape)).astype(np.float32)
    grows = rng.uniform(size=shape) < stand.keep
    top = np.where(grows, stand.height * rng.uniform(0.7, 1.2, shape), 0.0).astype(np.float32)
    shade = rng.uniform(0.75, 1.25, shape).astype(np.float32)
    height, tone = np.zeros(size, np.float32), np.ones(size, np.float32)
    table = np.stack([offset[0], offset[1], 1 / radius**2, top, shade], -1)
    for a in (-1, 0, 1):
        for b in (-1, 0, 1):
            t = table[i + a, j + b]
            d2 = ((x - t[..., 0] - a * spacing) ** 2 + (y - t[..., 1] - b * spacing) ** 2) * t[..., 2]
            inside = 1 - d2
            crown = t[..., 3] * ((1 - 0.75 * np.sqrt(d2)) if stand.cone else (0.45 + 0.55 * np.sqrt(inside.clip(0))))
            taller = (inside > 0) & (crown > height)
            height, tone = np.where(taller, crown, height), np.where(taller, t[..., 4], tone)
    return height, tone


def _build(rng: np.random.Generator, land: Land, axes: _Axes, region: np.ndarray, town: _Town) -> None:
    """Lays streets, lots and buildings over `region` (changes `land` in place)."""
    du, dv, street = rng.uniform(*town.lot_u), rng.uniform(*town.lot_v), town.street
    i, j, x, y, shape = _cells(axes, du, dv)
    street_v = (j % 2 == 0) & (y < street)
    street_u = (x < street) & (i % town.cross_street == 0)
    half = rng.uniform(*town.fill, (2, *shape)) / 2 * np.array([du - street * town.paved, dv - street])[:, None, None]
    lot = np.array([du, dv])[:, None, None]
    centre = lot / 2 + rng.uniform(-0.06, 0.06, (2, *shape)) * lot
    centre += np.array([street / 2 * town.paved, street / 2])[:, None, None]
    built = rng.uniform(size=shape) < 0.92
    shares = rng.dirichlet(np.array(town.roofs) * 3)
    roof = np.array([TILE_ROOF, GREY_ROOF, METAL_ROOF])[rng.choice(3, shape, p=shares)]
    eaves = rng.uniform(*town.heights, shape)
    shade = rng.uniform(0.7, 1.3, shape)
    table = np.stack([half[0], half[1], centre[0], centre[1], built, roof, eaves, shade], -1).astype(np.float32)[i, j]
    dx, dy = np.abs(x - table[..., 2]), y - table[..., 3]
    inside = region & (dx < table[..., 0]) & (np.abs(dy) < table[..., 1]) & (table[..., 4] > 0)
    ground = np.where(street_u | street_v | town.paved, ASPHALT, GRASS)
    land.material[region] = ground[region]
    land.canopy[region], land.tone[region] = 0.0, 1.0
    if not town.paved:
        garden = region & ~(street_u | street_v)
        trees = _Stand(spacing=7.0, jitter=0.9, keep=rng.uniform(0.05, 0.35), height=8.0)
        _plant(land, garden, *_crowns(rng, axes.within(garden), trees))
    roof_height = table[..., 6] + town.pitch * (1 - np.abs(dy) / table[..., 1].clip(1))
    side = np.where(dy > 0, 1.18, 0.82) if town.pitch else 1.0
    land.material[inside] = table[..., 5][inside].astype(np.uint8)
    land.canopy[inside] = roof_height[inside]
    land.tone[inside] = (table[..., 7] * side)[inside]


def _plant(
    land: Land, region: np.ndarray, height: np.ndarray, tone: np.ndarray, leaf: np.ndarray | int = DECIDUOUS
) -> None:
    """Puts trees (values at the pixels of `region`, height 0 = no tree there) on the ground (in place)."""
    tree = height > 0
    crowns = region.copy()
    crowns[region] = tree
    land.material[crowns] = leaf[tree] if isinstance(leaf, np.ndarray) else leaf
    land.canopy[crowns], land.tone[crowns] = height[tree], tone[tree]


def _sow(rng: np.random.Generator, land: Land, axes: _Axes, region: np.ndarray, main: int) -> None:
    """Lays field parcels over `region` (changes `land` in place).

    Most have the material `main`, the others other crops, grass or fallow soil; the sown rows lie along either axis.
    """
    i, j, x, y, shape = _cells(axes, rng.uniform(35, 80), rng.uniform(45, 110))
    other = np.array([WINTER_CROP, SUMMER_CROP, GRASS, SOIL])
    kind = np.where(rng.uniform(size=shape) < 0.85, main, rng.choice(other, shape, p=[0.3, 0.3, 0.25, 0.15]))
    tone, vigour = rng.uniform(0.85, 1.15, shape), rng.uniform(0.7, 1.15, shape)
    spacing, along = rng.uniform(2.0, 4.5, shape), rng.uniform(size=shape) < 0.5
    table = np.stack([kind, tone, vigour, 2 * np.pi / spacing, along], -1).astype(np.float32)[i, j]
    rows = np.sin(np.where(table[..., 4] > 0, axes.u, axes.v) * table[..., 3])
    strength = np.where(table[..., 0] == GRASS, 0.0, 0.13)
    track = (x < 2.5) | (y < 2.5)
    land.material[region] = np.where(track, SOIL, table[..., 0])[region].astype(np.uint8)
    land.tone[region] = (table[..., 1] * (1 + strength * rows))[region]
    land.vigour[region] *= table[..., 2][region]
    crop = region & ~track & ((land.material == WINTER_CROP) | (land.material == SUMMER_CROP))
    land.canopy[region] = 0.0
    land.canopy[crop] = 0.8


def _lay(rng: np.random.Generator, land: Land, axes: _Axes, region: np.ndarray, scene: str) -> None:
    """Lays one kind of ground over `region` (changes `land` in place)."""
    size = land.material.shape[0]
    if not region.any():
        return
    land.canopy[region], land.tone[region] = 0.0, 1.0
    if scene in ("conifer forest", "deciduous forest"):
        cone = scene == "conifer forest"
        land.material[region] = GRASS
        stand = _Stand(
            spacing=rng.uniform(4.0, 7.0),
            jitter=0.95,
            keep=rng.uniform(0.8, 0.98),
            height=rng.uniform(12, 24),
            cone=cone,
        )
        height, tone = _crowns(rng, axes.within(region), stand)
        # A forest is rarely pure: a minority of the other kind in coherent groups.
        mixed = smooth_field(rng, size, 6.0)[region] > rng.uniform(0.7, 2.5)
        _plant(land, region, height, tone, np.where(mixed ^ cone, CONIFER, DECIDUOUS).astype(np.uint8))
    elif scene in ("winter crops", "summer crops"):
        _sow(rng, land, axes, region, WINTER_CROP if scene == "winter crops" else SUMMER_CROP)
    elif scene == "pasture":
        land.material[region] = GRASS
        grove = region & (smooth_field(rng, size, 4.0) > 0)
        stand = _Stand(spacing=8.0, jitter=0.95, keep=rng.uniform(0.0, 0.3), height=7.0)
        _plant(land, grove, *_crowns(rng, axes.within(grove), stand))
    elif scene == "orchard":
        land.material[region] = SOIL if rng.uniform() < 0.25 else GRASS
        stand = _Stand(spacing=rng.uniform(4.5, 8.0), jitter=0.15, keep=rng.uniform(0.75, 0.98), height=4.5)
        _plant(land, region, *_crowns(rng, axes.within(region), stand))
    elif scene in ("residential", "industrial"):
        _build(rng, land, axes, region, _INDUSTRIAL if scene == "industrial" else _RESIDENTIAL)
    elif scene == "bare":
        land.material[region] = SOIL
    elif scene == "water":
        land.material[region] = WATER
    else:
        raise ValueError(f"unknown scene {scene!r}; known: {', '.join(SCENES)}, bare, water")
    land.cover[region] = COVER_OF_MATERIAL[land.material[region]]
    if scene == "orchard":
        land.cover[region & (land.material == DECIDUOUS)] = 4


def make_land(rng: np.random.Generator, tile: int, ratio: int, gsd: float, scene: str) -> Land:
    """Draws the ground of one place.

    Args:
        rng: source of all randomness.
        tile: base pixels along the place.
        ratio: fine pixels along a base pixel.
        gsd: metres of a base pixel.
        scene: scene type of most of the ground (SCENES).

    Returns:
        The ground.
    """
    size, step = tile * ratio, gsd / ratio
    angle, shift = rng.uniform(0, np.pi), rng.uniform(0, 500, 2)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * np.float32(step)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    axes = _Axes(u=c * x + s * y + np.float32(shift[0]), v=c * y - s * x + np.float32(shift[1]))
    extent = tile * gsd / 160.0
    slope, azimuth = abs(rng.normal(0, 0.08)), rng.uniform(0, 2 * np.pi)
    terrain = rng.gamma(1.5, 250) + slope * (np.cos(azimuth) * x + np.sin(azimuth) * y)
    terrain = terrain + rng.gamma(2, 1.5) * smooth_field(rng, size, 1.5 * extent)
    vigour = (1 + 0.12 * smooth_field(rng, size, 4 * extent)).clip(0.5, 1.4)
    land = Land(
        material=np.full((size, size), GRASS, np.uint8),
        cover=np.full((size, size), 3, np.uint8),
        canopy=np.zeros((size, size), np.float32),
        terrain=terrain.astype(np.float32),
        tone=np.ones((size, size), np.float32),
        vigour=vigour.astype(np.float32),
    )
    _lay(rng, land, axes, np.ones((size, size), bool), scene)
    # Patches of other ground: up to two fifths of the place, so that the means of the bands say little about the scene.
    others = ("conifer forest", "deciduous forest", "winter crops", "summer crops", "pasture", "bare", "water")
    for share in rng.choice([0.0, 0.1, 0.2], 2, p=[0.3, 0.35, 0.35]):
        kind = str(rng.choice(others, p=[0.17, 0.2, 0.15, 0.15, 0.18, 0.07, 0.08]))
        if share > 0 and kind != scene:
            field = smooth_field(rng, size, 1.6 * extent)
            _lay(rng, land, axes, field > np.quantile(field[::4, ::4], 1 - share), kind)
    if rng.uniform() < 0.45:
        width, position = rng.uniform(4, 9), rng.uniform(0.2, 0.8)
        across = axes.v if rng.uniform() < 0.5 else axes.u
        line = across.min() + position * (across.max() - across.min())
        road = np.abs(across + 6 * np.sin((axes.u + axes.v - across) / 60) - line) < width / 2
        land.material[road], land.cover[road], land.canopy[road], land.tone[road] = ASPHALT, 5, 0.0, 1.0
    return land
