"""`skysense-jax data synth`: writes synthetic places as GeoTIFFs plus a catalog, for the same ingest as real rasters.

Place `i` of seed `s` is drawn from its own generator seeded by [s, i]: the files are the same bytes whatever the number
of workers. Every raster carries the tag SKYSENSE_SYNTHETIC=1 and the folder has a file SYNTHETIC.txt. As in real
archives, places lie in different UTM zones, some Sentinel-2 stacks keep the +1000 offset (declared in the catalog),
band orders differ, some Sentinel-1 rasters are linear power, dates are irregular, and some places miss a sensor.
"""

from __future__ import annotations

import csv
import datetime
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.transform import from_origin

from skysense_jax.data.ingest.catalog import COLUMNS
from skysense_jax.data.records import SYNTHETIC_TAG
from skysense_jax.data.synthetic import instruments as sensors
from skysense_jax.data.synthetic import world

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


def _write(
    path: Path,
    image: np.ndarray,
    crs: CRS,
    west: float,
    north: float,
    step: float,
    nodata: float | None,
    bands: tuple[str, ...] = (),
) -> None:
    """Writes [C, H, W] as an uncompressed GeoTIFF with the synthetic tag and band descriptions."""
    count, height, width = image.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=width,
        height=height,
        count=count,
        dtype=image.dtype,
        crs=crs,
        transform=from_origin(west, north, step, step),
        nodata=nodata,
    ) as file:
        file.write(image)
        file.update_tags(**{SYNTHETIC_TAG: "1"})
        if bands:
            file.descriptions = bands


def _dates(rng: np.random.Generator, low: int, high: int) -> list[datetime.date]:
    """Irregular distinct dates in two years, sorted; in a third of the places mostly from one part of the year."""
    count = int(rng.integers(low, high + 1))
    day = np.arange(_DAYS)
    weight = 1 + rng.choice([0.0, 0.9], p=[0.67, 0.33]) * np.cos((day - rng.uniform(0, 365)) / 365 * 2 * np.pi)
    chosen = rng.choice(_DAYS, count, replace=False, p=weight / weight.sum())
    return [_FIRST_DAY + datetime.timedelta(int(d)) for d in sorted(chosen)]


def _location(rng: np.random.Generator, south: bool, ground: float, region: int | None) -> tuple[CRS, float, float]:
    """(CRS, west, north): a UTM zone of the temperate belts, or a place within 60 km of a region's centre, and a corner
    on the ground grid of `ground` metres."""
    if region is None:
        zone, reach = int(rng.choice(_ZONES_SOUTH if south else _ZONES_NORTH)), 150e3
        latitude = rng.uniform(26, 40) if south else rng.uniform(36, 57)
    else:
        (zone, latitude), reach = world.REGIONS[region], 40e3
        latitude += rng.uniform(-0.4, 0.4)
    northing = 1e7 - 110_600 * latitude if south else 110_950 * latitude
    easting = rng.uniform(500e3 - reach, 500e3 + reach)
    west, north = (float(np.round(value / ground) * ground) for value in (easting, northing))
    return CRS.from_epsg((32700 if south else 32600) + zone), west, north


def _row(place: str, sensor: str, split: str, **fields: Any) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "")
    row.update({"place": place, "sensor": sensor, "split": split}, **{key: str(value) for key, value in fields.items()})
    return row


def split_of(turn: int, test_fraction: float) -> str:
    """Split, "train" or "test", of the places of a turn (world.Site): the same share of every label in every region."""
    return "test" if int((turn + 1) * test_fraction) > int(turn * test_fraction) else "train"


def write_place(
    out: str | Path, index: int, seed: int, tile: int, ratio: int, gsd: float, test_fraction: float, kind: str
) -> list[dict[str, str]]:
    """Renders place `index` into `out` and returns its catalog rows. Deterministic in (seed, index), the sizes
    and the kind of world (world.WORLDS)."""
    rng = np.random.default_rng([seed, index])
    site = world.site(kind, seed, index)
    place, split = f"synthetic_{index:05d}", split_of(site.turn, test_fraction)
    folder = Path(out) / place
    folder.mkdir(parents=True, exist_ok=True)
    south = bool(rng.uniform() < 0.2) and site.region is None
    crs, west, north = _location(rng, south, tile * gsd, site.region)
    climate = sensors.draw_climate(rng, south)
    land = world.make_land(rng, tile, ratio, gsd, site.scene)
    area = sensors.fractions(land, ratio)
    share = sensors.fractions(land, ratio, land.vigour * land.tone.clip(0.6, 1.5))
    missing = rng.uniform(size=4) < np.array([0.08, 0.04, 0.1, 0.12])
    if missing[0] and missing[1]:
        missing[1] = False
    rows = [_row(place, "label", split, classes=site.label)]

    def add(
        sensor: str,
        name: str,
        image: np.ndarray,
        step: float,
        nodata: float | None,
        bands: tuple[str, ...] = (),
        **fields: Any,
    ) -> None:
        _write(folder / name, image, crs, west, north, step, nodata, bands)
        rows.append(_row(place, sensor, split, path=f"{place}/{name}", bands=",".join(bands), **fields))

    add(
        "label_map",
        "land_cover.tif",
        sensors.label_map(land, ratio)[None],
        gsd,
        255.0,
        classes=";".join(f"{key}={name}" for key, name in world.LAND_COVER.items()),
    )
    if not missing[0]:
        date = _dates(rng, 1, 1)[0]
        image = sensors.render_hr(rng, land, climate, date.timetuple().tm_yday, gsd / ratio)
        add(
            "hr",
            f"hr_{date:%Y%m%d}.tif",
            np.moveaxis(image, -1, 0),
            gsd / ratio,
            None,
            ("R", "G", "B"),
            datetime=date,
            units="dn",
        )
    if not missing[1]:
        _add_s2(rng, land, share, climate, tile, gsd, add)
    if not missing[2]:
        linear, gain = bool(rng.uniform() < 0.3), rng.normal(0, 1.3)
        for date in _dates(rng, 4, 7):
            power = sensors.render_s1(rng, area, climate, date.timetuple().tm_yday, gain)
            image = power if linear else (10 * np.log10(power)).astype(np.float32)
            add(
                "s1",
                f"s1_{date:%Y%m%d}.tif",
                image,
                gsd,
                None,
                ("VV", "VH"),
                datetime=date,
                units="linear_power" if linear else "db",
            )
    if not missing[3]:
        # Surface models are coarser than the photograph: half its resolution where the ratio allows.
        half = 2 if ratio % 2 == 0 else 1
        n = tile * ratio // half
        surface = (land.terrain + land.canopy).reshape(n, half, n, half).mean((1, 3)) + 0.15 * rng.standard_normal(
            (n, n)
        )
        add("dsm", "dsm.tif", surface.astype(np.float32)[None], gsd / ratio * half, -9999.0, ("height",), units="m")
    return rows


def _add_s2(
    rng: np.random.Generator,
    land: world.Land,
    share: np.ndarray,
    climate: sensors.Climate,
    tile: int,
    gsd: float,
    add: Any,
) -> None:
    """Writes the Sentinel-2 dates of a place and their SCL masks through `add`."""
    bands = sensors.S2_BANDS if rng.uniform() < 0.6 else TEN_BANDS
    order = [sensors.S2_BANDS.index(band) for band in bands]
    offset = 1000 if rng.uniform() < 0.4 else 0
    gain = rng.uniform(0.85, 1.2)
    for date in _dates(rng, 6, 9):
        image, scl, seen = sensors.render_s2(rng, land, share, climate, date.timetuple().tm_yday, gain)
        dn = np.round(image[order] * 10000).clip(1, 30000) + offset
        dn = np.where(seen, dn, 0).astype(np.uint16)
        add("s2", f"s2_{date:%Y%m%d}.tif", dn, gsd, 0.0, bands, datetime=date, units="dn", offset=-offset)
        # The SCL is a 20 m layer; where the tile has an odd size it is written at the base resolution.
        coarse = 2 if tile % 2 == 0 else 1
        add(
            "mask:s2",
            f"scl_{date:%Y%m%d}.tif",
            scl[None, ::coarse, ::coarse],
            gsd * coarse,
            0.0,
            datetime=date,
            classes=CLEAR_CLASSES,
        )


def _write_places(arguments: tuple[Any, ...]) -> list[dict[str, str]]:
    indices, *rest = arguments
    return [row for index in indices for row in write_place(rest[0], index, *rest[1:])]


def synthesise(
    out: str | Path,
    places: int,
    seed: int = 0,
    tile: int = 16,
    ratio: int = 16,
    gsd: float = 10.0,
    test_fraction: float = 0.25,
    workers: int | None = None,
    kind: str = "plain",
) -> Path:
    """Writes `places` synthetic places into `out` and returns the path of its catalog.csv.

    tile: side of a place in base pixels of `gsd` metres; ratio: HR pixels along one of them. workers: processes (all
    cores where None). kind: of world.WORLDS. Raises ValueError where `out` already has a catalog, for sizes below 1, or
    for an unknown world.
    """
    out = Path(out)
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
    chunks = [range(at, min(at + 8, places)) for at in range(0, places, 8)]
    jobs = [(chunk, str(out), seed, tile, ratio, gsd, test_fraction, kind) for chunk in chunks]
    rows: list[dict[str, str]] = []
    if workers == 1 or len(jobs) == 1:
        done = map(_write_places, jobs)
        rows = _collect(done, places)
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


def _collect(done: Any, places: int) -> list[dict[str, str]]:
    """Gathers the rows of the chunks in order and shows how far it is."""
    rows: list[dict[str, str]] = []
    seen = 0
    for chunk in done:
        rows += chunk
        seen += len({row["place"] for row in chunk})
        if sys.stderr.isatty() or seen == places:
            print(
                f"\rsynthetic places {seen}/{places}", end="\n" if seen == places else "", file=sys.stderr, flush=True
            )
    return rows
