"""The places of the msGFM experiment (`experiments.msgfm_variants`): paired ones, and images that come one by one."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds

from skysense_jax.data import records
from skysense_jax.sensors import SENSORS, on_fine_grid
from tests.helpers import noise_dataset

NAMES = ("hr", "s2", "s1", "dsm")


RATIO, PAIRED, UNPAIRED = 4, 240, 480
"""Of the experiment's datasets: HR pixels along a base pixel; training places with all sensors; further places whose
images come one by one."""


KEPT = ("format", "tile", "gsd", "label_classes", "label_map_classes", "synthetic", "statistics")
"""What is said about the dataset's places and stays true of these."""


def split_places(data: pathlib.Path, folder: pathlib.Path) -> None:
    """FOLDER/paired: the first PAIRED training places that have every sensor, and such test places. FOLDER/unpaired: of
    each sensor the images of the next UNPAIRED / 4 training places, which lose their other sensors.

    HR and surface model are averaged to RATIO pixels along a base pixel (only crops of 32 pixels are cut from them).
    """
    meta, builder = records.read_metadata(data), tfds.builder_from_directory(str(data))
    tile, step = int(meta["tile"]), int(meta["ratio"]) // RATIO
    features = records.record_features(NAMES, tile, RATIO, len(meta["label_classes"]))

    def coarser(record: Mapping[str, Any]) -> dict[str, Any]:
        record = dict(record)
        for name in (name for name in NAMES if on_fine_grid(SENSORS[name])):
            for part in ("image", "valid", "clear"):
                was = record[f"{name}_{part}"]
                blocks = was.reshape(len(was), tile * RATIO, step, tile * RATIO, step, *was.shape[3:])
                record[f"{name}_{part}"] = blocks.mean((2, 4)).astype(was.dtype)  # "valid": 1 where all of them are
        return record

    def alone(record: Mapping[str, Any], name: str) -> dict[str, Any]:
        others = tuple(f"{one}_" for one in NAMES if one != name)
        return {key: value[:0] if key.startswith(others) else value for key, value in record.items()}

    def whole(record: Mapping[str, Any]) -> bool:
        return all(record[f"{name}_valid"].any() for name in NAMES)

    train = builder.as_data_source(split="train")
    paired, unpaired = [], []
    for record in (train[number] for number in range(len(train))):
        if len(paired) < PAIRED:
            if whole(record):
                paired.append(coarser(record))
        elif record[f"{(name := NAMES[len(unpaired) % len(NAMES)])}_valid"].any():
            unpaired.append(coarser(alone(record, name)))
        if len(unpaired) == UNPAIRED:
            break
    else:
        raise ValueError(
            f"{data} has too few training places: {len(paired)} of {PAIRED} with every sensor, "
            f"{len(unpaired)} of {UNPAIRED} others"
        )
    test = [coarser(record) for record in builder.as_data_source(split="test") if whole(record)]
    for name, splits in (("unpaired", {"train": unpaired}), ("paired", {"train": paired, "test": test})):
        described = {key: meta[key] for key in KEPT if key in meta}
        described |= {"ratio": RATIO, "sensors": list(NAMES), "dataset_id": f"{meta['dataset_id'][:12]}-{name}"}
        noise_dataset.write_records(folder / name, features, splits, described)
