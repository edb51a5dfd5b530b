"""Reconstructions as a picture: one row for each sensor of a place, what the model saw and what it made of it.

Columns: the input, the input with its hidden cells, its reconstruction, the reconstruction of its pair, and the pair as
it was measured. A reconstruction shows the model's pixels in the hidden cells and the measured ones elsewhere. The
colours are those of `data preview`: fixed stretches, so that steps of a run can be compared.
"""
from __future__ import annotations

from typing import Any, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from skysense_jax.data import preview
from skysense_jax.sensors import SENSORS

_SIDE, _GAP, _TEXT, _HIDDEN = 192, 8, 18, 128
COLUMNS = 5


def draw(
    contract: Mapping[str, Any], found: Mapping[str, Mapping[str, np.ndarray]], step: float, title: str, synthetic: bool
) -> Image.Image:
    """The grid. found: {sensor: {"image" [S, S, C], "mask" [S, S] 1 = hidden, "<target>" [S, S, C]}} in raw units and
    the contract's bands. step: metres of a pixel, for the relief.
    """
    size = (COLUMNS * (_SIDE + _GAP) + _GAP, 2 * _TEXT + len(found) * (_SIDE + _TEXT + _GAP) + _GAP)
    canvas = Image.new("RGB", size, (250, 250, 250))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    pen.text((_GAP, 8), title + ("   SYNTHETIC DATA" if synthetic else ""), (0, 0, 0), font)

    def shown(name: str, image: np.ndarray) -> np.ndarray:
        return preview.colour(name, in_table_order(contract, name, image), step)

    for row, (name, one) in enumerate(found.items()):
        top, pair = 2 * _TEXT + row * (_SIDE + _TEXT + _GAP), SENSORS[name].pair
        own = shown(name, one["image"])
        hidden = np.where(one["mask"][..., None] > 0, np.uint8(_HIDDEN), own)
        panels = [(name, own), (f"{name}, masked", hidden), (f"{name} from {name}", shown(name, one[name]))]
        if pair in one:
            panels += [(f"{pair} from {name}", shown(pair, one[pair])), (pair, shown(pair, found[pair]["image"]))]
        for column, (label, image) in enumerate(panels):
            left = _GAP + column * (_SIDE + _GAP)
            pen.text((left, top), label, (0, 0, 0), font)
            canvas.paste(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top + _TEXT))
    return canvas


def in_table_order(contract: Mapping[str, Any], name: str, image: np.ndarray) -> np.ndarray:
    """[..., the contract's bands] -> [..., all bands of the sensor's row], 0 where the contract has none."""
    table, bands = SENSORS[name].bands, contract["sensors"][name]["bands"]
    full = np.zeros((*image.shape[:-1], len(table)), np.float32)
    full[..., [table.index(band) for band in bands]] = image
    return full
