"""What a row of the table of sensors says: the fields, and the small records that some of them hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple


class Unit(NamedTuple):
    """How values of an accepted unit become the stored unit.

    The stored value is value * factor, or factor * log10(value) where `decibel` is set (<= 0 is invalid).
    """

    factor: float = 1.0
    decibel: bool = False


class Offset(NamedTuple):
    """The additive offset of a sensor's digital numbers: metadata or the catalog state it, or the raster is refused.

    usual: the offset that products carry, in digital numbers. tags: names of raster tags and of XML elements that give
    it. product_files: metadata files of a product. quantification: the divisor that metadata may state, another one is
    refused. hint_band: band whose smallest values show whether the offset is still in it. clearly_negative: digital
    numbers below this are rare: a twentieth of an image down there means a wrong offset. lowest: digital numbers
    without the offset at or below this are no measurement.
    """

    usual: float
    tags: tuple[str, ...]
    product_files: tuple[str, ...]
    quantification: float
    hint_band: str
    clearly_negative: float
    lowest: float

    @property
    def product(self) -> str:
        """The product files in one word, as "MTD_MSIL*.xml"; "" where there are none."""
        suffixes = {name.rpartition(".")[2] for name in self.product_files}
        return f"{os.path.commonprefix(self.product_files)}*.{min(suffixes)}" if suffixes else ""


class ClearMask(NamedTuple):
    """The customary mask of clear pixels. words: as `Sensor.words`. classes: its clear values. source: what it is."""

    words: frozenset[str]
    classes: str
    source: str


class Mistake(NamedTuple):
    """Values in another unit that a user may pass to a model: all lie in low..high, some `fractional` where it is set.

    advice: what to say after the range of the values.
    """

    low: float
    high: float
    fractional: bool
    advice: str


class Sensor(NamedTuple):
    """One row of the table.

    name: key of the sensor everywhere (records, configs, parameters). title: its name in messages.
    bands: canonical names in storage order. aliases: other spellings of a band -> canonical name (lower case).
    unit: unit of the stored values. units: unit that a catalog may declare -> its conversion to ``unit``.
    dtype: storage dtype. grid: "base" = one pixel per base pixel of the tile, "fine" = ratio x ratio pixels under each
    base pixel. dated: a time series, an acquisition without a date is refused. gsd: native pixel size in metres.
    plausible: (low, high) of stored valid values, used to refuse absurd input.
    mean, std: default statistics per band in stored units; source: where they come from.
    disturbance: its augmentation in `data/batches/radiometry.py`, "none" = left as measured.
    picture: its colours in `draw/places.py`. words: words of a file's or folder's name by which a draft recognises it.

    nodata: the instrument's customary nodata value, or None; it applies on top of the file's own nodata.
    floor: smaller valid values are raised to it. offset: rule of the additive offset, None = there is none.
    band_words: band descriptions by which a draft recognises it, also the last word of a one-band file's name.
    colour_bands: the bands that a file's red, green and blue stand for; () = colours say nothing about this sensor.
    mistakes: known wrong units of what a user passes to a model. clear: mask of clear pixels, None = it sees no clouds.
    unstored: bands a model may take that records do not hold -> (mean, std).
    pair: the sensor that msGFM reconstructs from this one where a place has both; "" = none.
    heights: values above an arbitrary datum, which models see above the median of each image (mean and std are of
    those). Heights are smooth, so that a raster may be much coarser than the grid, and are named after the product on
    which they lie.
    """

    name: str
    title: str
    bands: tuple[str, ...]
    aliases: Mapping[str, str]
    unit: str
    units: Mapping[str, Unit]
    dtype: str
    grid: str
    dated: bool
    gsd: float
    plausible: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    disturbance: str
    picture: str
    words: frozenset[str]
    nodata: float | None = None
    floor: float | None = None
    offset: Offset | None = None
    band_words: frozenset[str] = frozenset()
    colour_bands: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    clear: ClearMask | None = None
    unstored: Mapping[str, tuple[float, float]] = {}
    pair: str = ""
    heights: bool = False

    @property
    def units_accepted(self) -> tuple[str, ...]:
        """Units a catalog may declare for it."""
        return tuple(self.units)

    @property
    def eight_bit(self) -> bool:
        """Whether it is stored as 0..255, where 0 and 255 are also real values."""
        return self.dtype == "uint8"
