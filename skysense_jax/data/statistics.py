"""Per-band mean and standard deviation of a built dataset's train split, over valid pixels only, in stored units."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from skysense_jax.core.files import write_atomically
from skysense_jax.data.ingest.build import NAME, BuildError
from skysense_jax.data.records import METADATA, record_features
from skysense_jax.sensors import DATUM, SENSORS


class Moments:
    """Running count, mean and sum of squared deviations per band in float64.

    The update is the pairwise rule of Chan, Golub & LeVeque, which has no cancellation.

    Attributes:
        n, mean, squares: float64 [bands] count, mean and sum of squared deviations.
    """

    def __init__(self, bands: int):
        self.n, self.mean, self.squares = (np.zeros(bands) for _ in range(3))

    def add(self, band: int, values: np.ndarray) -> None:
        """Adds values of one band.

        Args:
            band: index of the band.
            values: numbers of any dtype and shape; an empty array changes nothing.
        """
        if not values.size:
            return
        values = values.astype(np.float64)
        mean, total = values.mean(), self.n[band] + values.size
        apart = mean - self.mean[band]
        self.squares[band] += ((values - mean) ** 2).sum() + apart**2 * self.n[band] * values.size / total
        self.mean[band] += apart * values.size / total
        self.n[band] = total

    def std(self) -> np.ndarray:
        """Standard deviation float64 [bands]; 0 for a band without values."""
        return np.sqrt(self.squares / np.maximum(self.n, 1))


def _train_records(folder: Path, meta: dict[str, Any]) -> Iterator[bytes]:
    shards = sorted(folder.glob(f"{NAME}-train.array_record-*"))
    count = 0
    for shard in shards:
        reader = ArrayRecordReader(str(shard))
        try:
            for index in range(reader.num_records()):
                count += 1
                yield reader.read([index])[0]
        finally:
            reader.close()
    expected = meta["splits"].get("train", 0)
    if count != expected:
        raise BuildError(f"{folder} has {count} train records in {len(shards)} shards, {METADATA} says {expected}")


def compute(folder: str | Path, clear_only: bool = False, progress: bool = True) -> dict[str, dict[str, Any]]:
    """Computes the statistics of a dataset and stores them in places.json under "statistics".

    A pixel counts where x_valid is 1 and the band was measured at that date.

    Args:
        folder: the dataset's folder.
        clear_only: count a pixel only where x_clear is 1, too.
        progress: show a progress bar.

    Returns:
        sensor -> {"mean", "std", "n": per band of the sensor's table row, "unit", "date", "sha256" of the records
        read, "source", "unmeasured": bands without a pixel, which keep the table's values, and "datum": of heights}.

    Raises:
        BuildError: `folder` is no complete dataset or has no train split.
    """
    folder = Path(folder)
    if not (folder / METADATA).is_file():
        raise BuildError(f"{folder} is not a complete dataset: no {METADATA} (build it with `skysense-jax data build`)")
    meta = json.loads((folder / METADATA).read_bytes())
    if not meta["splits"].get("train"):
        raise BuildError(f"{folder} has no train split: statistics come from training places only")
    features = record_features(meta["sensors"], meta["tile"], meta["ratio"], len(meta["label_classes"]))
    moments = {name: Moments(len(SENSORS[name].bands)) for name in meta["sensors"]}
    digest = hashlib.sha256()
    for data in tqdm(
        _train_records(folder, meta),
        total=meta["splits"]["train"],
        unit="place",
        desc="statistics",
        disable=not progress,
    ):
        digest.update(len(data).to_bytes(8, "little") + data)
        _add(features.deserialize_example_np(data), moments, clear_only)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    stamp = {"date": today, "sha256": digest.hexdigest()}
    statistics = {name: {**_entry(name, of_sensor, meta, clear_only), **stamp} for name, of_sensor in moments.items()}
    write_atomically(
        folder / METADATA, (json.dumps(meta | {"statistics": statistics}, indent=1, sort_keys=True) + "\n").encode()
    )
    return statistics


def _add(record: dict[str, np.ndarray], moments: dict[str, Moments], clear_only: bool) -> None:
    for name, of_sensor in moments.items():
        use = record[f"{name}_valid"].astype(bool)
        if clear_only:
            use &= record[f"{name}_clear"].astype(bool)
        for image, pixels, measured in zip(record[f"{name}_image"], use, record[f"{name}_measured"], strict=True):
            for band in np.flatnonzero(measured).tolist():
                values = image[..., band][pixels]
                if SENSORS[name].heights and values.size:
                    values = values - np.percentile(values, 50, method="lower")  # as the model sees them
                of_sensor.add(band, values)


def _entry(name: str, moments: Moments, meta: dict[str, Any], clear_only: bool) -> dict[str, Any]:
    row, std = SENSORS[name], moments.std()
    usable = (moments.n > 1) & (std > 0)  # a band that never varies cannot be normalised by its own deviation
    pixels = "valid and clear" if clear_only else "valid"
    synthetic = "SYNTHETIC data, " if meta["synthetic"] else ""
    return {
        "mean": np.where(usable, moments.mean, row.mean).tolist(),
        "std": np.where(usable, std, row.std).tolist(),
        "n": [int(count) for count in moments.n],
        "unit": row.unit,
        **({"datum": DATUM} if row.heights else {}),
        "unmeasured": [band for band, good in zip(row.bands, usable, strict=True) if not good],
        "source": f"{synthetic}{pixels} pixels of the train split of dataset {meta['dataset_id'][:12]}; "
        f"bands without data: {row.source}",
    }


def render(statistics: dict[str, dict[str, Any]]) -> str:
    """The statistics as a table."""
    lines = []
    for name, entry in statistics.items():
        lines.append(f"{name} ({entry['unit']})")
        columns = zip(SENSORS[name].bands, entry["mean"], entry["std"], entry["n"], strict=True)
        for band, mean, std, count in columns:
            note = "   (no data: the table's values)" if band in entry["unmeasured"] else ""
            lines.append(f"  {band:7s} mean {mean:12.4f}   std {std:12.4f}   n {count:,}{note}")
    return "\n".join(lines)
