"""A dataset of places with four sensors, made of noise, at the size of configs/msgfm_tiny.py. Some places lack one. And
one of pictures, which come from nowhere.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from PIL import Image

from skysense_jax.configs import msgfm_tiny
from skysense_jax.data import records
from skysense_jax.data.drafting import layouts, rasters
from skysense_jax.data.ingest import build
from tests.helpers import noise_dataset

SENSORS = ("hr", "s2", "s1", "dsm")
PLACES = 20


def record(number: int) -> dict[str, Any]:
    """tiny.record with a surface model, whose height is the red of hr, at every place with an even number."""
    place = noise_dataset.record(number)
    count = 1 - number % 2
    place["dsm_image"] = place["hr_image"][:count, ..., :1].astype(np.float32)
    place["dsm_valid"], place["dsm_clear"] = place["hr_valid"][:count], place["hr_clear"][:count]
    place["dsm_measured"] = np.ones((count, 1), np.uint8)
    place["dsm_date"] = place["hr_date"][:count]
    return place


def write(folder: pathlib.Path, places: int = PLACES, first: int = 0, sensors: tuple[str, ...] = SENSORS) -> str:
    """Splits train and test of `places` places each, numbered from `first`; returns the folder as text."""
    features = records.record_features(sensors, noise_dataset.TILE, noise_dataset.RATIO, noise_dataset.CLASSES)

    def rows(begin: int) -> list[dict[str, Any]]:
        return [{name: value for name, value in record(begin + i).items() if name in features} for i in range(places)]

    meta = {
        "format": 1,
        "tile": noise_dataset.TILE,
        "ratio": noise_dataset.RATIO,
        "gsd": 10.0,
        "sensors": list(sensors),
        "label_classes": ["a", "b", "c"],
        "label_map_classes": {"0": "a", "1": "b", "2": "c"},
        "synthetic": True,
        "dataset_id": f"noise-{places}-{first}-{'-'.join(sensors)}",
    }
    return noise_dataset.write_records(folder, features, {"train": rows(first), "test": rows(first + 1000)}, meta)


def write_pictures(folder: pathlib.Path, count: int = PLACES) -> str:
    """A dataset of `count` unpaired PNG files without georeference, built as its user builds it; the folder as text."""
    side = noise_dataset.TILE * noise_dataset.RATIO
    (folder / "png").mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "png" / f"{number:02}.png")
    catalog = folder / "png" / "places.csv"
    catalog.write_text(rasters.to_csv(layouts.images(folder / "png", "hr").rows))
    options = build.Options(tile=noise_dataset.TILE, ratio=noise_dataset.RATIO, holdout=0.0, georeferenced=False)
    build.build(catalog, folder / "data", options, progress=False)
    return str(folder / "data")


def config(dataset: str) -> Any:
    """configs/msgfm_tiny.py on this dataset."""
    c = msgfm_tiny.get_config()
    c.data.dir = dataset
    return c
