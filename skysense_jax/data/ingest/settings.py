"""What a build is asked for, as every function of the ingest gets it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from skysense_jax.sensors import SENSORS, pixels_per_base


class Settings(NamedTuple):
    """What a build is asked for.

    tile: base pixels along a tile. gsd: metres of a base pixel. ratio: fine pixels along a base pixel. sensors: those
    of the dataset. label_classes: order of the multi-hot label. root: the catalog's folder. max_pixels, max_upsample:
    limits of one file. georeferenced: False = the images have no place on Earth and are cut by their pixels.
    """

    tile: int
    gsd: float
    ratio: int
    sensors: tuple[str, ...]
    label_classes: tuple[str, ...]
    root: Path
    max_pixels: int
    max_upsample: float
    georeferenced: bool = True

    def side(self, sensor: str) -> int:
        """Pixels of the sensor along a tile."""
        return self.tile * pixels_per_base(SENSORS[sensor], self.ratio)

    def step(self, sensor: str) -> float:
        """Metres of a pixel of the sensor."""
        return self.gsd / pixels_per_base(SENSORS[sensor], self.ratio)
