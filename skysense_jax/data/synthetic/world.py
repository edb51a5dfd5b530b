"""The ground of a synthetic place of one scene type: materials, land cover, heights, texture on the fine (HR) grid.

Everything is procedural and drawn from one numpy Generator: rotated lots, parcels, jittered crowns and smooth random
fields. A scene type sets what most of the ground is; every place also gets patches of other cover, roads and terrain,
so that no scene type is one colour. The sensors (:mod:`skysense_jax.data.synthetic.instruments`) only see what is defined
here. Synthetic: made for testing a pipeline, not for claims about the Earth.
"""

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
the equal-area grid, no two in one; all in the north, so that no season tells a region."""

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
    """What is decided before a place is drawn. label: text. scene: of SCENES. region: of REGIONS, None: anywhere.
    turn: how many places before this one have the same label and region; no turn is complete without all of them."""

    label: str
    scene: str
    region: int | None
    turn: int


def site(world: str, seed: int, index: int) -> Site:
    """Place `index` of a world: labels and, in a world that has them, regions in turn, so that each is as frequent.

    In region r label k looks like type order[(shift[r] + k) mod 8] with order and shift drawn from the seed: one label
    per type and region, and all labels over the regions. ValueError: no such world.
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


class Land(NamedTuple):
    """Ground of one place, S = tile * ratio fine pixels.

    material: uint8[S, S] index into MATERIALS. cover: uint8[S, S] key of LAND_COVER. canopy: float32[S, S] metres above
    the terrain. terrain: float32[S, S] metres above sea level. tone: float32[S, S] brightness factor of crowns, rows,
    roofs (mean about 1). vigour: float32[S, S] factor of green cover (mean about 1).
    """

    material: np.ndarray
    cover: np.ndarray
    canopy: np.ndarray
    terrain: np.ndarray
    tone: np.ndarray
    vigour: np.ndarray


def smooth_field(rng: np.random.Generator, size: int, waves: float) -> np.ndarray:
    """Gaussian random field float32[size, size], mean 0 and deviation 1, with about `waves` undulations across it."""
    n = min(int(3 * waves) + 1, size // 2)
    f = np.arange(-n, n + 1)
    decay = np.exp(-0.5 * (f[:, None] ** 2 + np.arange(n + 1)[None, :] ** 2) / waves**2)
    spectrum = np.zeros((size, size // 2 + 1), np.complex64)
    noise = rng.standard_normal((2, 2 * n + 1, n + 1), np.float32)
    spectrum[f[:, None] % size, np.arange(n + 1)[None, :]] = (noise[0] + 1j * noise[1]) * decay
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, (size, size)).astype(np.float32)
    return field / field.std()


def _cells(
    u: np.ndarray, v: np.ndarray, du: float, dv: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """Cell indices (from 1, so that neighbours exist), position inside the cell in metres, and the table shape that
    covers all cells."""
    i, j = np.floor(u / du).astype(np.int32), np.floor(v / dv).astype(np.int32)
    x, y = u - i * np.float32(du), v - j * np.float32(dv)
    i, j = i - i.min() + 1, j - j.min() + 1
    return i, j, x, y, (int(i.max()) + 2, int(j.max()) + 2)


def _crowns(
    rng: np.random.Generator,
    u: np.ndarray,
    v: np.ndarray,
    spacing: float,
    jitter: float,
    keep: float,
    height: float,
    cone: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Tree crowns on a jittered lattice at positions u, v: (height in metres, 0 between crowns; tone of the crown on
    top), float32."""
    if not u.size:
        return np.zeros(u.shape, np.float32), np.ones(u.shape, np.float32)
    i, j, x, y, shape = _cells(u, v, spacing, spacing)
    offset = (0.5 + jitter * rng.uniform(-0.5, 0.5, (2, *shape))).astype(np.float32) * spacing
    radius = (spacing * rng.uniform(0.4, 0.68, shape)).astype(np.float32)
    top = np.where(rng.uniform(size=shape) < keep, height * rng.uniform(0.7, 1.2, shape), 0.0).astype(np.float32)
    shade = rng.uniform(0.75, 1.25, shape).astype(np.float32)
    best, tone = np.zeros(u.shape, np.float32), np.ones(u.shape, np.float32)
    table = np.stack([offset[0], offset[1], 1 / radius**2, top, shade], -1)
    for a in (-1, 0, 1):
        for b in (-1, 0, 1):
            t = table[i + a, j + b]
            d2 = ((x - t[..., 0] - a * spacing) ** 2 + (y - t[..., 1] - b * spacing) ** 2) * t[..., 2]
            inside = 1 - d2
            here = t[..., 3] * ((1 - 0.75 * np.sqrt(d2)) if cone else (0.45 + 0.55 * np.sqrt(inside.clip(0))))
            taller = (inside > 0) & (here > best)
            best, tone = np.where(taller, here, best), np.where(taller, t[..., 4], tone)
    return best, tone


def _lots(
    rng: np.random.Generator, land: Land, u: np.ndarray, v: np.ndarray, region: np.ndarray, industrial: bool
) -> None:
    """Streets, lots and buildings in `region` (changes `land` in place)."""
    if industrial:
        du, dv, street, fill, heights, roofs = (
            rng.uniform(50, 75),
            rng.uniform(45, 70),
            9.0,
            (0.5, 0.85),
            (6, 14),
            (0.1, 0.45, 0.45),
        )
    else:
        du, dv, street, fill, heights, roofs = (
            rng.uniform(18, 26),
            rng.uniform(24, 32),
            6.0,
            (0.35, 0.6),
            (4, 9),
            (0.45, 0.4, 0.15),
        )
    i, j, x, y, shape = _cells(u, v, du, dv)
    street_v = (j % 2 == 0) & (y < street)
    street_u = (x < street) & (i % (1 if industrial else 4) == 0)
    half = rng.uniform(*fill, (2, *shape)) / 2 * np.array([du - street * industrial, dv - street])[:, None, None]
    centre = (
        np.array([du, dv])[:, None, None] / 2
        + rng.uniform(-0.06, 0.06, (2, *shape)) * np.array([du, dv])[:, None, None]
    )
    centre += np.array([street / 2 * industrial, street / 2])[:, None, None]
    built = rng.uniform(size=shape) < 0.92
    roof = np.array([TILE_ROOF, GREY_ROOF, METAL_ROOF])[rng.choice(3, shape, p=rng.dirichlet(np.array(roofs) * 3))]
    eaves = rng.uniform(*heights, shape)
    shade = rng.uniform(0.7, 1.3, shape)
    table = np.stack([half[0], half[1], centre[0], centre[1], built, roof, eaves, shade], -1).astype(np.float32)[i, j]
    dx, dy = np.abs(x - table[..., 2]), y - table[..., 3]
    inside = region & (dx < table[..., 0]) & (np.abs(dy) < table[..., 1]) & (table[..., 4] > 0)
    ground = np.where(street_u | street_v | industrial, ASPHALT, GRASS)
    land.material[region] = ground[region]
    land.canopy[region], land.tone[region] = 0.0, 1.0
    if not industrial:
        garden = region & ~(street_u | street_v)
        _plant(land, garden, *_crowns(rng, u[garden], v[garden], 7.0, 0.9, rng.uniform(0.05, 0.35), 8.0, False))
    pitch = 0.0 if industrial else 2.5
    roof_height = table[..., 6] + pitch * (1 - np.abs(dy) / table[..., 1].clip(1))
    side = 1.0 if industrial else np.where(dy > 0, 1.18, 0.82)
    land.material[inside] = table[..., 5][inside].astype(np.uint8)
    land.canopy[inside] = roof_height[inside]
    land.tone[inside] = (table[..., 7] * side)[inside]


def _plant(
    land: Land, region: np.ndarray, height: np.ndarray, tone: np.ndarray, leaf: np.ndarray | int = DECIDUOUS
) -> None:
    """Puts trees (values at the pixels of `region`, height 0 = no tree there) on the ground (in place)."""
    tree = height > 0
    at = region.copy()
    at[region] = tree
    land.material[at] = leaf[tree] if isinstance(leaf, np.ndarray) else leaf
    land.canopy[at], land.tone[at] = height[tree], tone[tree]


def _parcels(rng: np.random.Generator, land: Land, u: np.ndarray, v: np.ndarray, region: np.ndarray, main: int) -> None:
    """Field parcels in `region`: mostly the material `main`, other crops, grass or fallow soil; sown rows along either
    side (in place)."""
    i, j, x, y, shape = _cells(u, v, rng.uniform(35, 80), rng.uniform(45, 110))
    other = np.array([WINTER_CROP, SUMMER_CROP, GRASS, SOIL])
    kind = np.where(rng.uniform(size=shape) < 0.85, main, rng.choice(other, shape, p=[0.3, 0.3, 0.25, 0.15]))
    tone, vigour = rng.uniform(0.85, 1.15, shape), rng.uniform(0.7, 1.15, shape)
    spacing, along = rng.uniform(2.0, 4.5, shape), rng.uniform(size=shape) < 0.5
    table = np.stack([kind, tone, vigour, 2 * np.pi / spacing, along], -1).astype(np.float32)[i, j]
    rows = np.sin(np.where(table[..., 4] > 0, u, v) * table[..., 3])
    strength = np.where(table[..., 0] == GRASS, 0.0, 0.13)
    track = (x < 2.5) | (y < 2.5)
    land.material[region] = np.where(track, SOIL, table[..., 0])[region].astype(np.uint8)
    land.tone[region] = (table[..., 1] * (1 + strength * rows))[region]
    land.vigour[region] *= table[..., 2][region]
    crop = region & ~track & ((land.material == WINTER_CROP) | (land.material == SUMMER_CROP))
    land.canopy[region] = 0.0
    land.canopy[crop] = 0.8


def _paint(rng: np.random.Generator, land: Land, u: np.ndarray, v: np.ndarray, region: np.ndarray, scene: str) -> None:
    """Lays one kind of ground over `region` (in place)."""
    if not region.any():
        return
    land.canopy[region], land.tone[region] = 0.0, 1.0
    if scene in ("conifer forest", "deciduous forest"):
        cone = scene == "conifer forest"
        land.material[region] = GRASS
        height, tone = _crowns(
            rng, u[region], v[region], rng.uniform(4.0, 7.0), 0.95, rng.uniform(0.8, 0.98), rng.uniform(12, 24), cone
        )
        # A forest is rarely pure: a minority of the other kind in coherent groups.
        mixed = smooth_field(rng, u.shape[0], 6.0)[region] > rng.uniform(0.7, 2.5)
        _plant(land, region, height, tone, np.where(mixed ^ cone, CONIFER, DECIDUOUS).astype(np.uint8))
    elif scene in ("winter crops", "summer crops"):
        _parcels(rng, land, u, v, region, WINTER_CROP if scene == "winter crops" else SUMMER_CROP)
    elif scene == "pasture":
        land.material[region] = GRASS
        grove = region & (smooth_field(rng, u.shape[0], 4.0) > 0)
        _plant(land, grove, *_crowns(rng, u[grove], v[grove], 8.0, 0.95, rng.uniform(0.0, 0.3), 7.0, False))
    elif scene == "orchard":
        land.material[region] = SOIL if rng.uniform() < 0.25 else GRASS
        _plant(
            land,
            region,
            *_crowns(rng, u[region], v[region], rng.uniform(4.5, 8.0), 0.15, rng.uniform(0.75, 0.98), 4.5, False),
        )
    elif scene in ("residential", "industrial"):
        _lots(rng, land, u, v, region, scene == "industrial")
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
    """Ground of one place of `tile` base pixels of `gsd` metres, `ratio` fine pixels along each, dominated by `scene`
    (see SCENES)."""
    size, step = tile * ratio, gsd / ratio
    angle, shift = rng.uniform(0, np.pi), rng.uniform(0, 500, 2)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * np.float32(step)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = c * x + s * y + np.float32(shift[0]), c * y - s * x + np.float32(shift[1])
    extent = tile * gsd / 160.0
    slope, azimuth = abs(rng.normal(0, 0.08)), rng.uniform(0, 2 * np.pi)
    terrain = rng.gamma(1.5, 250) + slope * (np.cos(azimuth) * x + np.sin(azimuth) * y)
    terrain = terrain + rng.gamma(2, 1.5) * smooth_field(rng, size, 1.5 * extent)
    vigour = (1 + 0.12 * smooth_field(rng, size, 4 * extent)).clip(0.5, 1.4)
    land = Land(
        np.full((size, size), GRASS, np.uint8),
        np.full((size, size), 3, np.uint8),
        np.zeros((size, size), np.float32),
        terrain.astype(np.float32),
        np.ones((size, size), np.float32),
        vigour.astype(np.float32),
    )
    _paint(rng, land, u, v, np.ones((size, size), bool), scene)
    # Patches of other ground: up to two fifths of the place, so that the means of the bands say little about the scene.
    others = ("conifer forest", "deciduous forest", "winter crops", "summer crops", "pasture", "bare", "water")
    for share in rng.choice([0.0, 0.1, 0.2], 2, p=[0.3, 0.35, 0.35]):
        kind = str(rng.choice(others, p=[0.17, 0.2, 0.15, 0.15, 0.18, 0.07, 0.08]))
        if share > 0 and kind != scene:
            field = smooth_field(rng, size, 1.6 * extent)
            _paint(rng, land, u, v, field > np.quantile(field[::4, ::4], 1 - share), kind)
    if rng.uniform() < 0.45:
        width, at = rng.uniform(4, 9), rng.uniform(0.2, 0.8)
        across = v if rng.uniform() < 0.5 else u
        line = across.min() + at * (across.max() - across.min())
        road = np.abs(across + 6 * np.sin((u + v - across) / 60) - line) < width / 2
        land.material[road], land.cover[road], land.canopy[road], land.tone[road] = ASPHALT, 5, 0.0, 1.0
    return land
