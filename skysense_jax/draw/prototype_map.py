"""The prototypes a place's cells are assigned to, as files: a picture beside imagery and label map, and a GeoTIFF."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image, ImageDraw
from rasterio.crs import CRS
from rasterio.transform import from_bounds

from skysense_jax.data.records import SYNTHETIC_TAG, Meta, Record, as_text
from skysense_jax.draw import places
from skysense_jax.ops.prototypes import NO_PROTOTYPE

_SIDE, _GAP, _LINE, _ROWS, _SWATCHES = 224, 10, 18, 8, 16


def write_geotiff(path: str | Path, assigned: np.ndarray, record: Record, tags: Mapping[str, str]) -> None:
    """Writes an assignment where its place lies: in the record's CRS, with pixels that divide its footprint.

    Args:
        path: of the file.
        assigned: uint16 [h, w], NO_PROTOTYPE = no valid input.
        record: of the place.
        tags: text to keep with it.

    Raises:
        ValueError: the record does not say where the place is.
    """
    left, bottom, right, top = (float(x) for x in record["footprint"])
    if not (left < right and bottom < top):
        raise ValueError(
            f"place {as_text(record['place'])!r}: its footprint {(left, bottom, right, top)} "
            "(left, bottom, right, top) has no area; build the dataset again"
        )
    height, width = assigned.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=width,
        height=height,
        count=1,
        dtype="uint16",
        nodata=NO_PROTOTYPE,
        crs=CRS.from_user_input(as_text(record["crs"])),
        transform=from_bounds(left, bottom, right, top, width, height),
        compress="deflate",
    ) as file:
        file.write(assigned.astype(np.uint16), 1)
        file.set_band_description(1, "prototype")
        file.update_tags(**tags)


def synthetic_tag(meta: Meta) -> dict[str, str]:
    """The tag of every raster made from synthetic data; none for other datasets."""
    return {SYNTHETIC_TAG: "1"} if meta.get("synthetic") else {}


def colours(count: int) -> np.ndarray:
    """Chooses a colour for each of `count` prototypes, neighbours in number far apart in hue: uint8 [count, 3]."""
    hues = [k * 0.618034 % 1 for k in range(count)]
    palette = [colorsys.hsv_to_rgb(hue, (0.85, 0.55)[k // 2 % 2], (0.95, 0.7)[k % 2]) for k, hue in enumerate(hues)]
    return (255 * np.array(palette)).astype(np.uint8)


def draw(record: Record, meta: Meta, maps: Mapping[str, np.ndarray], count: int, title: str) -> Image.Image:
    """Draws a place: imagery, the maps in order, its label map, with legends and the dataset's SYNTHETIC badge.

    The legend has the prototypes of the first map, the most frequent ones where they are too many.

    Args:
        record: of the place.
        meta: the dataset's metadata.
        maps: title -> [h, w] integers below `count`, NO_PROTOTYPE = no valid input.
        count: number of prototypes.
        title: text above.

    Returns:
        The picture.
    """
    classes = {int(key): name for key, name in meta["label_map_classes"].items()}
    panels = [_imagery(record, meta)]
    panels += [(name, places.paint(numbers, dict(enumerate(colours(count))))) for name, numbers in maps.items()]
    panels.append(("label map", places.paint(record["label_map"], places.cover_colours(classes))))
    width = len(panels) * (_SIDE + _GAP) + _GAP
    top = 34 + _LINE
    canvas = Image.new("RGB", (width, top + _SIDE + _GAP + _ROWS * _LINE), (250, 250, 250))
    pen, font = ImageDraw.Draw(canvas), places.letters()
    pen.text((_GAP, 8), title, (0, 0, 0), font)
    places.badge(pen, width, meta)
    for column, (name, image) in enumerate(panels):
        left = _GAP + column * (_SIDE + _GAP)
        pen.text((left, 34), name, (0, 0, 0), font)
        if image is not None:
            canvas.paste(places.enlarge(image, _SIDE), (left, top))
    legend_top = top + _SIDE + _GAP
    first = next(iter(maps.values()))
    numbers, cells = np.unique(first[first != NO_PROTOTYPE], return_counts=True)
    shown = sorted(numbers[np.argsort(-cells, kind="stable")][:_SWATCHES])
    entries = [(colours(count)[k], f"{k}  {np.mean(first == k):.0%}") for k in shown]
    _legend(pen, (2 * _GAP + _SIDE, legend_top), entries)
    label = record["label_map"]
    entries = [
        (np.array(colour), f"{classes[key][:24]}  {np.mean(label == key):.0%}")
        for key, colour in places.cover_colours(classes).items()
        if (label == key).any()
    ]
    _legend(pen, (width - _SIDE - _GAP, legend_top), entries)
    return canvas


def _imagery(record: Record, meta: Meta) -> tuple[str, np.ndarray | None]:
    """The finest optical image there is: HR, else the clearest Sentinel-2 date."""
    if len(record.get("hr_image", ())) or not len(record.get("s2_image", ())):
        return places.photo_panel("hr", record, meta)
    clearest = int((record["s2_clear"] * record["s2_valid"]).mean((1, 2)).argmax())
    shown = places.hatch(places.true_colour(record["s2_image"][clearest]), record["s2_valid"][clearest] > 0)
    return f"s2  {places.date_text(record['s2_date'][clearest])}  true colour", shown


def _legend(pen: ImageDraw.ImageDraw, at: tuple[int, int], entries: list[tuple[np.ndarray, str]]) -> None:
    """Two columns of (colour uint8 [3], text) with their left upper corner at (x, y)."""
    left, top = at
    for number, (colour, text) in enumerate(entries[: 2 * _ROWS]):
        x, y = left + number // _ROWS * (_SIDE // 2), top + number % _ROWS * _LINE
        pen.rectangle((x, y, x + 13, y + 13), fill=tuple(int(v) for v in colour), outline=(120, 120, 120))
        pen.text((x + 19, y), text, (0, 0, 0), places.letters())
