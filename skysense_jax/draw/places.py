"""`skysense-jax data preview`: one place as a picture, as a remote-sensing person looks at it before trusting it.

Fixed stretches (never per image), so that two places can be compared: Sentinel-2 true colour shows reflectance 0..0.25,
Sentinel-1 shows VV, VH and VV-VH in fixed dB ranges, the surface model is shaded relief over the place's own height
range. Invalid pixels are hatched, the share of clear pixels stands over every date, and synthetic data says so in the
picture.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from skysense_jax.data.records import as_text, read_place
from skysense_jax.sensors import NO_DATE, SENSORS, UNLABELLED

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
    return "no date" if day == NO_DATE else (datetime.date(1970, 1, 1) + datetime.timedelta(int(day))).isoformat()


def hatch(image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Paints invalid pixels in a diagonal hatch. image uint8[H, W, 3], valid bool[H, W]."""
    y, x = np.mgrid[0 : valid.shape[0], 0 : valid.shape[1]]
    pattern = np.where(((x + y) % 4 < 2)[..., None], np.uint8(90), np.uint8(130))
    return np.where(valid[..., None], image, pattern).astype(np.uint8)


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
    """Heights [H, W] in metres on pixels of `step` metres -> uint8[H, W, 3]: relief lit from the north-west, tinted by
    relative height."""
    dy, dx = np.gradient(height.astype(np.float32), step)
    norm = np.sqrt(dx**2 + dy**2 + 1)
    # Sun in the north-west, 45 degrees high: unit vector (east, south, up) = (-0.5, -0.5, 0.707); the normal is
    # (-dx, -dy, 1).
    lit = ((0.5 * dx + 0.5 * dy + 0.707) / norm).clip(0, 1)
    low, high = np.percentile(height, [1, 99])
    t = ((height - low) / max(high - low, 1e-3)).clip(0, 1)[..., None]
    tint = (1 - t) * np.array([110, 150, 120]) + t * np.array([235, 220, 190])
    return (tint * (0.35 + 0.75 * lit[..., None])).clip(0, 255).astype(np.uint8)


def colour(name: str, image: np.ndarray) -> np.ndarray:
    """One acquisition [H, W, all bands of the sensor's row] in stored units -> uint8[H, W, 3], with fixed stretches. A
    sensor without a rule: its first band, within two deviations of its mean.
    """
    if name == "hr":
        return image.clip(0, 255).astype(np.uint8)
    if name in ("s2", "s1"):
        return (true_colour if name == "s2" else radar_colour)(image)
    grey = (0.5 + (image[..., :1].astype(np.float32) - SENSORS[name].mean[0]) / (4 * SENSORS[name].std[0])).clip(0, 1)
    return np.repeat((grey * 255).astype(np.uint8), 3, axis=-1)


def cover_colours(classes: Mapping[int, str]) -> dict[int, tuple[int, int, int]]:
    """Colour of every class of a label map: known names get the customary colour, others the next free one."""
    free = iter(_OTHER_COLOURS * (1 + len(classes) // len(_OTHER_COLOURS)))
    return {key: _COVER_COLOURS[name] if name in _COVER_COLOURS else next(free) for key, name in classes.items()}


def letters() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of every picture."""
    return ImageFont.load_default(12)


def enlarge(image: np.ndarray, size: int) -> Image.Image:
    """A square picture of `size` pixels from uint8[S, S, 3]; what is coarser keeps its pixels visible."""
    method = Image.Resampling.NEAREST if image.shape[0] < size else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize((size, size), method)


def _pick(count: int) -> np.ndarray:
    """Indices of at most eight dates, evenly spread."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, _MOST_DATES)).round().astype(int)) if count else np.zeros(0, int)
    )


def draw(record: Mapping[str, Any], meta: Mapping[str, Any]) -> Image.Image:
    """Picture of one record: HR, surface model and label map above; then one row of dates per other sensor."""
    series = [name for name in SENSORS if f"{name}_image" in record and name not in ("hr", "dsm")]
    width = max(3 * (_LARGE + _GAP) + 190, _MOST_DATES * (_SMALL + _GAP)) + _GAP
    height = 50 + _TEXT + _LARGE + _GAP + len(series) * (_SMALL + 2 * _TEXT + _GAP)
    canvas = Image.new("RGB", (width, height), (250, 250, 250))
    pen, font = ImageDraw.Draw(canvas), letters()
    labels = [name for name, on in zip(meta["label_classes"], record["label"]) if on]
    where = "no georeference"
    if meta["gsd"]:
        where = f"lon {float(record['lon']):.4f} lat {float(record['lat']):.4f}   {as_text(record['crs'])[:24]}"
    size = f"tile {meta['tile']} px" + (f" of {meta['gsd']:g} m" if meta["gsd"] else "")
    title = f"{as_text(record['place'])}   {', '.join(labels) or 'no label'}   {where}   {size}"
    pen.text((_GAP, 8), title, (0, 0, 0), font)
    badge(pen, width, meta)
    top = 34
    for column, (title, image) in enumerate(_large_panels(record, meta)):
        left = _GAP + column * (_LARGE + _GAP)
        pen.text((left, top), title, (0, 0, 0), font)
        if image is None:
            pen.rectangle((left, top + _TEXT, left + _LARGE, top + _TEXT + _LARGE), outline=(170, 170, 170))
            pen.text((left + _LARGE // 2 - 24, top + _LARGE // 2), "missing", (120, 120, 120), font)
        else:
            canvas.paste(enlarge(image, _LARGE), (left, top + _TEXT))
    _legend(pen, font, (_GAP + 3 * (_LARGE + _GAP), top + _TEXT), record["label_map"], meta)
    top += _TEXT + _LARGE + _GAP
    for name in series:
        _series(canvas, pen, font, top, name, record)
        top += _SMALL + 2 * _TEXT + _GAP
    return canvas


def badge(pen: ImageDraw.ImageDraw, width: int, meta: Mapping[str, Any]) -> None:
    """Says in a picture of `width` pixels that its data is synthetic, where it is."""
    if meta["synthetic"]:
        pen.rectangle((width - 130, 4, width - 8, 28), fill=(200, 30, 30))
        pen.text((width - 112, 9), "SYNTHETIC", (255, 255, 255), letters())


def paint(values: np.ndarray, colours: Mapping[int, Any]) -> np.ndarray:
    """A map in the colours of its values, light grey where a value has none. values [H, W] -> uint8[H, W, 3]."""
    image = np.full((*values.shape, 3), 235, np.uint8)
    for key, colour in colours.items():
        image[values == key] = colour
    return image


def hr_panel(record: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[str, np.ndarray | None]:
    """(title, uint8[S, S, 3]) of a record's HR image, None where it has none."""
    if not len(record.get("hr_image", ())):
        return "hr", None
    pixel = f"  {meta['gsd'] / meta['ratio']:g} m" if meta["gsd"] else ""
    title = f"hr  {date_text(record['hr_date'][0])}{pixel}"
    return title, hatch(record["hr_image"][0], record["hr_valid"][0] > 0)


def _large_panels(record: Mapping[str, Any], meta: Mapping[str, Any]) -> list[tuple[str, np.ndarray | None]]:
    step = meta["gsd"] / meta["ratio"] if meta["gsd"] else SENSORS["dsm"].gsd  # only shades, where nothing is known
    panels = [hr_panel(record, meta)]
    if len(record.get("dsm_image", ())):
        surface, valid = record["dsm_image"][0][..., 0], record["dsm_valid"][0] > 0
        filled = np.where(valid, surface, np.median(surface[valid]) if valid.any() else 0.0)
        relief = hatch(hillshade(filled, step), valid)
        panels.append((f"dsm  {filled.min():.1f} .. {filled.max():.1f} m", relief))
    else:
        panels.append(("dsm", None))
    colours = cover_colours({int(key): name for key, name in meta["label_map_classes"].items()})
    cover = record["label_map"]
    panels.append(("label map" if (cover != UNLABELLED).any() else "label map  (unlabelled)", paint(cover, colours)))
    return panels


def _legend(
    pen: ImageDraw.ImageDraw, font: Any, at: tuple[int, int], cover: np.ndarray, meta: Mapping[str, Any]
) -> None:
    classes = {int(key): name for key, name in meta["label_map_classes"].items()}
    left, top = at
    for key, colour in [*cover_colours(classes).items(), (UNLABELLED, (235, 235, 235))]:
        share = float((cover == key).mean())
        pen.rectangle((left, top, left + 14, top + 14), fill=colour, outline=(120, 120, 120))
        pen.text((left + 20, top), f"{classes.get(key, 'unlabelled')[:20]} {share:.0%}", (0, 0, 0), font)
        top += 19


def _series(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, font: Any, top: int, name: str, record: Mapping[str, Any]
) -> None:
    """One row of dates of a sensor: false or true colour, the date and the share of clear pixels."""
    images, valid, clear = record[f"{name}_image"], record[f"{name}_valid"] > 0, record[f"{name}_clear"] > 0
    what = {"s2": "true colour B04 B03 B02, reflectance 0..0.25", "s1": "VV, VH, VV-VH"}.get(name, "first band")
    pen.text((_GAP, top), f"{name}  {len(images)} dates  {what}", (0, 0, 0), font)
    for column, t in enumerate(_pick(len(images))):
        left = _GAP + column * (_SMALL + _GAP)
        shown = hatch(colour(name, images[t]), valid[t])
        canvas.paste(enlarge(shown, _SMALL), (left, top + 2 * _TEXT))
        share = f"  clear {float((clear[t] & valid[t]).mean()):.0%}" if name == "s2" else ""
        pen.text((left, top + _TEXT), f"{date_text(record[f'{name}_date'][t])}{share}", (60, 60, 60), font)


def preview(folder: str | Path, place: str, out: str | Path) -> Path:
    """Writes the picture of one place of the dataset `folder` to the PNG `out` and returns its path. ValueError as
    :func:`read_place`."""
    record, meta = read_place(folder, place)
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the preview is a PNG, give a name that ends in .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(record, meta).save(out)
    return out
