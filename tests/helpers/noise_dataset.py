"""A dataset of places made of noise, at the size of configs/skysense_tiny.py: real records, seconds to write."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from skysense_jax import sensors
from skysense_jax.data import records
from skysense_jax.data import records as dataset_records

TILE, RATIO, CLASSES = 8, 4, 3
DATES = {"hr": 1, "s2": 3, "s1": 2}


def record(number: int) -> dict:
    """One place: smooth noise per sensor; every fifth place lacks s1."""
    rng = np.random.default_rng(number)
    place = {
        "place": f"place-{number}",
        "crs": "EPSG:32631",
        "lon": 3.0 + number,
        "lat": 48.0,
        "footprint": np.zeros(4),
        "label": np.eye(CLASSES, dtype=np.uint8)[number % CLASSES],
        "label_map": np.full((TILE, TILE), number % CLASSES, np.uint8),
    }
    for name, count in DATES.items():
        row = sensors.SENSORS[name]
        count = 0 if (name, number % 5) == ("s1", 3) else count
        side = TILE * sensors.pixels_per_base(row, RATIO)
        image = np.array(row.mean) + np.array(row.std) * rng.normal(size=(count, side, side, len(row.bands)))
        low, high = max(row.plausible[0], 1.0) if row.dtype != "float32" else row.plausible[0], row.plausible[1]
        place[f"{name}_image"] = np.clip(image, low, high).astype(row.dtype)
        place[f"{name}_valid"] = np.ones(image.shape[:3], np.uint8)
        place[f"{name}_clear"] = np.ones(image.shape[:3], np.uint8)
        place[f"{name}_measured"] = np.ones((count, len(row.bands)), np.uint8)
        days = np.sort(rng.choice(365, count, replace=False)).astype(np.int32) + 18262
        place[f"{name}_date"] = days if row.dated else np.full(count, sensors.NO_DATE, np.int32)
    return place


def write_records(
    folder: pathlib.Path, features: tfds.features.FeaturesDict, splits: dict[str, list], meta: dict
) -> str:
    """A TFDS dataset of one shard per split, with its places.json; returns the folder as text."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for split, places in splits.items():
        writer = ArrayRecordWriter(str(folder / f"places-{split}.array_record-00000-of-00001"), "group_size:1")
        for one in places:
            writer.write(features.serialize_example(one))
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder,
            dataset_name="places",
            split=split,
            filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        )
        lengths = [len(places)]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=0, filename_template=template))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
    (folder / dataset_records.METADATA).write_text(json.dumps(meta))
    return str(folder)


def write_dataset(folder: pathlib.Path, places: int = 10) -> str:
    """Splits train (`places`) and test (half as many); returns the folder as text."""
    features = records.record_features(tuple(DATES), TILE, RATIO, CLASSES)
    splits = {"train": [record(i) for i in range(places)], "test": [record(100 + i) for i in range(places // 2)]}
    meta = {
        "format": 1,
        "tile": TILE,
        "ratio": RATIO,
        "gsd": 10.0,
        "sensors": list(DATES),
        "label_classes": ["a", "b", "c"],
        "label_map_classes": {},
        "synthetic": True,
        "dataset_id": f"noise-{places}",
    }
    return write_records(folder, features, splits, meta)
