"""How the sensors see a synthetic place: HR texture, Sentinel-2 with clouds, Sentinel-1 backscatter, surface model.

Sentinel-2 and Sentinel-1 mix the fine materials by area (linear mixing of reflectance, of power), green cover follows a
phenology curve per material, and every place and date has its own illumination, haze, calibration and look angle.
Spectra are round numbers after the usual shapes of spectral libraries (green vegetation, litter, soil, roofs, water).
Synthetic: made for testing a pipeline.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from skysense_jax.data.synthetic import world
from skysense_jax.data.synthetic.ground import Land, smooth_field

S2_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
"""Bands of a Level-2A product (B10 has none), the order in which spectra are given here."""

_WAVELENGTH = np.array([443, 490, 560, 665, 705, 740, 783, 842, 865, 945, 1610, 2190], np.float64)
_SPECTRA = {
    "crop": (0.020, 0.030, 0.060, 0.030, 0.090, 0.300, 0.400, 0.420, 0.440, 0.440, 0.200, 0.100),
    "grass": (0.030, 0.042, 0.075, 0.052, 0.110, 0.250, 0.310, 0.330, 0.345, 0.350, 0.230, 0.130),
    "broadleaf": (0.015, 0.022, 0.045, 0.024, 0.070, 0.240, 0.320, 0.340, 0.360, 0.360, 0.165, 0.075),
    "needle": (0.013, 0.019, 0.033, 0.020, 0.048, 0.150, 0.195, 0.210, 0.225, 0.230, 0.105, 0.048),
    "litter": (0.040, 0.055, 0.085, 0.105, 0.145, 0.185, 0.205, 0.225, 0.240, 0.250, 0.290, 0.210),
    "soil": (0.060, 0.080, 0.110, 0.150, 0.180, 0.200, 0.220, 0.240, 0.260, 0.260, 0.340, 0.290),
    "water": (0.040, 0.045, 0.045, 0.030, 0.026, 0.018, 0.015, 0.012, 0.010, 0.009, 0.005, 0.003),
    "tile_roof": (0.060, 0.070, 0.105, 0.200, 0.230, 0.250, 0.260, 0.270, 0.280, 0.280, 0.320, 0.300),
    "grey_roof": (0.130, 0.140, 0.150, 0.160, 0.165, 0.170, 0.175, 0.180, 0.185, 0.190, 0.210, 0.200),
    "metal_roof": (0.300, 0.330, 0.360, 0.380, 0.390, 0.400, 0.400, 0.410, 0.410, 0.410, 0.400, 0.360),
    "asphalt": (0.070, 0.080, 0.090, 0.100, 0.105, 0.110, 0.115, 0.120, 0.125, 0.125, 0.140, 0.130),
}
_S = {name: np.array(values) for name, values in _SPECTRA.items()}

# Mean backscatter sigma0 in dB (VV, VH): with leaves or standing crop, without; C band, middle of the swath.
_BACKSCATTER = {
    world.WATER: ((-19.0, -26.5), (-19.0, -26.5)),
    world.CONIFER: ((-9.5, -15.0), (-9.5, -15.2)),
    world.DECIDUOUS: ((-10.0, -15.3), (-9.0, -14.8)),
    world.GRASS: ((-12.5, -19.0), (-12.0, -19.5)),
    world.WINTER_CROP: ((-14.0, -19.5), (-10.5, -18.5)),
    world.SUMMER_CROP: ((-9.5, -15.2), (-11.0, -19.0)),
    world.SOIL: ((-11.0, -19.5), (-11.0, -19.5)),
    world.TILE_ROOF: ((-4.0, -12.0), (-4.0, -12.0)),
    world.GREY_ROOF: ((-4.0, -12.0), (-4.0, -12.0)),
    world.METAL_ROOF: ((-2.5, -12.5), (-2.5, -12.5)),
    world.ASPHALT: ((-15.0, -22.0), (-15.0, -22.0)),
}
_MEADOW_CUT = 16.0


class Climate(NamedTuple):
    """Season and variety of one place.

    Attributes:
        south: whether the seasons are shifted by half a year.
        spring, autumn, sowing: shifts in days.
        meadow_cut: day of the year.
        wetness: 0..1.
        reflectance: [material, band] factors; no two soils, species, roofs or stands are alike.
        backscatter: [material, 2] dB, for the same reason.
    """

    south: bool
    spring: float
    autumn: float
    sowing: float
    meadow_cut: float
    wetness: float
    reflectance: np.ndarray
    backscatter: np.ndarray


def draw_climate(rng: np.random.Generator, south: bool) -> Climate:
    """Draws the season and the variety of one place.

    Args:
        rng: source of all randomness.
        south: whether the place lies in the southern hemisphere.

    Returns:
        The climate.
    """
    slope = np.log(_WAVELENGTH / 800.0)
    count = (len(world.MATERIALS), 1)
    reflectance = np.exp(0.13 * rng.standard_normal(count) + 0.10 * rng.standard_normal(count) * slope)
    return Climate(
        south=south,
        spring=rng.normal(0, 12),
        autumn=rng.normal(0, 12),
        sowing=rng.normal(0, 10),
        meadow_cut=rng.uniform(150, 230),
        wetness=rng.uniform(0, 1),
        reflectance=reflectance,
        backscatter=rng.normal(0, 0.9, (len(world.MATERIALS), 2)),
    )


def _rise(day: float, middle: float, width: float) -> float:
    """A smooth step from 0 to 1 around the day `middle`."""
    return 1.0 / (1.0 + np.exp(-(day - middle) / width))


def green_cover(material: int, day: float, climate: Climate) -> float:
    """Green fraction of a material: leaf-out and fall, sowing and harvest, mowing, evergreen.

    Args:
        material: index into world.MATERIALS.
        day: day of the year, 0..365.
        climate: the place's season.

    Returns:
        The fraction, 0..1.
    """
    day = (day + 182.5 * climate.south) % 365.0
    if material == world.CONIFER:
        return 0.92 + 0.04 * float(np.cos((day - 200) / 365 * 2 * np.pi))
    if material == world.DECIDUOUS:
        return 0.12 + 0.83 * _rise(day, 112 + climate.spring, 8) * (1 - _rise(day, 292 + climate.autumn, 9))
    if material == world.GRASS:
        growth = 0.35 + 0.5 * _rise(day, 95 + climate.spring, 14) * (1 - _rise(day, 305 + climate.autumn, 14))
        since_cut = (day - climate.meadow_cut) % 365
        return growth * (1 - 0.45 * np.exp(-since_cut / _MEADOW_CUT) * (since_cut < 90))
    if material == world.WINTER_CROP:
        autumn = 0.3 * _rise(day, 300 + climate.sowing, 10)
        early = (
            (0.3 + 0.65 * _rise(day, 88 + climate.spring, 12)) * (1 - _rise(day, 178 + climate.spring, 7)) * (day < 280)
        )
        return 0.03 + autumn + early
    if material == world.SUMMER_CROP:
        return 0.03 + 0.92 * _rise(day, 163 + climate.sowing, 9) * (1 - _rise(day, 262 + climate.autumn, 8))
    return 0.0


def spectra(day: float, climate: Climate) -> np.ndarray:
    """Surface reflectance on a day of the year.

    Args:
        day: day of the year, 0..365.
        climate: the place's season and variety.

    Returns:
        float64 [material, band of S2_BANDS].
    """
    dry = _S["soil"] * (1 - 0.35 * climate.wetness)
    leaf = {
        world.CONIFER: (_S["needle"], _S["litter"]),
        world.DECIDUOUS: (_S["broadleaf"], 0.75 * _S["litter"]),
        world.GRASS: (_S["grass"], _S["litter"]),
        world.WINTER_CROP: (_S["crop"], 0.6 * dry + 0.4 * _S["litter"]),
        world.SUMMER_CROP: (_S["crop"], dry),
        world.SOIL: (dry, dry),
        world.WATER: (_S["water"],) * 2,
    }
    of_materials = []
    for index, name in enumerate(world.MATERIALS):
        green, bare = leaf[index] if index in leaf else (_S[name], _S[name])
        cover = green_cover(index, day, climate)
        of_materials.append(cover * green + (1 - cover) * bare)
    return np.stack(of_materials) * climate.reflectance


def fractions(land: Land, ratio: int, weight: np.ndarray | None = None) -> np.ndarray:
    """Area share of every material in every base pixel.

    Args:
        land: the ground, S x S fine pixels.
        ratio: fine pixels along a base pixel.
        weight: [S, S] weight of every fine pixel; None = 1.

    Returns:
        float32 [material, N, N] share, times the mean weight.
    """
    n = land.material.shape[0] // ratio
    pixel = np.arange(land.material.shape[0]) // ratio
    index = land.material.astype(np.int64) * (n * n) + pixel[:, None] * n + pixel[None, :]
    count = np.bincount(index.ravel(), None if weight is None else weight.ravel(), len(world.MATERIALS) * n * n)
    return (count / ratio**2).reshape(len(world.MATERIALS), n, n).astype(np.float32)


def label_map(land: Land, ratio: int) -> np.ndarray:
    """Majority land cover of every base pixel.

    Args:
        land: the ground, S x S fine pixels.
        ratio: fine pixels along a base pixel.

    Returns:
        uint8 [N, N] keys of LAND_COVER; 255 where no class has half of the pixel.
    """
    n = land.cover.shape[0] // ratio
    blocks = land.cover.reshape(n, ratio, n, ratio)
    share = np.stack([(blocks == key).mean((1, 3)) for key in world.LAND_COVER])
    names = np.array(list(world.LAND_COVER), np.uint8)
    return np.where(share.max(0) >= 0.5, names[share.argmax(0)], 255).astype(np.uint8)


def _blur(image: np.ndarray) -> np.ndarray:
    """Point spread over neighbouring pixels along the last two axes (1/6, 2/3, 1/6; edges repeat)."""
    for axis in (-2, -1):
        padded = np.pad(
            image, [(0, 0)] * (image.ndim - 2) + [(1, 1) if a == axis else (0, 0) for a in (-2, -1)], "edge"
        )
        n = image.shape[axis]
        before, middle, after = (np.take(padded, np.arange(k, k + n), axis) for k in range(3))
        image = (before + 4 * middle + after) / 6
    return image


def _shadow(land: Land, step: float, azimuth: float, elevation: float) -> np.ndarray:
    """Bool[S, S]: fine pixels in the cast shadow of crowns and buildings for a sun at two angles in radians."""
    height, size = land.canopy, land.canopy.shape[0]
    dark = np.zeros(height.shape, bool)
    reach = min(int(height.max() / np.tan(elevation) / step), size // 4)
    for k in range(1, reach + 1, 2):
        dy, dx = int(round(k * np.cos(azimuth))), int(round(-k * np.sin(azimuth)))
        target = (slice(max(dy, 0), size + min(dy, 0)), slice(max(dx, 0), size + min(dx, 0)))
        source = (slice(max(-dy, 0), size + min(-dy, 0)), slice(max(-dx, 0), size + min(-dx, 0)))
        dark[target] |= height[source] - k * step * np.tan(elevation) > height[target] + 0.3
    return dark


def render_hr(rng: np.random.Generator, land: Land, climate: Climate, day: float, step: float) -> np.ndarray:
    """An aerial image; sun, haze, colours, tones, blur and noise are drawn for every image.

    Args:
        rng: source of all randomness.
        land: the ground, S x S fine pixels.
        climate: the place's season and variety.
        day: day of the year, 0..365.
        step: metres of a fine pixel.

    Returns:
        uint8 [S, S, 3] (R, G, B).
    """
    colour = spectra(day, climate)[:, [3, 2, 1]].astype(np.float32)
    image = colour[land.material] * land.tone[..., None]
    south = -1.0 if climate.south else 1.0
    azimuth, elevation = south * rng.uniform(-0.9, 0.9) + np.pi * (south > 0), rng.uniform(0.5, 1.1)
    dz_y, dz_x = np.gradient(land.canopy)
    lit = 1 + 0.22 * (np.sin(azimuth) * dz_x - np.cos(azimuth) * dz_y) / step
    size = land.material.shape[0]
    speckle = 1 + 0.06 * rng.standard_normal((size, size), np.float32)
    water = land.material == world.WATER
    phase, wave = rng.uniform(0, 2 * np.pi), rng.uniform(4, 9)
    ramp = np.arange(size, dtype=np.float32) * np.float32(step * 2 * np.pi / wave)
    ripple = 0.04 * np.sin(ramp[:, None] * np.cos(phase) + ramp[None, :] * np.sin(phase) + smooth_field(rng, size, 5.0))
    light = np.where(water, 1 + ripple, lit.clip(0.4, 1.6) * speckle)
    light *= 1 + 0.05 * smooth_field(rng, size, 3.0)
    light = np.where(_shadow(land, step, azimuth, elevation), 0.42, light)
    if rng.uniform() < 0.5:
        light = (light + np.roll(light, 1, 0) + np.roll(light, 1, 1) + np.roll(light, (1, 1), (0, 1))) / 4
    balance = rng.uniform(0.85, 1.18, 3).astype(np.float32)
    exposure, gamma = rng.uniform(3.0, 6.5), rng.uniform(0.55, 0.85)
    haze = abs(rng.normal(0, 0.04)) * np.array([0.7, 0.9, 1.2], np.float32)
    shown = (image * light[..., None] * np.float32(exposure)).clip(0) ** np.float32(gamma) * balance + haze
    shown = shown * 190 + rng.uniform(1, 5) * rng.standard_normal((size, size, 1), np.float32)
    return shown.clip(0, 255).astype(np.uint8)


def render_s2(
    rng: np.random.Generator, share: np.ndarray, climate: Climate, day: float, place_gain: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One Level-2A acquisition.

    Clouds are thick cloud with its shadow, thin cloud and cirrus; the SCL misses part of the thin clouds, as the real
    SCL does.

    Args:
        rng: source of all randomness.
        share: [material, N, N], :func:`fractions` weighted by the vigour of the cover.
        climate: the place's season and variety.
        day: day of the year, 0..365.
        place_gain: factor of the reflectance at this place.

    Returns:
        (reflectance float64 [12, N, N]; SCL uint8 [N, N]; bool [N, N], False outside the swath).
    """
    n = share.shape[-1]
    clear = np.einsum("mhw,mb->bhw", share, spectra(day, climate))
    texture = 1 + 0.03 * rng.standard_normal((1, n, n)) + 0.01 * rng.standard_normal((len(S2_BANDS), n, n))
    clear = _blur(clear * texture)
    for band in (4, 5, 6, 8, 10, 11):  # measured at 20 m
        clear[band] = _coarse(clear[band])
    aerosol = abs(rng.normal(0, 0.014)) * (_WAVELENGTH / 490.0) ** -1.4
    image = (
        clear * (place_gain * (1 + rng.normal(0, 0.08))) * (1 + rng.normal(0, 0.02, (12, 1, 1)))
        + aerosol[:, None, None]
    )
    ndvi = (clear[7] - clear[3]) / (clear[7] + clear[3])
    scl = np.where(ndvi > 0.4, 4, np.where(share[world.WATER] > 0.6, 6, 5)).astype(np.uint8)
    if rng.uniform() < 0.55:
        cloudiness = smooth_field(rng, n, 1.3) + rng.normal(-1.3, 1.3)
        optical = np.clip(cloudiness, 0, 2.5)
        opacity = (1 - np.exp(-2.2 * optical)) * rng.uniform(0.6, 1.0)
        bright = rng.uniform(0.5, 0.85) * np.where(_WAVELENGTH > 1500, 0.75, 1.0)
        moved = np.roll(opacity, (int(rng.integers(2, 6)), int(rng.integers(-4, 5))), (0, 1))
        image = image * (1 - 0.55 * moved * (opacity < 0.2))
        image = image * (1 - opacity) + bright[:, None, None] * opacity
        scl = np.where((moved > 0.45) & (opacity < 0.2), 3, scl)
        scl = np.where(opacity > 0.25, 10, scl)
        scl = np.where(opacity > 0.45, 8, scl)
        scl = np.where(opacity > 0.7, 9, scl).astype(np.uint8)
    in_swath = np.ones((n, n), bool)
    if rng.uniform() < 0.08:
        y, x = np.mgrid[0:n, 0:n] / n - 0.5
        tilt = rng.uniform(0.15, 0.3)
        in_swath = (np.cos(tilt) * x + np.sin(tilt) * y) * rng.choice([-1, 1]) > rng.uniform(-0.4, 0.1)
    return image, np.where(in_swath, scl, 0).astype(np.uint8), in_swath


def _coarse(band: np.ndarray) -> np.ndarray:
    """A 20 m band on the 10 m grid: means of 2 x 2 pixels, repeated (odd sizes keep the last row and column)."""
    even = [n - n % 2 for n in band.shape]
    core = band[: even[0], : even[1]].reshape(even[0] // 2, 2, even[1] // 2, 2).mean((1, 3))
    out = band.copy()
    out[: even[0], : even[1]] = core.repeat(2, 0).repeat(2, 1)
    return out


def render_s1(
    rng: np.random.Generator, share: np.ndarray, climate: Climate, day: float, place_gain: float
) -> np.ndarray:
    """One backscatter acquisition, with the gamma speckle of a multilooked product (4.4 looks).

    Args:
        rng: source of all randomness.
        share: [material, N, N], :func:`fractions`.
        climate: the place's season and variety.
        day: day of the year, 0..365.
        place_gain: decibel added at this place.

    Returns:
        Linear power float32 [2, N, N] (VV, VH).
    """
    power = np.empty((len(world.MATERIALS), 2))
    rain = rng.normal(0, 0.8) + 1.2 * climate.wetness
    for material, (leafy, bare) in _BACKSCATTER.items():
        green = green_cover(material, day, climate) if material < world.SOIL else 1.0
        moist = rain * (material in (world.GRASS, world.WINTER_CROP, world.SUMMER_CROP, world.SOIL)) * (1.2 - green)
        wind = rng.normal(0, 2.5) * (material == world.WATER)
        power[material] = 10 ** (
            (green * np.array(leafy) + (1 - green) * np.array(bare) + moist + wind + place_gain) / 10
        )
    power *= 10 ** (climate.backscatter / 10)
    mean = _blur(np.einsum("mhw,mp->phw", share, power))
    looks = 4.4
    return (mean * rng.gamma(looks, 1 / looks, mean.shape)).astype(np.float32)
