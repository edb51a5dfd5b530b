"""Drafts a catalog from a folder of rasters, with a list of what the user must fill in.

What names, tags, descriptions and colours say is taken; the words that stand for a sensor are in its row of the table.
Nothing is decided here that a build would not check again; a field that nothing states stays empty.
"""

from __future__ import annotations

import csv
import datetime
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import rasterio
from rasterio.enums import ColorInterp

from skysense_jax.data.ingest.catalog import COLUMNS, CatalogError, local_file
from skysense_jax.data.ingest.inspection import COLOURS, band_order
from skysense_jax.data.ingest.raster import RasterRefused, gdal_settings, open_raster
from skysense_jax.data.ingest.s2_offsets import known_offset
from skysense_jax.data.ingest.units import listed
from skysense_jax.sensors import SENSORS, Sensor, band_name, base_grid_first

SUFFIXES = (".tif", ".tiff", ".jp2")

_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")
_LABEL_MAP = "label_map"
_LABEL_WORDS = frozenset({"label", "labels", "lulc", "landcover", "worldcover", "annotation", "gt", "mask"})
_MASK = "mask:"


class Draft(NamedTuple):
    """rows: catalog cells. questions: what is missing or doubtful, as (path, text)."""

    rows: list[dict[str, str]]
    questions: list[tuple[str, str]]


def date_in(text: str) -> str:
    """The first ISO date written in a name (2020-01-13, 20200113, 20200113T101031), "" if it has no calendar date."""
    for year, _, month, day in _DATE.findall(text):
        try:
            return datetime.date(int(year), int(month), int(day)).isoformat()
        except ValueError:
            continue
    return ""


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^A-Za-z0-9]+", name.lower()) if word]


def _words_on_top() -> dict[str, frozenset[str]]:
    """Words of layers that are named after the product on which they lie: clear masks, label maps, heights."""
    rows = [SENSORS[name] for name in base_grid_first()]
    masks = {f"{_MASK}{row.name}": row.clear.words for row in rows if row.clear}
    return masks | {_LABEL_MAP: _LABEL_WORDS} | {row.name: row.words for row in rows if row.heights}


def _sensor(path: Path, file: rasterio.DatasetReader) -> str:
    """Sensor from the file's name, else from what its bands say, else from the folders' names, else ""."""
    stem = set(_words(path.stem))
    for sensor, words in _words_on_top().items():
        if stem & words:
            return sensor
    rows = [SENSORS[name] for name in base_grid_first()]
    descriptions = {text.strip().lower() for text in file.descriptions if text}
    for row in rows:
        if descriptions and descriptions <= row.band_words:
            return row.name
    words_of = {row.name: row.words for row in rows} | {_LABEL_MAP: _LABEL_WORDS}
    for text in (stem, set(_words(str(path.parent)))):
        for sensor, words in words_of.items():
            if text & words:
                return sensor
    if set(COLOURS) <= set(file.colorinterp):
        for row in rows:
            if row.colour_bands and file.dtypes[0] == row.dtype:
                return row.name
    return ""


def _bands(path: Path, sensor: Sensor, file: rasterio.DatasetReader) -> str:
    """Bands column: from the suffix of a one-band file, else "" where the file states them itself."""
    if file.count == 1:
        for word in reversed(_words(path.stem)):
            if word in sensor.band_words:
                try:
                    return band_name(sensor.name, word)
                except ValueError:
                    continue
    return ""


def _place(relative: Path, by: str) -> str:
    """The folder's path, or the file name without dates, times, bands and sensor words."""
    if by == "folder" and relative.parent != Path("."):
        return "_".join(relative.parent.parts)
    known = set(_LABEL_WORDS)
    for row in SENSORS.values():
        known |= row.words | row.band_words | (row.clear.words if row.clear else frozenset())
    words = [word for word in re.split(r"[_\-. ]+", _DATE.sub("", relative.stem)) if word]
    kept = [word for word in words if word.lower() not in known and not re.match(r"^(T\d{6}|\d+m)$", word)]
    return "_".join(kept) or relative.stem


def _draft_row(path: Path, root: Path, by: str, questions: list[tuple[str, str]]) -> dict[str, str] | None:
    relative = path.relative_to(root)

    def ask(text: str) -> None:
        questions.append((str(relative), text))

    try:
        local_file(root, str(relative))
        file = open_raster(path)
    except ValueError as error:
        ask(f"left out: {error}")
        return None
    with file:
        sensor = _sensor(relative, file)
        facts = {"place": _place(relative, by), "sensor": sensor, "path": relative.as_posix()}
        cells = dict.fromkeys(COLUMNS, "") | facts
        cells["datetime"] = date_in(relative.name) or date_in(str(relative.parent))
        if not sensor:
            ask("sensor: not recognised")
            return cells
        if file.crs is None:
            ask("has no CRS: a build will refuse it")
        row = SENSORS.get(sensor.removeprefix(_MASK))
        if row is not None and row.dated and not cells["datetime"]:
            ask(f"datetime: none in the name, and {row.name} needs one")
        if row is not None and sensor.startswith(_MASK) and row.clear:
            cells["classes"] = row.clear.classes
            ask(f"classes: {row.clear.classes} drafted as clear ({row.clear.source}); check")
        elif row is not None:
            _draft_image(cells, row, file, root, ask)
        return cells


def _draft_image(
    cells: dict[str, str], row: Sensor, file: rasterio.DatasetReader, root: Path, ask: Callable[[str], None]
) -> None:
    """Fills bands and units of an image of the sensor, and asks for what is not stated."""
    path = root / cells["path"]
    cells["bands"] = _bands(Path(cells["path"]), row, file)
    alpha = file.colorinterp.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in file.colorinterp else 0
    bands: Mapping[str, int] = {}
    try:
        bands, _ = band_order(file, row.name, (cells["bands"],) if cells["bands"] else (), alpha)
    except RasterRefused as error:
        ask(f"bands: {error}")
    if row.offset is not None:
        whole = file.dtypes[0] in ("uint16", "int16") and all(scale == 1 for scale in file.scales)
        cells["units"] = row.unit if whole else ""
        stated = None
        try:
            stated = known_offset(row, file, path, root, bands) if bands else None
        except RasterRefused as error:
            ask(f"offset: {error}")
        if stated is None and not any(file.offsets):
            ask(
                f"offset: not known from metadata; {row.offset.usual:g} where the product still carries it, 0 where "
                "it was removed (never by date)"
            )
        if not cells["units"]:
            ask(f"units: {listed(row.units_accepted)}")
    elif row.units_accepted == (row.unit,):
        cells["units"] = row.unit
        if row.eight_bit and file.dtypes[0] != row.dtype:
            ask(f"scale: {file.dtypes[0]} imagery needs a scale to 0..255")
    elif not (file.tags().get("units") or file.units[0]):
        ask(f"units: {listed(row.units_accepted)}")


def _clashes(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Questions about rasters a build would refuse as given twice: same place, sensor, date and band."""
    first: dict[tuple[str, ...], str] = {}
    text = "place: another raster has the same place, sensor, date and bands; is it another place (--place-by stem)?"
    questions = []
    for row in rows:
        key = tuple(row[column] for column in ("place", "sensor", "datetime", "bands"))
        if row["sensor"] in SENSORS and first.setdefault(key, row["path"]) != row["path"]:
            questions.append((row["path"], text))
    return questions


def draft(folder: str | Path, by: str = "folder") -> Draft:
    """Looks at every GeoTIFF and JPEG 2000 below a folder, in name order.

    Args:
        folder: where the rasters lie.
        by: "folder" or "stem", what names the places.

    Returns:
        The draft.

    Raises:
        CatalogError: no such folder, or no raster in it.
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


def render(drafted: Draft, limit: int = 40) -> str:
    """A draft as text: what is in it and what the user must fill in, equal questions counted together.

    Args:
        drafted: the draft.
        limit: kinds of questions to show.

    Returns:
        Lines for the terminal.
    """
    sensors = Counter(row["sensor"] or "(not recognised)" for row in drafted.rows)
    rasters = sum(bool(row["path"]) for row in drafted.rows)
    lines = [
        f"{rasters} rasters in {len({row['place'] for row in drafted.rows})} places: "
        + ", ".join(f"{name} {count}" for name, count in sorted(sensors.items()))
    ]
    grouped: dict[str, list[str]] = {}
    for path, text in drafted.questions:
        grouped.setdefault(text, []).append(path)
    if grouped:
        lines += ["", "to be filled in or checked:"]
        for text, paths in list(grouped.items())[:limit]:
            lines.append(f"  {len(paths):5d} files, e.g. {paths[0]}\n        {text}")
        if len(grouped) > limit:
            lines.append(f"  ... and {len(grouped) - limit} more kinds")
    return "\n".join(lines)
