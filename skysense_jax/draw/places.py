"""`skysense-jax data preview`: one place as a picture, as a remote-sensing person looks at it before trusting it.

A sensor's row names its colours. Stretches are fixed (never per image), so that two places can be compared: Sentinel-2
true colour shows reflectance 0..0.25, Sentinel-1 shows VV, VH and VV-VH in fixed dB ranges, the surface model is shaded
relief over the place's own height range. Invalid pixels are hatched, the share of clear pixels stands over every date,
and synthetic data says so in the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from skysense_jax.core.days import iso_date
from skysense_jax.data.records import Meta, Record, as_text, read_place
from skysense_jax.sensors import NO_DATE, SENSORS, UNLABELLED, Sensor, on_fine_grid, pixels_per_base

Panel = tuple[str, np.ndarray | None]
"""(title, uint8 [H, W, 3]), None where the place has no such image."""

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_LARGE, _SMALL, _GAP, _TEXT, _MOST_DATES = 384, 144, 10, 18, 8
_TRUE_COLOUR = ("B04", "B03", "B02")
_COVER_COLOURS = {
    "water": (40, 100, 200),
    "forest": (20, 100, 40),
    "trees": (20, 100, 40),
    "grassland": (150, 200, 90),
    "rangeland": (200, 205, 140),
    "cropland": (230, 180, 80),
    "crops": (230, 180, 80),
    "built-up": (200, 40, 40),
    "built": (200, 40, 40),
    "bare": (180, 165, 145),
}
_OTHER_COLOURS = (
    (120, 60, 160),
    (60, 180, 180),
    (240, 120, 160),
    (120, 120, 60),
    (90, 90, 220),
    (240, 240, 120),
    (70, 70, 70),
    (0, 160, 110),
)


def date_text(day: int) -> str:
    """ISO date of a stored day (days since 1970-01-01)."""
    return "no date" if day == NO_DATE else iso_date(day)


def hatch(image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Paints invalid pixels in a diagonal hatch.

    Args:
        image: uint8 [H, W, 3].
        valid: bool [H, W].

    Returns:
        uint8 [H, W, 3].
    """
    y, x = np.mgrid[0 : valid.shape[0], 0 : valid.shape[1]]
    pattern = np.where(((x + y) % 4 < 2)[..., None], np.uint8(90), np.uint8(130))
    return np.where(valid[..., None], image, pattern).astype(np.uint8)


def photo(image: np.ndarray) -> np.ndarray:
    """Red, green and blue [H, W, 3] in 0..255 -> uint8[H, W, 3], as they are."""
    return image.clip(0, 255).astype(np.uint8)


def true_colour(image: np.ndarray) -> np.ndarray:
    """Sentinel-2 [H, W, 13] offset-removed DN -> uint8[H, W, 3]: reflectance 0..0.25 with the gamma of a screen."""
    index = [SENSORS["s2"].bands.index(band) for band in _TRUE_COLOUR]
    shown = (image[..., index].astype(np.float32) / 2500.0).clip(0, 1) ** (1 / 1.8)
    return (shown * 255).astype(np.uint8)


def radar_colour(image: np.ndarray) -> np.ndarray:
    """Sentinel-1 [H, W, 2] dB -> uint8[H, W, 3]: VV -20..0, VH -27..-7, VV minus VH 2..14 dB (usual false colour)."""
    vv, vh = image[..., 0], image[..., 1]
    shown = np.stack([(vv + 20) / 20, (vh + 27) / 20, (vv - vh - 2) / 12], -1).clip(0, 1)
    return (shown * 255).astype(np.uint8)


def hillshade(height: np.ndarray, step: float) -> np.ndarray:
    """Relief lit from the north-west, tinted by relative height.

    Args:
        height: [H, W] in metres.
        step: side of a pixel in metres.

    Returns:
        uint8 [H, W, 3].
    """
    dy, dx = np.gradient(height.astype(np.float32), step)
    norm = np.sqrt(dx**2 + dy**2 + 1)
    # Sun in the north-west, 45 degrees high: unit vector (east, south, up) = (-0.5, -0.5, 0.707); the normal is
    # (-dx, -dy, 1).
    lit = ((0.5 * dx + 0.5 * dy + 0.707) / norm).clip(0, 1)
    low, high = np.percentile(height, [1, 99])
    t = ((height - low) / max(high - low, 1e-3)).clip(0, 1)[..., None]
    tint = (1 - t) * np.array([110, 150, 120]) + t * np.array([235, 220, 190])
    return (tint * (0.35 + 0.75 * lit[..., None])).clip(0, 255).astype(np.uint8)


class Picture(NamedTuple):
    """How a sensor is painted. paint: [H, W, all bands] in stored units -> uint8[H, W, 3]. caption: what is shown."""

    paint: Callable[[np.ndarray], np.ndarray]
    caption: str


PICTURES = {
    "photo": Picture(photo, "red, green, blue"),
    "true colour": Picture(true_colour, "true colour B04 B03 B02, reflectance 0..0.25"),
    "radar": Picture(radar_colour, "VV, VH, VV-VH"),
}
"""`picture` of a sensor's row -> how it is painted; FIRST_BAND needs the row's statistics."""

FIRST_BAND = "first band"


def colour(name: str, image: np.ndarray) -> np.ndarray:
    """Colours of one acquisition, with fixed stretches, as the sensor's row says.

    Args:
        name: name of a row of the table.
        image: [H, W, all bands of the row] in stored units.

    Returns:
        uint8 [H, W, 3]; for "first band" that band in grey, within two deviations of its mean.
    """
    row = SENSORS[name]
    if row.picture != FIRST_BAND:
        return PICTURES[row.picture].paint(image)
    grey = (0.5 + (image[..., :1].astype(np.float32) - row.mean[0]) / (4 * row.std[0])).clip(0, 1)
    return np.repeat((grey * 255).astype(np.uint8), 3, axis=-1)


def large(row: Sensor) -> bool:
    """Whether a sensor has a large panel: it shows details and no dates; the others have a row of dates each."""
    return on_fine_grid(row) and not row.dated


def cover_colours(classes: Mapping[int, str]) -> dict[int, Colour]:
    """Colour of every class of a label map: known names get the customary colour, others the next free one."""
    free = iter(_OTHER_COLOURS * (1 + len(classes) // len(_OTHER_COLOURS)))
    return {key: _COVER_COLOURS[name] if name in _COVER_COLOURS else next(free) for key, name in classes.items()}


def letters() -> Font:
    """The font of every picture."""
    return ImageFont.load_default(12)


def enlarge(image: np.ndarray, size: int) -> Image.Image:
    """A square picture; what is coarser keeps its pixels visible.

    Args:
        image: uint8 [S, S, 3].
        size: pixels along a side of the picture.

    Returns:
        The picture.
    """
    method = Image.Resampling.NEAREST if image.shape[0] < size else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize((size, size), method)


def _pick(count: int) -> np.ndarray:
    """Indices of at most eight dates, evenly spread."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, _MOST_DATES)).round().astype(int)) if count else np.zeros(0, int)
    )


def draw(record: Record, meta: Meta) -> Image.Image:
    """Picture of one record: large panels and the label map above; then one row of dates per other sensor.

    Args:
        record: the place.
        meta: the dataset's metadata.

    Returns:
        The picture.
    """
    series = [name for name, row in SENSORS.items() if f"{name}_image" in record and not large(row)]
    panels = _large_panels(record, meta)
    width = max(len(panels) * (_LARGE + _GAP) + 190, _MOST_DATES * (_SMALL + _GAP)) + _GAP
    height = 50 + _TEXT + _LARGE + _GAP + len(series) * (_SMALL + 2 * _TEXT + _GAP)
    canvas = Image.new("RGB", (width, height), (250, 250, 250))
    pen, font = ImageDraw.Draw(canvas), letters()
    # a dataset without classes stores one place for a label all the same
    labels = [name for number, name in enumerate(meta["label_classes"]) if record["label"][number]]
    where = "no georeference"
    if meta["gsd"]:
        where = f"lon {float(record['lon']):.4f} lat {float(record['lat']):.4f}   {as_text(record['crs'])[:24]}"
    size = f"tile {meta['tile']} px" + (f" of {meta['gsd']:g} m" if meta["gsd"] else "")
    title = f"{as_text(record['place'])}   {', '.join(labels) or 'no label'}   {where}   {size}"
    pen.text((_GAP, 8), title, (0, 0, 0), font)
    badge(pen, width, meta)
    top = 34
    for column, (title, image) in enumerate(panels):
        left = _GAP + column * (_LARGE + _GAP)
        pen.text((left, top), title, (0, 0, 0), font)
        if image is None:
            pen.rectangle((left, top + _TEXT, left + _LARGE, top + _TEXT + _LARGE), outline=(170, 170, 170))
            pen.text((left + _LARGE // 2 - 24, top + _LARGE // 2), "missing", (120, 120, 120), font)
        else:
            canvas.paste(enlarge(image, _LARGE), (left, top + _TEXT))
    _legend(pen, font, (_GAP + len(panels) * (_LARGE + _GAP), top + _TEXT), record["label_map"], meta)
    top += _TEXT + _LARGE + _GAP
    for name in series:
        _series(canvas, top, name, record)
        top += _SMALL + 2 * _TEXT + _GAP
    return canvas


def badge(pen: ImageDraw.ImageDraw, width: int, meta: Meta) -> None:
    """Says in a picture that its data is synthetic, where it is.

    Args:
        pen: draws on the picture.
        width: pixels along the picture.
        meta: the dataset's metadata.
    """
    if meta["synthetic"]:
        pen.rectangle((width - 130, 4, width - 8, 28), fill=(200, 30, 30))
        pen.text((width - 112, 9), "SYNTHETIC", (255, 255, 255), letters())


def paint(values: np.ndarray, colours: Mapping[int, Colour]) -> np.ndarray:
    """A map in the colours of its values, light grey where a value has none.

    Args:
        values: [H, W].
        colours: value -> colour.

    Returns:
        uint8 [H, W, 3].
    """
    image = np.full((*values.shape, 3), 235, np.uint8)
    for key, colour in colours.items():
        image[values == key] = colour
    return image


def photo_panel(name: str, record: Record, meta: Meta) -> Panel:
    """The first image of an undated sensor, in its colours.

    Args:
        name: name of a row of the table.
        record: the place.
        meta: the dataset's metadata.

    Returns:
        The panel.
    """
    if not len(record.get(f"{name}_image", ())):
        return name, None
    pixel = f"  {_step(name, meta):g} m" if meta["gsd"] else ""
    title = f"{name}  {date_text(record[f'{name}_date'][0])}{pixel}"
    return title, hatch(colour(name, record[f"{name}_image"][0]), record[f"{name}_valid"][0] > 0)


def _step(name: str, meta: Meta) -> float:
    """Metres of a pixel; the instrument's where nothing is known (it only shades)."""
    row = SENSORS[name]
    return meta["gsd"] / pixels_per_base(row, meta["ratio"]) if meta["gsd"] else row.gsd


def _relief_panel(name: str, record: Record, meta: Meta) -> Panel:
    if not len(record.get(f"{name}_image", ())):
        return name, None
    surface, valid = record[f"{name}_image"][0][..., 0], record[f"{name}_valid"][0] > 0
    filled = np.where(valid, surface, np.median(surface[valid]) if valid.any() else 0.0)
    relief = hatch(hillshade(filled, _step(name, meta)), valid)
    return f"{name}  {filled.min():.1f} .. {filled.max():.1f} {SENSORS[name].unit}", relief


def _large_panels(record: Record, meta: Meta) -> list[Panel]:
    panels = [
        (_relief_panel if row.heights else photo_panel)(name, record, meta)
        for name, row in SENSORS.items()
        if large(row)
    ]
    colours = cover_colours({int(key): name for key, name in meta["label_map_classes"].items()})
    cover = record["label_map"]
    panels.append(("label map" if (cover != UNLABELLED).any() else "label map  (unlabelled)", paint(cover, colours)))
    return panels


def _legend(pen: ImageDraw.ImageDraw, font: Font, at: tuple[int, int], cover: np.ndarray, meta: Meta) -> None:
    classes = {int(key): name for key, name in meta["label_map_classes"].items()}
    left, top = at
    for key, colour in [*cover_colours(classes).items(), (UNLABELLED, (235, 235, 235))]:
        share = float((cover == key).mean())
        pen.rectangle((left, top, left + 14, top + 14), fill=colour, outline=(120, 120, 120))
        pen.text((left + 20, top), f"{classes.get(key, 'unlabelled')[:20]} {share:.0%}", (0, 0, 0), font)
        top += 19


def _series(canvas: Image.Image, top: int, name: str, record: Record) -> None:
    """One row of dates of a sensor: its colours, the date and the share of clear pixels."""
    pen, font, row = ImageDraw.Draw(canvas), letters(), SENSORS[name]
    images, valid, clear = record[f"{name}_image"], record[f"{name}_valid"] > 0, record[f"{name}_clear"] > 0
    caption = FIRST_BAND if row.picture == FIRST_BAND else PICTURES[row.picture].caption
    pen.text((_GAP, top), f"{name}  {len(images)} dates  {caption}", (0, 0, 0), font)
    for column, t in enumerate(_pick(len(images))):
        left = _GAP + column * (_SMALL + _GAP)
        shown = hatch(colour(name, images[t]), valid[t])
        canvas.paste(enlarge(shown, _SMALL), (left, top + 2 * _TEXT))
        share = f"  clear {float((clear[t] & valid[t]).mean()):.0%}" if row.clear else ""
        pen.text((left, top + _TEXT), f"{date_text(record[f'{name}_date'][t])}{share}", (60, 60, 60), font)


def preview(folder: str | Path, place: str, out: str | Path) -> Path:
    """Writes the picture of one place as a PNG.

    Args:
        folder: the dataset.
        place: id of the place, or its number.
        out: the file to write.

    Returns:
        Its path.

    Raises:
        ValueError: as :func:`read_place`, or the file's name does not end in .png.
    """
    record, meta = read_place(folder, place)
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the preview is a PNG, give a name that ends in .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(record, meta).save(out)
    return out
