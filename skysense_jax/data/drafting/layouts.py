"""Drafts catalogs of folders whose layout is known, from file names alone: images without georeference, and SEN12MS.

Files that do not fit the layout are left out and named. Nothing is opened: the build checks every file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from skysense_jax.data.drafting.rasters import Draft, date_in
from skysense_jax.data.ingest.catalog import COLUMNS, SKIPPED_BAND, CatalogError
from skysense_jax.sensors import SENSORS

IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")

_SEASONS = {
    "ROIs2017_winter": "2017-01-15",
    "ROIs1158_spring": "2017-04-15",
    "ROIs1868_summer": "2017-07-15",
    "ROIs1970_fall": "2017-10-15",
}
"""SEN12MS's four meteorological seasons, December 2016 to November 2017, with their middles (Schmitt et al. 2019)."""
_SEN12MS = re.compile(rf"({'|'.join(_SEASONS)})_(s1|s2|lc)_(\d+)_p(\d+)\.tif")
_SEN12MS_FOLDER = re.compile(r"(s1|s2|lc)_\d+")
_SEN12MS_FACTS = {
    # Level 1C of 2016 and 2017, published in 2019: before ESA's offset of January 2022 existed
    "s2": {"sensor": "s2", "bands": ",".join(SENSORS["s2"].bands), "units": "dn", "offset": "0"},
    "s1": {"sensor": "s1", "bands": "VV,VH", "units": "db"},
    "lc": {"sensor": "label_map", "bands": ",".join(("IGBP", *SKIPPED_BAND * 3))},  # then three LCCS schemes
}
_IGBP = (
    "evergreen needleleaf forest",
    "evergreen broadleaf forest",
    "deciduous needleleaf forest",
    "deciduous broadleaf forest",
    "mixed forest",
    "closed shrubland",
    "open shrubland",
    "woody savanna",
    "savanna",
    "grassland",
    "permanent wetland",
    "cropland",
    "urban and built-up",
    "cropland and natural vegetation",
    "snow and ice",
    "barren",
    "water",
)
"""Classes 1..17 of the International Geosphere-Biosphere Programme, as MODIS MCD12Q1 numbers them."""


def _files(folder: str | Path) -> Iterator[Path]:
    """Every file below `folder`, relative to it, in name order. Raises CatalogError."""
    root = Path(folder).resolve()
    if not root.is_dir():
        raise CatalogError(f"{folder} is not a folder")
    yield from sorted(path.relative_to(root) for path in root.rglob("*") if not path.is_dir())


def _left_out(path: Path, why: str) -> tuple[str, str]:
    name = path.as_posix()
    return name if name.isprintable() else ascii(name), f"left out: {why}"


def images(folder: str | Path, sensor: str, bands: str = "", folder_classes: bool = False) -> Draft:
    """Drafts one place per image, named by its path with ":" for "/".

    Args:
        folder: where the images lie.
        sensor: name of a row of the table, what the images are.
        bands: of every file, in its order; "" where the files say.
        folder_classes: the folder that an image lies in is its scene class.

    Returns:
        The draft.

    Raises:
        CatalogError: no image in the folder, or a class name that a catalog cannot hold.
    """
    row = SENSORS[sensor]
    rows, questions = [], []
    for path in _files(folder):
        if any(part.startswith(".") for part in path.parts):
            questions.append(_left_out(path, "hidden"))
            continue
        if path.suffix.lower() not in IMAGES:
            questions.append(_left_out(path, f"files {path.suffix or 'without ending'} are not read as images"))
            continue
        if not path.as_posix().isprintable():
            questions.append(_left_out(path, "its name has characters a catalog cannot hold"))
            continue
        date = (date_in(path.name) or date_in(str(path.parent))) if row.dated else ""
        unit = row.unit if row.units_accepted == (row.unit,) else ""
        cells = {"place": path.as_posix().replace("/", ":"), "split": ""}
        rows.append(_cells(cells, sensor=sensor, datetime=date, path=path.as_posix(), bands=bands, units=unit))
        if row.dated and not date:
            questions.append((path.as_posix(), f"datetime: none in the name, and {sensor} needs one"))
        if not unit:
            questions.append((path.as_posix(), f"units: {', '.join(row.units_accepted)}"))
        if row.offset is not None:
            questions.append(
                (path.as_posix(), f"offset: {row.offset.usual:g} where the product still carries it, 0 where not")
            )
        if folder_classes and path.parent != Path("."):
            if ";" in path.parent.name:
                raise CatalogError(f"{path.parent}: a class name cannot contain a semicolon; rename the folder")
            rows.append(_cells(cells, sensor="label", classes=path.parent.name))
    if not rows:
        raise CatalogError(f"{folder} has no file ending in {', '.join(IMAGES)}")
    return Draft(rows, questions)


def _cells(common: dict[str, str], **cells: str) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "") | common | cells


def sen12ms(folder: str | Path) -> Draft:
    """Drafts one place per patch of SEN12MS (also of SEN12MS-CR, without its cloudy images).

    A place is named SEASON_REGION_pPATCH and has whichever of Sentinel-1, Sentinel-2 and land cover exists.

    Raises:
        CatalogError: no image of that layout in the folder.
    """
    places: dict[str, list[dict[str, str]]] = {}
    questions = []
    for path in _files(folder):
        match = _SEN12MS.fullmatch(path.name)
        if match is None:
            why = "cloudy" if "_s2_cloudy_" in path.name else "not a name like ROIs1158_spring_s2_1_p30.tif"
            questions.append(_left_out(path, why))
            continue
        season, kind, region, patch = match.groups()
        if _SEN12MS_FOLDER.fullmatch(path.parent.name) and path.parent.name != f"{kind}_{region}":
            questions.append(_left_out(path, "its folder names another sensor or region than its own name"))
            continue
        place = f"{season}_{region}_p{patch}"
        date = "" if kind == "lc" else _SEASONS[season]
        cells = {"place": place, "path": path.as_posix(), "datetime": date} | _SEN12MS_FACTS[kind]
        places.setdefault(place, []).append(_cells(cells))
    rows = []
    for _, patch_rows in sorted(places.items()):
        images = {row["sensor"] for row in patch_rows} & set(SENSORS)
        if not images:
            questions.append(_left_out(Path(patch_rows[0]["path"]), "a land cover map without s1 or s2"))
            continue
        if len(images) == 1:
            questions.append((patch_rows[0]["path"], f"no partner: {min(images)} alone, an unpaired place"))
        rows += patch_rows
    if not rows:
        raise CatalogError(f"{folder} has no s1 or s2 file named like ROIs1158_spring_s2_1_p30.tif")
    questions.append((rows[0]["path"], "datetime: only the season is known, its middle is drafted; check"))
    legend = next((row for row in rows if row["sensor"] == "label_map"), None)
    if legend:  # one row names the classes for all
        legend["classes"] = ";".join(f"{number}={name}" for number, name in enumerate(_IGBP, 1))
    return Draft(rows, questions)
