"""Reconstructions as a picture: one row for each sensor of a place, what the model saw and what it made of it.

Columns: the input, the input with its hidden cells, its reconstruction, the reconstruction of its pair, and the pair as
it was measured. The model's pixels are shown in the hidden cells alone, which is where it has learnt to draw; the
others are the measured ones of the input, and blank for the pair, of which it sees nothing. Over a reconstruction stand
its error and that of drawing the training mean instead. The colours are those of `data preview`, heights are grey from
the lowest measured one to the highest: fixed stretches, so that panels and steps of a run can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from skysense_jax.draw import places
from skysense_jax.sensors import SENSORS

_SIDE, _GAP, _TEXT = 192, 8, 18
COLUMNS = 5
HIDDEN = np.array([150, 165, 195], np.uint8)  # no height looks like it
NOTE = (
    "number: mean absolute error of hidden pixels in deviations (in brackets: of drawing the mean).   blue: hidden "
    "from the network, or not asked of it.   hatched: not measured"
)


def draw(
    contract: Mapping[str, Any], found: Mapping[str, Mapping[str, np.ndarray]], title: str, synthetic: bool
) -> Image.Image:
    """The grid. found: objectives.msgfm_views.reconstructions, in raw units and the contract's bands."""
    size = (COLUMNS * (_SIDE + _GAP) + _GAP, 3 * _TEXT + len(found) * (_SIDE + _TEXT + _GAP) + _GAP)
    canvas = Image.new("RGB", size, (250, 250, 250))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    pen.text((_GAP, 8), title + ("   SYNTHETIC DATA" if synthetic else ""), (0, 0, 0), font)

    def shown(name: str, image: np.ndarray) -> np.ndarray:
        known = found[name]["measured"] > 0
        if SENSORS[name].heights and known.any():
            return places.hatch(grey(image[..., 0], found[name]["image"][known]), known)
        return places.hatch(places.colour(name, in_table_order(contract, name, image)), known)

    for row, name in enumerate(name for name in contract["sensors"] if name in found):
        one, pair, top = found[name], SENSORS[name].pair, 2 * _TEXT + row * (_SIDE + _TEXT + _GAP)
        own, hidden = shown(name, one["image"]), one["mask"][..., None] > 0
        panels = [(name, own), (f"{name}, masked", np.where(hidden, HIDDEN, own))]
        for target, elsewhere in ((name, own), (pair, HIDDEN)):
            if target in one["made"]:
                label = "{} from {}: {:.2f} ({:.2f})".format(target, name, *one["errors"][target])
                panels.append((label, np.where(hidden, shown(target, one["made"][target]), elsewhere)))
        if pair in found:
            panels.append((pair, shown(pair, found[pair]["image"])))
        for column, (label, image) in enumerate(panels):
            left = _GAP + column * (_SIDE + _GAP)
            pen.text((left, top), label, (0, 0, 0), font)
            canvas.paste(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top + _TEXT))
    pen.text((_GAP, size[1] - _TEXT - 2), NOTE, (60, 60, 60), font)
    return canvas


def grey(heights: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Heights [H, W] -> uint8[H, W, 3]: black to white over the range of the measured ones, but for a hundredth at
    either end.
    """
    low, high = np.percentile(measured, [1, 99])
    shown = ((heights - low) / max(high - low, 1e-3)).clip(0, 1)
    return np.repeat((shown * 255).astype(np.uint8)[..., None], 3, axis=-1)


def in_table_order(contract: Mapping[str, Any], name: str, image: np.ndarray) -> np.ndarray:
    """[..., the contract's bands] -> [..., all bands of the sensor's row], 0 where the contract has none."""
    table, bands = SENSORS[name].bands, contract["sensors"][name]["bands"]
    full = np.zeros((*image.shape[:-1], len(table)), np.float32)
    full[..., [table.index(band) for band in bands]] = image
    return full
