"""Real imagery for checks: folders of small real satellite data become GeoTIFFs, a catalog and one dataset of places.

    python -m experiments.real_samples SRC --out DIR [--workers N] [--crops] [--no-build]

SRC has one folder per source (experiments/real_samples/folders.py names them; their licences are in their own README).
DIR receives rasters/, catalog.csv, catalog_crops.csv (the dense series again, with crop types as label map),
folders.json (every folder used or refused, with the reason), and dataset/: the result of `data build` with tile 16,
ratio 16, 10 m, so that HR imagery of 7 cm to 1 m is resampled to 0.625 m and a 40 m plot fills a sixteenth of its 160 m
place (the rest is invalid). Needs h5py (test extra): it reads HDF5 and NetCDF-4.

Split: never by tile. Single-scene sources are cut into blocks written as separate rasters: each block is a place of the
catalog with its own split.

Label map (catalog.csv): land cover in the legend of the TerraMesh examples (1 water, 2 trees, 3 flooded vegetation, 4
crops, 5 built, 6 bare, 9 rangeland; that legend is inferred, not documented) plus 10 grassland. Where each comes from:
  terramesh_examples    LULC rasters of the dataset itself: an annual product, modelled, not surveyed
  worldcereal_dense_ts  farmers' declarations (LPIS Flanders 2018): LC 11 -> crops, 13 -> grassland, 60 -> built;
                        99 says only "not crops": unlabelled. The meaning of the codes is WorldCereal's legend, from
                        memory
  worldcereal_cubes     WorldCereal product 2021, modelled: temporary crops 100 -> crops; 0 is only "not crops":
                        unlabelled
  boadella_s2_ts        drawn water polygons of five dates: water where all agree; the rest unlabelled, as nobody
                        labelled it
Crop types (catalog_crops.csv): CT codes of the dense place: 1 maize (1200), 2 grassland (9120: the pixels of LC 13), 3
other crops (2130, 5100, 7900).
Scene label: the NEON site (SJER, TEAK); the sites differ in colour alone, so their accuracy proves little. Not used:
BigEarthNet's labels (of a 1.2 km patch, not of the 160 m tiles cut from it; three patches), the tree species of the one
TreeSatAI sample, tree boxes, 7 cm building masks.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS

from skysense_jax.data.ingest.catalog import COLUMNS

LAND_COVER = {
    1: "water",
    2: "trees",
    3: "flooded vegetation",
    4: "crops",
    5: "built",
    6: "bare",
    9: "rangeland",
    10: "grassland",
}
CROPS = {1: "maize", 2: "grassland", 3: "other crops"}
UNLABELLED = 255
TILE, RATIO, GSD = 16, 16, 10.0

Row = dict[str, str]


def classes_text(legend: dict[int, str]) -> str:
    """A legend as the catalog spells it."""
    return ";".join(f"{key}={name}" for key, name in legend.items())


class Writer:
    """Collects catalog rows and writes rasters below DIR/rasters. `crops` holds the rows of the second catalog's label
    maps; of a long series only every `every`-th date is wanted."""

    def __init__(self, out: Path, every: int):
        self.out, self.every, self.rows, self.crops = out, every, [], []

    def raster(self, name: str, image: np.ndarray, crs: CRS | str, grid: Affine, nodata: float | None = None) -> str:
        """Writes [C, H, W] (or [H, W]) and returns its path as the catalog spells it."""
        image = image if image.ndim == 3 else image[None]
        path = self.out / "rasters" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=len(image),
            height=image.shape[1],
            width=image.shape[2],
            dtype=image.dtype,
            crs=crs,
            transform=grid,
            nodata=nodata,
            compress="deflate",
        ) as file:
            file.write(image)
        return f"rasters/{name}"

    def row(self, place: str, sensor: str, split: str, **fields: Any) -> None:
        self.rows.append(_row(place, sensor, split, fields))

    def crop_row(self, place: str, sensor: str, split: str, **fields: Any) -> None:
        self.crops.append(_row(place, sensor, split, fields))


def _row(place: str, sensor: str, split: str, fields: dict[str, Any]) -> Row:
    row = dict.fromkeys(COLUMNS, "")
    row.update({"place": place, "sensor": sensor, "split": split}, **{key: str(value) for key, value in fields.items()})
    return row


def shifted(grid: Affine, column: float, row: float) -> Affine:
    """The grid whose first pixel is (column, row) of `grid` (unrotated)."""
    return Affine(grid.a, 0.0, grid.c + column * grid.a, 0.0, grid.e, grid.f + row * grid.e)


def ground_cut(origin: float, step: float, size: int, share: float = 0.5) -> int:
    """Column nearest to `share` of the raster that lies on a tile boundary of the ground grid, so that no tile is in
    two blocks."""
    side = TILE * GSD
    target = origin + step * size * share
    return int(round((round(target / side) * side - origin) / step))


def _write_catalog(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def convert(source: Path, out: Path, every: int = 1) -> dict[str, dict[str, Any]]:
    """Writes rasters, both catalogs and folders.json; returns folder -> {"status": "used"|"refused", "rows": n, "note":
    text}. every: of the dense series, take every such date.

    Raises ValueError where SRC holds none of the known folders, or a folder nobody decided about.
    """
    from experiments.real_samples.folders import REFUSED, USED

    present = sorted(path.name for path in source.iterdir() if path.is_dir())
    undecided = [name for name in present if name not in USED and name not in REFUSED]
    if undecided or not any(name in USED for name in present):
        known = [name for name in present if name not in undecided]
        raise ValueError(f"{source}: folders nobody decided about: {undecided}; known ones present: {known}")
    writer, folders = Writer(out, every), {}
    for name in present:
        if name in REFUSED:
            folders[name] = {"status": "refused", "rows": 0, "note": REFUSED[name]}
            continue
        before = len(writer.rows)
        note = USED[name](source / name, writer)
        folders[name] = {"status": "used", "rows": len(writer.rows) - before, "note": note}
    out.mkdir(parents=True, exist_ok=True)
    _write_catalog(out / "catalog.csv", writer.rows)
    places = {row["place"] for row in writer.crops}
    same = [row for row in writer.rows if row["place"] in places and row["sensor"] != "label_map"]
    _write_catalog(out / "catalog_crops.csv", same + writer.crops)
    (out / "folders.json").write_text(json.dumps(folders, indent=1) + "\n")
    return folders


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.real_samples", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with the real data, one folder per source")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--workers", type=int, default=2, help="processes of the build")
    parser.add_argument("--crops", action="store_true", help="build catalog_crops.csv too, into DIR/dataset_crops")
    parser.add_argument("--no-build", action="store_true", help="stop after the catalogs")
    args = parser.parse_args(argv)
    folders = convert(args.source, args.out)
    for name, entry in folders.items():
        print(f"{entry['status']:8} {name:24} {entry['rows']:6} rows  {entry['note']}")
    if args.no_build:
        return 0
    from skysense_jax.cli import main as command

    common = ["--tile", str(TILE), "--ratio", str(RATIO), "--gsd", str(GSD), "--workers", str(args.workers)]
    for name, folder in (("catalog", "dataset"), ("catalog_crops", "dataset_crops"))[: 1 + args.crops]:
        status = command(
            ["data", "build", "--catalog", str(args.out / f"{name}.csv"), "--out", str(args.out / folder), *common]
        )
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
