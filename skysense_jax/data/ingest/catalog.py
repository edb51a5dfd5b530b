"""The catalog: one row per raster, read from CSV or GeoParquet, validated before any raster is opened.

The columns are place, sensor, datetime and path (relative to the catalog's folder), and optionally bands, units, scale,
offset, nodata, classes and split. `sensor` is a sensor of the table, `label`, `label_map` or `mask:<sensor>`. A mistake
in the table itself (unknown column or sensor, unreadable date or number) raises :class:`CatalogError`, which lists all
such rows by number. A problem with one raster (path outside the root, file missing, date missing) refuses that row
alone; the refusal is counted and named.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from skysense_jax.core.days import day_number
from skysense_jax.data.records import SPLITS
from skysense_jax.sensors import NO_DATE, SENSORS, UNITS, UNLABELLED, band_name

COLUMNS = ("place", "sensor", "datetime", "path", "bands", "units", "scale", "offset", "nodata", "classes", "split")
REQUIRED = ("place", "sensor", "datetime", "path")
SKIPPED_BAND = "-"
"""Entry of `bands` for a band of the file that is not used."""
NO_NODATA = "none"
"""Entry of `nodata` that switches the file's own nodata value off."""
_MAX_LISTED = 20
_Cells = Iterable[tuple[int, dict[str, str]]]
"""(row number, column -> text) of every row; the first item is the header."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class CatalogError(ValueError):
    """The catalog cannot be used as it is; the message lists the rows and what to change."""


class Row(NamedTuple):
    """One validated catalog row.

    Attributes:
        number: line in the CSV file (the header is line 1) or 1-based row of the parquet file.
        place: name of the place.
        kind: "image", "mask", "label_map" or "label".
        sensor: sensor of the table; "" for labels.
        date: days since 1970-01-01, or NO_DATE.
        path: resolved file; None for "label".
        name: the path as the catalog writes it.
        bands: canonical names in file order, SKIPPED_BAND for an unused band (of a mask or label map: all but one,
            whatever its name); () = take them from the file.
        units: units of the numbers, lower case; "" = the catalog does not say.
        scale, offset, nodata: one number, or one per band of the file; () = the catalog does not say.
        drop_nodata: the nodata value that the file declares is to be ignored.
        classes: label names, "id=name" pairs of a label map, or clear values of a mask.
        split: "train", "test" or "".
    """

    number: int
    place: str
    kind: str
    sensor: str
    date: int
    path: Path | None
    name: str
    bands: tuple[str, ...]
    units: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    nodata: tuple[float, ...]
    drop_nodata: bool
    classes: tuple[str, ...]
    split: str


class Catalog(NamedTuple):
    """A validated catalog.

    Attributes:
        path: the catalog file.
        root: its folder; every raster lies below it.
        sha256: digest of the catalog file, hexadecimal.
        places: name -> rows in catalog order; the names are sorted.
        refused: rows that cannot be used, as {"row", "place", "sensor", "path", "reason"}.
        sensors: sensors with at least one image row, in the table's order.
        label_classes: sorted union of the classes of all label rows.
        label_map_classes: id -> name, over all label maps.
    """

    path: Path
    root: Path
    sha256: str
    places: dict[str, tuple[Row, ...]]
    refused: tuple[dict[str, Any], ...]
    sensors: tuple[str, ...]
    label_classes: tuple[str, ...]
    label_map_classes: dict[int, str]


def parse_date(text: str) -> int:
    """Days since 1970-01-01 (UTC) of an ISO date or date and time; NO_DATE for an empty text.

    Raises:
        ValueError: `text` is no ISO date, or lies before 1970.
    """
    text = text.strip()
    if not text:
        return NO_DATE
    when = datetime.datetime.fromisoformat(text)
    if when.tzinfo is not None:
        when = when.astimezone(datetime.UTC)
    day = day_number(when.date())
    if day < 0:
        raise ValueError(f"{text} lies before 1970")
    return day


def _numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(",") if part.strip())
    if any(math.isinf(value) for value in values):
        raise ValueError("infinite")
    return values


def _kind(sensor: str) -> tuple[str, str]:
    """("image"|"mask"|"label_map"|"label", sensor of the table or ""). Raises ValueError for an unknown sensor."""
    if sensor in ("label", "label_map"):
        return sensor, ""
    kind, name = ("mask", sensor.removeprefix("mask:")) if sensor.startswith("mask:") else ("image", sensor)
    if name not in SENSORS:
        known = ", ".join(SENSORS)
        raise ValueError(f"unknown sensor {sensor!r}; known: {known}, label, label_map, mask:<sensor>")
    return kind, name


def _bands(kind: str, sensor: str, text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if kind != "image":
        if len(names) - names.count(SKIPPED_BAND) != 1:
            raise ValueError(f"bands {text!r} of a {kind} must name one band, {SKIPPED_BAND!r} for every other")
        return names
    names = tuple(name if name == SKIPPED_BAND else band_name(sensor, name) for name in names)
    used = [name for name in names if name != SKIPPED_BAND]
    if not used or len(set(used)) != len(used):
        raise ValueError(f"bands {text!r} must name distinct bands, at least one")
    return names


def _classes(kind: str, text: str) -> tuple[str, ...]:
    classes = tuple(part.strip() for part in text.split(";") if part.strip())
    if kind == "label" and not classes:
        raise ValueError("a label row needs classes, for example Forest;Water")
    if kind == "mask":
        if not classes:
            raise ValueError("a mask row needs its clear values in classes, for example 4;5;6")
        for value in classes:
            int(value)
    if kind == "label_map":
        for pair in classes:
            value, separator, name = pair.partition("=")
            if not separator or not name.strip() or not 0 <= int(value) < UNLABELLED:
                raise ValueError(f"classes of a label_map are id=name pairs with ids 0..{UNLABELLED - 1}, got {pair!r}")
    return classes


def local_file(root: Path, text: str) -> Path:
    """The regular file that a catalog names, symlinks resolved.

    Args:
        root: the catalog's folder, resolved.
        text: the path as the catalog writes it, relative to `root`.

    Returns:
        The resolved path, which lies below `root`.

    Raises:
        ValueError: `text` names anything else: a network or virtual path, a path outside `root`, a missing file, or
            something that is not a regular file.
    """
    if "://" in text or text.lstrip("/\\").lower().startswith("vsi"):
        raise ValueError(
            "not a local path: network and virtual paths are not read; download the file below the catalog's folder"
        )
    path = (root / text).resolve()
    if not path.is_relative_to(root):
        raise ValueError(
            f"outside the catalog's folder {root} (symlinks resolved); put the catalog in a folder above its rasters"
        )
    if not path.exists():
        raise ValueError("file not found")
    if not path.is_file():
        raise ValueError("not a regular file")
    return path


def _row(number: int, cells: Mapping[str, str]) -> Row:
    """Validates everything that needs no file. Raises ValueError naming the column."""

    def checked(column: str, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        try:
            return function(*arguments, **named)
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from error

    place = cells["place"]
    if not place:
        raise ValueError("place: empty")
    if "/" in place or "\n" in place:
        raise ValueError(f"place: {place!r} contains a slash or a line break")
    kind, sensor = checked("sensor", _kind, cells["sensor"])
    if kind == "label":
        if cells["path"]:
            raise ValueError("path: a label row has classes and no path (a raster of labels is a label_map)")
    elif not cells["path"]:
        raise ValueError("path: empty")
    units = cells["units"].lower()
    if units and kind == "image":
        accepted = SENSORS[sensor].units_accepted
        if units not in accepted:
            raise ValueError(f"units: {cells['units']!r} is not accepted for {sensor}; one of {', '.join(accepted)}")
    elif units and units not in UNITS:
        raise ValueError(f"units: unknown {cells['units']!r}; one of {', '.join(UNITS)}")
    if cells["split"] not in ("", *SPLITS):
        raise ValueError(f"split: {cells['split']!r} is neither train nor test")
    drop_nodata = cells["nodata"].lower() == NO_NODATA
    scale = checked("scale", _numbers, cells["scale"])
    if any(value == 0 or math.isnan(value) for value in scale):
        raise ValueError("scale: must be a number other than zero")
    offset = checked("offset", _numbers, cells["offset"])
    if any(math.isnan(value) for value in offset):
        raise ValueError("offset: must be a number")
    return Row(
        number=number,
        place=place,
        kind=kind,
        sensor=sensor,
        date=checked("datetime", parse_date, cells["datetime"]),
        path=None,
        name=cells["path"],
        bands=checked("bands", _bands, kind, sensor, cells["bands"]) if cells["bands"] and kind != "label" else (),
        units=units,
        scale=scale,
        offset=offset,
        nodata=() if drop_nodata else checked("nodata", _numbers, cells["nodata"]),
        drop_nodata=drop_nodata,
        classes=checked("classes", _classes, kind, cells["classes"]),
        split=cells["split"],
    )


def _read_csv(path: Path) -> _Cells:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restkey="", strict=True)
        try:
            yield 1, {name.strip(): "" for name in reader.fieldnames or ()}
            for cells in reader:
                if "" in cells:
                    raise CatalogError(
                        f"{path} row {reader.line_num}: more cells than columns; quote a cell that contains a comma"
                    )
                yield reader.line_num, {name.strip(): (value or "").strip() for name, value in cells.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise CatalogError(f"{path} is not UTF-8 CSV, after line {reader.line_num}: {error}") from error


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (list, tuple)):
        return ",".join(_text(part) for part in value)
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    return str(value).strip()


def _read_parquet(path: Path) -> _Cells:
    import pyarrow.parquet  # slow to import, and only GeoParquet catalogs need it

    try:
        pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowInvalid as error:
        raise CatalogError(f"{path} is not a parquet file: {error}") from error
    names = [name for name in pyarrow.parquet.read_schema(path).names if name not in ("geometry", "bbox")]
    yield 0, {name: "" for name in names}
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=names):
        for cells in batch.to_pylist():
            number += 1
            yield number, {name: _text(value) for name, value in cells.items()}


def _fail(path: Path, problems: list[str]) -> None:
    if problems:
        rest = f"\n... and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise CatalogError(f"{path} cannot be used:\n" + "\n".join(problems[:_MAX_LISTED]) + rest)


def _label_map_classes(rows: Iterable[Row], problems: list[str]) -> dict[int, str]:
    names: dict[int, str] = {}
    for row in rows:
        for pair in row.classes if row.kind == "label_map" else ():
            value, _, name = pair.partition("=")
            if names.setdefault(int(value), name.strip()) != name.strip():
                problems.append(
                    f"row {row.number}: classes: {pair} contradicts {value}={names[int(value)]} of an earlier row"
                )
    return dict(sorted(names.items()))


def read_catalog(path: str | Path) -> Catalog:
    """Reads and validates a catalog (.csv, .parquet or .geoparquet).

    Raises:
        CatalogError: there is no such file, the table cannot be read, or rows are wrong; the message lists them.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise CatalogError(f"{path}: no such catalog")
    lines = iter((_read_parquet if path.suffix.lower() in (".parquet", ".geoparquet") else _read_csv)(path))
    _, header = next(lines)
    unknown = [name for name in header if name not in COLUMNS]
    missing = [name for name in REQUIRED if name not in header]
    if unknown or missing:
        raise CatalogError(
            f"{path}: unknown columns {unknown}, missing columns {missing}; a catalog has {', '.join(COLUMNS)}"
        )

    root = path.parent
    rows: list[Row] = []
    refused: list[dict[str, Any]] = []
    problems: list[str] = []
    splits: dict[str, tuple[str, int]] = {}
    for number, cells in lines:
        try:
            row = _row(number, {name: "" for name in COLUMNS} | cells)
        except ValueError as error:
            problems.append(f"row {number}: {error}")
            continue
        if row.split:
            split, first = splits.setdefault(row.place, (row.split, number))
            if split != row.split:
                problems.append(f"row {number}: split {row.split}, but row {first} puts place {row.place!r} in {split}")
        reason = ""
        if row.kind != "label":
            try:
                row = row._replace(path=local_file(root, row.name))
            except ValueError as error:
                reason = str(error)
        if row.kind in ("image", "mask") and row.date == NO_DATE and SENSORS[row.sensor].dated:
            reason = reason or f"no datetime, and {row.sensor} is a dated sensor"
        if reason:
            refused.append(
                {"row": number, "place": row.place, "sensor": cells["sensor"], "path": row.name, "reason": reason}
            )
        else:
            rows.append(row)
    label_map_classes = _label_map_classes(rows, problems)
    _fail(path, problems)
    if not rows and not refused:
        raise CatalogError(f"{path} has no rows")

    places: dict[str, list[Row]] = {}
    for row in rows:
        place = row._replace(split=splits[row.place][0]) if row.place in splits else row
        places.setdefault(row.place, []).append(place)
    present = {row.sensor for row in rows if row.kind == "image"}
    return Catalog(
        path=path,
        root=root,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        places={name: tuple(places[name]) for name in sorted(places)},
        refused=tuple(refused),
        sensors=tuple(name for name in SENSORS if name in present),
        label_classes=tuple(sorted({name for row in rows if row.kind == "label" for name in row.classes})),
        label_map_classes=label_map_classes,
    )
