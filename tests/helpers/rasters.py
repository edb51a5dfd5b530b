"""Writes small real GeoTIFFs and catalogs for the tests of the ingest."""

import csv
import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

from skysense_jax import cli
from skysense_jax.data.ingest import build
from skysense_jax.data.ingest.catalog import COLUMNS, read_catalog
from skysense_jax.data.ingest.places import ingest_place
from skysense_jax.data.ingest.raster import BrokenFile, Files, gdal_settings
from skysense_jax.data.ingest.report import new_report

UTM = "EPSG:32631"
WEST, NORTH = 500_000.0, 5_000_000.0  # corner of the tiles of 16 x 10 m around it: multiples of 160 m are not assumed
RNG = np.random.default_rng(0)
HR = {"sensor": "hr", "datetime": "", "path": "hr.tif", "bands": "R,G,B"}
GOOD = {
    "sensor": "dsm",
    "datetime": "",
    "path": "good.tif",
}  # another raster of the same place, which no refusal may lose
SMALL = {"tile": 16, "ratio": 2}


def write(
    path,
    image,
    crs=UTM,
    west=WEST,
    north=NORTH,
    step=10.0,
    nodata=None,
    bands=None,
    tags=None,
    transform=None,
    driver="GTiff",
    **options,
):
    """[C, H, W] or [H, W] as a raster file; returns the path."""
    image = np.asarray(image)
    image = image[None] if image.ndim == 2 else image
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver=driver,
            width=image.shape[2],
            height=image.shape[1],
            count=image.shape[0],
            dtype=image.dtype,
            crs=crs,
            transform=transform or from_origin(west, north, step, step),
            nodata=nodata,
            **options,
        ) as file:
            file.write(image)
            if bands:
                file.descriptions = bands
            if tags:
                file.update_tags(**tags)
    return path


def catalog(root, rows, name="places.csv"):
    """A CSV catalog from dicts; `place` defaults to "a"."""
    path = Path(root) / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({"place": "a"} | row)
    return path


def s2(path, day="2021-06-01", **cells):
    return {"sensor": "s2", "datetime": day, "path": path, "offset": "0", "units": "dn"} | cells


def ingest(root, rows, broken=None, **options):
    """Records and report of a catalog, read in this process; a file found broken starts the place again, as a build
    does.
    """
    found = read_catalog(catalog(root, rows))
    settings, units = build.plan(found, build.Options(**options))
    broken = dict(broken or {})
    while True:
        report, records = new_report(settings.sensors), []
        files = Files()
        try:
            with gdal_settings():
                for unit in units:
                    for place, place_rows in unit.places:
                        records += list(ingest_place(place, place_rows, settings, files, broken, report))
            break
        except BrokenFile as error:
            broken[error.path] = error.reason
        finally:
            files.close()
    report["files"] += [{**entry, "status": "refused"} for entry in found.refused]
    return records, report


def refusals(report):
    return [entry["reason"] for entry in report["files"] if entry["status"] == "refused"]


def dn(*shape, low=200, high=4000):
    return RNG.integers(low, high, shape).astype(np.uint16)


def one(tmp_path, *rows, **options):
    """The single record of a place, and the report."""
    records, report = ingest(tmp_path, rows, **(SMALL | options))
    assert len(records) == 1, (len(records), refusals(report))
    return records[0], report


def refused(tmp_path, row):
    """The reason of the only refusal, with the rest of the place still there."""
    write(tmp_path / "good.tif", np.full((16, 16), 5, np.float32))
    record, report = one(tmp_path, GOOD, row)
    assert len(record["dsm_date"]) == 1 and (record["dsm_image"] == 5).all()
    assert len(refusals(report)) == 1
    return refusals(report)[0]


def run(*arguments):
    """`skysense-jax data ...`; returns its exit status."""
    return cli.main(["data", *map(str, arguments)])
