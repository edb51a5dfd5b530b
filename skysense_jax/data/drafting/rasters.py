"""Drafts a catalog from a folder of rasters: what names, tags, descriptions and colours say, and a list of what the
user must fill in.

Nothing is decided here that a build would not check again; a field that nothing states stays empty.
"""

from __future__ import annotations

import csv
import datetime
import io
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import rasterio
from rasterio.enums import ColorInterp

from skysense_jax.data.ingest.catalog import COLUMNS, CatalogError, Row, local_file
from skysense_jax.data.ingest.inspection import band_order
from skysense_jax.data.ingest.raster import RasterRefused, gdal_settings, open_raster
from skysense_jax.data.ingest.s2_offsets import known_offset
from skysense_jax.sensors import NO_DATE, SENSORS, band_name

SUFFIXES = (".tif", ".tiff", ".jp2")
SCL_CLEAR = "4;5;6"
"""Vegetation, bare soil and water of the Sen2Cor scene classification: the strict set; the user may add 7
(unclassified) or 11 (snow).
"""

_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")
_WORDS = {
    "s2": {"s2", "s2a", "s2b", "s2c", "s2l1c", "s2l2a", "msil1c", "msil2a", "sentinel2", "l2a", "l1c"},
    "s1": {
        "s1",
        "s1a",
        "s1b",
        "s1c",
        "grd",
        "grdh",
        "rtc",
        "s1rtc",
        "s1grd",
        "sentinel1",
        "vv",
        "vh",
        "sigma0",
        "gamma0",
    },
    "dsm": {"dsm", "dem", "dtm", "elevation", "srtm"},
    "hr": {"hr", "rgb", "ortho", "orthophoto", "aerial", "naip", "dop"},
    "label_map": {"label", "labels", "lulc", "landcover", "worldcover", "annotation", "gt", "mask"},
    "mask:s2": {"scl"},
}
_BAND = re.compile(r"(?i)^(b(?:0?[1-9]|1[0-2]|8a|08a)|vv|vh)$")


class Draft(NamedTuple):
    """rows: catalog cells. questions: what is missing or doubtful, as (path, text)."""

    rows: list[dict[str, str]]
    questions: list[tuple[str, str]]


def date_in(text: str) -> str:
    """The first ISO date written in a name (2020-01-13, 20200113, 20200113T101031), "" if there is none or it is no
    calendar date.
    """
    for year, _, month, day in _DATE.findall(text):
        try:
            return datetime.date(int(year), int(month), int(day)).isoformat()
        except ValueError:
            continue
    return ""


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^A-Za-z0-9]+", name.lower()) if word]


def _sensor(path: Path, file: rasterio.DatasetReader) -> str:
    """Sensor from the file's name, else from what its bands say, else from the folders' names, else ""."""
    stem = set(_words(path.stem))
    for sensor in ("mask:s2", "label_map", "dsm"):  # these names come on top of a product's name
        if stem & _WORDS[sensor]:
            return sensor
    descriptions = {text.strip().lower() for text in file.descriptions if text}
    for sensor in ("s2", "s1"):
        known = (
            {name.lower() for name in SENSORS[sensor].bands} | {f"b{n}" for n in range(1, 13)}
            if sensor == "s2"
            else {"vv", "vh"}
        )
        if descriptions and descriptions <= known:
            return sensor
    for words in (stem, set(_words(str(path.parent)))):
        for sensor in ("s2", "s1", "hr", "dsm", "label_map"):
            if words & _WORDS[sensor]:
                return sensor
    colours = set(file.colorinterp)
    if file.dtypes[0] == "uint8" and {ColorInterp.red, ColorInterp.green, ColorInterp.blue} <= colours:
        return "hr"
    return ""


def _bands(path: Path, sensor: str, file: rasterio.DatasetReader) -> str:
    """Bands column: from the suffix of a one-band file, else "" where the file states them itself."""
    if file.count == 1 and sensor in ("s2", "s1"):
        for word in reversed(_words(path.stem)):
            if _BAND.match(word):
                try:
                    return band_name(sensor, word)
                except ValueError:
                    continue
    return ""


def _place(relative: Path, by: str) -> str:
    """The folder's path, or the file name without dates, times, bands and sensor words."""
    if by == "folder" and relative.parent != Path("."):
        return "_".join(relative.parent.parts)
    known = set().union(*_WORDS.values())
    words = [word for word in re.split(r"[_\-. ]+", _DATE.sub("", relative.stem)) if word]
    kept = [
        word
        for word in words
        if word.lower() not in known and not _BAND.match(word) and not re.match(r"^(T\d{6}|\d+m)$", word)
    ]
    return "_".join(kept) or relative.stem


def _draft_row(path: Path, root: Path, by: str, questions: list[tuple[str, str]]) -> dict[str, str] | None:
    relative = path.relative_to(root)
    try:
        local_file(root, str(relative))
        file = open_raster(path)
    except ValueError as error:
        questions.append((str(relative), f"left out: {error}"))
        return None
    with file:
        sensor = _sensor(relative, file)
        cells = dict.fromkeys(COLUMNS, "") | {
            "place": _place(relative, by),
            "sensor": sensor,
            "path": relative.as_posix(),
        }
        cells["datetime"] = date_in(relative.name) or date_in(str(relative.parent))

        def ask(text: str) -> None:
            questions.append((str(relative), text))

        if not sensor:
            ask("sensor: not recognised")
            return cells
        if file.crs is None:
            ask("has no CRS: a build will refuse it")
        kind, name = ("mask", sensor[5:]) if sensor.startswith("mask:") else (sensor, sensor)
        if name in SENSORS and SENSORS[name].dated and not cells["datetime"]:
            ask(f"datetime: none in the name, and {name} needs one")
        if kind == "mask":
            cells["classes"] = SCL_CLEAR
            ask(f"classes: {SCL_CLEAR} drafted as clear (Sentinel-2 scene classification); check")
        if kind not in SENSORS:
            return cells
        cells["bands"] = _bands(relative, sensor, file)
        row = Row(
            0,
            "",
            "image",
            sensor,
            NO_DATE,
            path,
            "",
            (cells["bands"],) if cells["bands"] else (),
            "",
            (),
            (),
            (),
            False,
            (),
            "",
        )
        try:
            indexes, bands, _ = band_order(
                file,
                row,
                0 if ColorInterp.alpha not in file.colorinterp else file.colorinterp.index(ColorInterp.alpha) + 1,
            )
        except RasterRefused as error:
            ask(f"bands: {error}")
            indexes, bands = [], []
        if sensor in ("hr", "dsm"):
            cells["units"] = SENSORS[sensor].unit
            if sensor == "hr" and file.dtypes[0] != "uint8":
                ask(f"scale: {file.dtypes[0]} imagery needs a scale to 0..255")
        elif sensor == "s2":
            cells["units"] = (
                "dn" if file.dtypes[0] in ("uint16", "int16") and all(scale == 1 for scale in file.scales) else ""
            )
            try:
                found = known_offset(file, path, root, bands, indexes) if bands else None
            except RasterRefused as error:
                found = None
                ask(f"offset: {error}")
            if found is None and not any(file.offsets):
                ask(
                    "offset: not known from metadata; -1000 where the product still carries it, 0 where it was "
                    "removed (never by date)"
                )
            if not cells["units"]:
                ask("units: dn or reflectance")
        elif sensor == "s1":
            if not (file.tags().get("units") or file.units[0]):
                ask("units: db, linear_power or amplitude")
        return cells


def _clashes(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Questions about rasters a build would refuse as given twice: same place, sensor, date and band."""
    first: dict[tuple[str, ...], str] = {}
    text = "place: another raster has the same place, sensor, date and bands; is it another place (--place-by stem)?"
    found = []
    for row in rows:
        key = tuple(row[column] for column in ("place", "sensor", "datetime", "bands"))
        if row["sensor"] in SENSORS and first.setdefault(key, row["path"]) != row["path"]:
            found.append((row["path"], text))
    return found


def draft(folder: str | Path, by: str = "folder") -> Draft:
    """Looks at every GeoTIFF and JPEG 2000 below `folder`, in name order. by: "folder" or "stem" names the places.
    Raises CatalogError.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise CatalogError(f"{folder} is not a folder")
    paths = sorted(
        Path(base) / name for base, _, names in os.walk(root) for name in names if Path(name).suffix.lower() in SUFFIXES
    )
    if not paths:
        raise CatalogError(f"{folder} has no file ending in {', '.join(SUFFIXES)}")
    questions: list[tuple[str, str]] = []
    with gdal_settings():
        rows = [row for row in (_draft_row(path, root, by, questions) for path in paths) if row]
    return Draft(rows, questions + _clashes(rows))


def to_csv(rows: list[dict[str, str]]) -> str:
    """The catalog as CSV text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def render(found: Draft, limit: int = 40) -> str:
    """What was found and what the user must fill in, equal questions counted together."""
    sensors = Counter(row["sensor"] or "(not recognised)" for row in found.rows)
    rasters = sum(bool(row["path"]) for row in found.rows)
    lines = [
        f"{rasters} rasters in {len({row['place'] for row in found.rows})} places: "
        + ", ".join(f"{name} {count}" for name, count in sorted(sensors.items()))
    ]
    grouped: dict[str, list[str]] = {}
    for path, text in found.questions:
        grouped.setdefault(text, []).append(path)
    if grouped:
        lines += ["", "to be filled in or checked:"]
        for text, paths in list(grouped.items())[:limit]:
            lines.append(f"  {len(paths):5d} files, e.g. {paths[0]}\n        {text}")
        if len(grouped) > limit:
            lines.append(f"  ... and {len(grouped) - limit} more kinds")
    return "\n".join(lines)
