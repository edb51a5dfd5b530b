"""`skysense-jax data synth`: writes synthetic places as GeoTIFFs plus a catalog, for the same ingest as real rasters.

Place `i` of seed `s` is drawn from a generator seeded by [s, i]: the files are the same bytes whatever the number of
workers. Every raster carries the tag SKYSENSE_SYNTHETIC=1 and the folder has a file SYNTHETIC.txt. As in real
archives, places lie in different UTM zones, some Sentinel-2 stacks keep the +1000 offset (declared in the catalog),
band orders differ, some Sentinel-1 rasters are linear power, dates are irregular, and some places miss a sensor.
"""

from __future__ import annotations

import csv
import datetime
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.transform import from_origin

from skysense_jax.data.ingest.catalog import COLUMNS
from skysense_jax.data.records import SYNTHETIC_TAG
from skysense_jax.data.synthetic import ground, instruments, world

CLEAR_CLASSES = "4;5;6"
TEN_BANDS = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12")
"""The "10 m bands first" order of many exported stacks: an ingest that assumes another order mixes B08 and B05."""

_ZONES_NORTH = (10, 11, 14, 15, 16, 17, 18, 30, 31, 32, 33, 34, 35, 36, 50)
_ZONES_SOUTH = (19, 20, 21, 34, 35, 36, 55, 56)
_FIRST_DAY = datetime.date(2021, 1, 1)
_DAYS = 730
_NOTICE = (
    "SYNTHETIC DATA. Written by `skysense-jax data synth` from a seed; nothing here was measured anywhere. Good for "
    "testing the\npipeline, not for any statement about the Earth or about how well a model does on it.\n"
)


class Settings(NamedTuple):
    """What synthetic places are like.

    Attributes:
        seed: seed of everything.
        tile: base pixels along a place.
        ratio: HR pixels along a base pixel.
        gsd: metres of a base pixel.
        test_fraction: share of the places that go to the test split.
        kind: kind of world (world.WORLDS).
    """

    seed: int = 0
    tile: int = 16
    ratio: int = 16
    gsd: float = 10.0
    test_fraction: float = 0.25
    kind: str = "plain"


DEFAULTS = Settings()


class _Corner(NamedTuple):
    """The north-west corner of a place, in metres of a UTM zone."""

    crs: CRS
    west: float
    north: float


class _Raster(NamedTuple):
    """One raster. image: [C, H, W]; step: metres of a pixel; bands: descriptions of the bands, () = none."""

    name: str
    image: np.ndarray
    step: float
    nodata: float | None
    bands: tuple[str, ...] = ()


class _PlaceWriter:
    """Writes the rasters of one place and collects their catalog rows."""

    def __init__(self, out: Path, place: str, split: str, corner: _Corner):
        self._folder, self._place, self._split, self._corner = out / place, place, split, corner
        self._folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, str]] = []

    def add_row(self, sensor: str, **fields: Any) -> None:
        """Adds a catalog row."""
        row = dict.fromkeys(COLUMNS, "")
        row.update({"place": self._place, "sensor": sensor, "split": self._split})
        row.update({key: str(value) for key, value in fields.items()})
        self.rows.append(row)

    def add(self, sensor: str, raster: _Raster, **fields: Any) -> None:
        """Writes an uncompressed GeoTIFF with the synthetic tag and band descriptions, and adds its catalog row."""
        crs, west, north = self._corner
        count, height, width = raster.image.shape
        with rasterio.open(
            self._folder / raster.name,
            "w",
            driver="GTiff",
            width=width,
            height=height,
            count=count,
            dtype=raster.image.dtype,
            crs=crs,
            transform=from_origin(west, north, raster.step, raster.step),
            nodata=raster.nodata,
        ) as file:
            file.write(raster.image)
            file.update_tags(**{SYNTHETIC_TAG: "1"})
            if raster.bands:
                file.descriptions = raster.bands
        self.add_row(sensor, path=f"{self._place}/{raster.name}", bands=",".join(raster.bands), **fields)


def _dates(rng: np.random.Generator, low: int, high: int) -> list[datetime.date]:
    """Irregular distinct dates in two years, sorted; in a third of the places mostly from one part of the year."""
    count = int(rng.integers(low, high + 1))
    day = np.arange(_DAYS)
    weight = 1 + rng.choice([0.0, 0.9], p=[0.67, 0.33]) * np.cos((day - rng.uniform(0, 365)) / 365 * 2 * np.pi)
    chosen = rng.choice(_DAYS, count, replace=False, p=weight / weight.sum())
    return [_FIRST_DAY + datetime.timedelta(int(number)) for number in sorted(chosen)]


def _location(rng: np.random.Generator, south: bool, ground: float, region: int | None) -> _Corner:
    """A corner on the ground grid of `ground` metres.

    It lies in a UTM zone of the temperate belts or, of a region, within 60 km of the region's centre.
    """
    if region is None:
        zone, reach = int(rng.choice(_ZONES_SOUTH if south else _ZONES_NORTH)), 150e3
        latitude = rng.uniform(26, 40) if south else rng.uniform(36, 57)
    else:
        (zone, latitude), reach = world.REGIONS[region], 40e3
        latitude += rng.uniform(-0.4, 0.4)
    northing = 1e7 - 110_600 * latitude if south else 110_950 * latitude
    easting = rng.uniform(500e3 - reach, 500e3 + reach)
    west, north = (float(np.round(value / ground) * ground) for value in (easting, northing))
    return _Corner(CRS.from_epsg((32700 if south else 32600) + zone), west, north)


def split_of(turn: int, test_fraction: float) -> str:
    """The split of the places of a turn: the same share of every label in every region.

    Args:
        turn: the places' turn (world.Site).
        test_fraction: share 0..1 of the places that go to the test split.

    Returns:
        "train" or "test".
    """
    return "test" if int((turn + 1) * test_fraction) > int(turn * test_fraction) else "train"


def write_place(out: str | Path, index: int, settings: Settings) -> list[dict[str, str]]:
    """Renders one place; deterministic in its number and the settings.

    Args:
        out: folder of the catalog; the place gets a folder in it.
        index: number of the place.
        settings: what the places are like.

    Returns:
        The catalog rows of the place.
    """
    tile, ratio, gsd = settings.tile, settings.ratio, settings.gsd
    rng = np.random.default_rng([settings.seed, index])
    site = world.site(settings.kind, settings.seed, index)
    south = bool(rng.uniform() < 0.2) and site.region is None
    corner = _location(rng, south, tile * gsd, site.region)
    writer = _PlaceWriter(Path(out), f"synthetic_{index:05d}", split_of(site.turn, settings.test_fraction), corner)
    climate = instruments.draw_climate(rng, south)
    land = ground.make_land(rng, tile, ratio, gsd, site.scene)
    area = instruments.fractions(land, ratio)
    share = instruments.fractions(land, ratio, land.vigour * land.tone.clip(0.6, 1.5))
    missing = rng.uniform(size=4) < np.array([0.08, 0.04, 0.1, 0.12])  # HR, Sentinel-2, Sentinel-1, surface model
    if missing[0] and missing[1]:
        missing[1] = False
    writer.add_row("label", classes=site.label)
    cover = _Raster("land_cover.tif", instruments.label_map(land, ratio)[None], gsd, 255.0)
    writer.add("label_map", cover, classes=";".join(f"{key}={name}" for key, name in world.LAND_COVER.items()))
    if not missing[0]:
        date = _dates(rng, 1, 1)[0]
        image = instruments.render_hr(rng, land, climate, date.timetuple().tm_yday, gsd / ratio)
        photograph = _Raster(f"hr_{date:%Y%m%d}.tif", np.moveaxis(image, -1, 0), gsd / ratio, None, ("R", "G", "B"))
        writer.add("hr", photograph, datetime=date, units="dn")
    if not missing[1]:
        _add_s2(rng, share, climate, settings, writer)
    if not missing[2]:
        _add_s1(rng, area, climate, settings, writer)
    if not missing[3]:
        # Surface models are coarser than the photograph: half its resolution where the ratio allows.
        half = 2 if ratio % 2 == 0 else 1
        n = tile * ratio // half
        surface = (land.terrain + land.canopy).reshape(n, half, n, half).mean((1, 3))
        surface = surface + 0.15 * rng.standard_normal((n, n))
        heights = _Raster("dsm.tif", surface.astype(np.float32)[None], gsd / ratio * half, -9999.0, ("height",))
        writer.add("dsm", heights, units="m")
    return writer.rows


def _add_s2(
    rng: np.random.Generator, share: np.ndarray, climate: instruments.Climate, settings: Settings, writer: _PlaceWriter
) -> None:
    """Writes the Sentinel-2 dates of a place and their SCL masks."""
    bands = instruments.S2_BANDS if rng.uniform() < 0.6 else TEN_BANDS
    order = [instruments.S2_BANDS.index(band) for band in bands]
    offset = 1000 if rng.uniform() < 0.4 else 0
    gain = rng.uniform(0.85, 1.2)
    # The SCL is a 20 m layer; where the tile has an odd size it is written at the base resolution.
    coarse = 2 if settings.tile % 2 == 0 else 1
    for date in _dates(rng, 6, 9):
        image, scl, in_swath = instruments.render_s2(rng, share, climate, date.timetuple().tm_yday, gain)
        dn = np.round(image[order] * 10000).clip(1, 30000) + offset
        dn = np.where(in_swath, dn, 0).astype(np.uint16)
        stack = _Raster(f"s2_{date:%Y%m%d}.tif", dn, settings.gsd, 0.0, bands)
        writer.add("s2", stack, datetime=date, units="dn", offset=-offset)
        classes = _Raster(f"scl_{date:%Y%m%d}.tif", scl[None, ::coarse, ::coarse], settings.gsd * coarse, 0.0)
        writer.add("mask:s2", classes, datetime=date, classes=CLEAR_CLASSES)


def _add_s1(
    rng: np.random.Generator, area: np.ndarray, climate: instruments.Climate, settings: Settings, writer: _PlaceWriter
) -> None:
    """Writes the Sentinel-1 dates of a place, in decibel or as linear power."""
    linear, gain = bool(rng.uniform() < 0.3), rng.normal(0, 1.3)
    for date in _dates(rng, 4, 7):
        power = instruments.render_s1(rng, area, climate, date.timetuple().tm_yday, gain)
        image = power if linear else (10 * np.log10(power)).astype(np.float32)
        backscatter = _Raster(f"s1_{date:%Y%m%d}.tif", image, settings.gsd, None, ("VV", "VH"))
        writer.add("s1", backscatter, datetime=date, units="linear_power" if linear else "db")


def _write_places(job: tuple[Sequence[int], str, Settings]) -> list[dict[str, str]]:
    indices, out, settings = job
    return [row for index in indices for row in write_place(out, index, settings)]


def synthesise(out: str | Path, places: int, settings: Settings = DEFAULTS, workers: int | None = None) -> Path:
    """Writes synthetic places with a catalog.

    Args:
        out: folder to write; it must not have a catalog yet.
        places: number of places.
        settings: what the places are like.
        workers: processes; None = all cores.

    Returns:
        The path of the catalog.csv in `out`.

    Raises:
        ValueError: `out` already has a catalog, a size is below its least value, or there is no such world.
    """
    out = Path(out)
    seed, tile, ratio, gsd, test_fraction, kind = settings
    if places < 1 or tile < 4 or ratio < 1 or not 0 <= test_fraction < 1 or gsd <= 0:
        raise ValueError(
            f"places {places}, tile {tile}, ratio {ratio}, gsd {gsd}, test fraction {test_fraction}: need places >= 1, "
            "tile >= 4, ratio >= 1, gsd > 0 and 0 <= fraction < 1"
        )
    world.site(kind, seed, 0)  # an unknown world, before anything is written
    catalog = out / "catalog.csv"
    if catalog.exists():
        raise ValueError(
            f"{catalog} exists: synthetic places are never written over a catalog; choose another --out or delete it"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "SYNTHETIC.txt").write_text(
        _NOTICE + f"places {places} seed {seed} tile {tile} ratio {ratio} gsd {gsd} world {kind}\n"
    )
    workers = workers or os.cpu_count() or 1
    chunks = [range(first, min(first + 8, places)) for first in range(0, places, 8)]
    jobs: list[tuple[Sequence[int], str, Settings]] = [(chunk, str(out), settings) for chunk in chunks]
    if workers == 1 or len(jobs) == 1:
        rows = _collect(map(_write_places, jobs), places)
    else:
        with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
            rows = _collect(pool.map(_write_places, jobs), places)
    # The catalog last and by a rename: a folder with a catalog is a complete one.
    partial = out / "catalog.csv.partial"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.rename(catalog)
    return catalog


def _collect(chunks: Iterable[list[dict[str, str]]], places: int) -> list[dict[str, str]]:
    """Gathers the rows of the chunks in order and shows the progress."""
    rows: list[dict[str, str]] = []
    written = 0
    for chunk in chunks:
        rows += chunk
        written += len({row["place"] for row in chunk})
        if sys.stderr.isatty() or written == places:
            end = "\n" if written == places else ""
            print(f"\rsynthetic places {written}/{places}", end=end, file=sys.stderr, flush=True)
    return rows
