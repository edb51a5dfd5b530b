"""Reconstructions as a picture: one row for each sensor of a place, what the model got and what it made of it.

Columns: the input, the input with its hidden cells, its reconstruction, the reconstruction of its pair, and the pair as
it was measured. The model's pixels are shown in the hidden cells alone, which is where it has learnt to draw; the
others are the measured ones of the input, and blank for the pair, of which it sees nothing. Over a reconstruction stand
its error and that of drawing the training mean instead. The colours are those of `data preview`, heights are grey from
the lowest measured one to the highest: fixed stretches, so that panels and steps of a run can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from skysense_jax.core.trees import Tree
from skysense_jax.draw import places
from skysense_jax.sensors import SENSORS, Contract

_SIDE, _GAP, _TEXT = 192, 8, 18
COLUMNS = 5
HIDDEN = np.array([150, 165, 195], np.uint8)  # no height looks like it
NOTE = (
    "number: mean absolute error of hidden pixels in deviations (in brackets: of drawing the mean).   "
    "blue: hidden from the network, or not asked of it.   hatched: not measured"
)


def draw(contract: Contract, reconstructed: Mapping[str, Tree], title: str, synthetic: bool) -> Image.Image:
    """Draws the reconstructions of a place, one row for each sensor.

    Args:
        contract: the input contract.
        reconstructed: of `models.msgfm_outputs.reconstructions`, in raw units and the contract's bands.
        title: text above.
        synthetic: whether the data is; the picture then says so.

    Returns:
        The picture.
    """
    size = (COLUMNS * (_SIDE + _GAP) + _GAP, 3 * _TEXT + len(reconstructed) * (_SIDE + _TEXT + _GAP) + _GAP)
    canvas = Image.new("RGB", size, (250, 250, 250))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    pen.text((_GAP, 8), title + ("   SYNTHETIC DATA" if synthetic else ""), (0, 0, 0), font)

    def shown(name: str, image: np.ndarray) -> np.ndarray:
        known = reconstructed[name]["measured"] > 0
        if SENSORS[name].heights and known.any():
            return places.hatch(grey(image[..., 0], reconstructed[name]["image"][known]), known)
        return places.hatch(places.colour(name, in_table_order(contract, name, image)), known)

    for row, name in enumerate(name for name in contract["sensors"] if name in reconstructed):
        entry, pair, top = reconstructed[name], SENSORS[name].pair, 2 * _TEXT + row * (_SIDE + _TEXT + _GAP)
        measured, hidden = shown(name, entry["image"]), entry["mask"][..., None] > 0
        panels = [(name, measured), (f"{name}, masked", np.where(hidden, HIDDEN, measured))]
        for target, elsewhere in ((name, measured), (pair, HIDDEN)):
            if target in entry["made"]:
                label = "{} from {}: {:.2f} ({:.2f})".format(target, name, *entry["errors"][target])
                panels.append((label, np.where(hidden, shown(target, entry["made"][target]), elsewhere)))
        if pair in reconstructed:
            panels.append((pair, shown(pair, reconstructed[pair]["image"])))
        for column, (label, image) in enumerate(panels):
            left = _GAP + column * (_SIDE + _GAP)
            pen.text((left, top), label, (0, 0, 0), font)
            canvas.paste(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top + _TEXT))
    pen.text((_GAP, size[1] - _TEXT - 2), NOTE, (60, 60, 60), font)
    return canvas


def grey(heights: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Paints heights black to white over the range of the measured ones, but for a hundredth at either end.

    Args:
        heights: [H, W].
        measured: [N], those that set the range.

    Returns:
        uint8 [H, W, 3].
    """
    low, high = np.percentile(measured, [1, 99])
    brightness = ((heights - low) / max(high - low, 1e-3)).clip(0, 1)
    return np.repeat((brightness * 255).astype(np.uint8)[..., None], 3, axis=-1)


def in_table_order(contract: Contract, name: str, image: np.ndarray) -> np.ndarray:
    """Brings the contract's bands to those of the sensor's row.

    Args:
        contract: the input contract.
        name: of the sensor.
        image: [..., the contract's bands].

    Returns:
        float32 [..., all bands of the row], 0 where the contract has none.
    """
    table, bands = SENSORS[name].bands, contract["sensors"][name]["bands"]
    full = np.zeros((*image.shape[:-1], len(table)), np.float32)
    full[..., [table.index(band) for band in bands]] = image
    return full
