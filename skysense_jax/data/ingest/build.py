"""Builds a dataset from a catalog: parallel over processes or machines, resumable, every part written once.

The catalog's places, sorted by name, are divided into fixed units of one split each. A unit becomes
DIR/parts/<split>-<number>.array_record plus a JSON sidecar. Both are written under a temporary name, synced and
renamed, the sidecar last: a unit with a sidecar is done, whatever happened to the process afterwards. At the end the
non-empty parts are renamed to TFDS shard names, TFDS's metadata are written, and places.json, written last, marks the
dataset as complete. `check` does the same without writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tqdm import tqdm

from skysense_jax.core.files import encode, move, write_atomically
from skysense_jax.data.ingest.catalog import Catalog, Row, read_catalog
from skysense_jax.data.ingest.on_processes import in_processes
from skysense_jax.data.ingest.places import Settings
from skysense_jax.data.ingest.raster import MAX_PIXELS
from skysense_jax.data.ingest.report import REFUSED, Report, merge, new_report, summary
from skysense_jax.data.ingest.shards import Unit, features_of
from skysense_jax.data.records import METADATA, SPLITS, Meta
from skysense_jax.sensors import SENSORS

FORMAT = 1
NAME = "places"
FILES = "files.jsonl"
PARTS = "parts"

RunUnits = Callable[[Sequence[Unit], Settings, Path, str], Iterator[tuple[Unit, dict[str, Any]]]]
"""(units, settings, DIR/parts, build key) -> every unit with the result of `run_unit`, in any order."""


class BuildError(ValueError):
    """The build cannot be done: wrong options, or a folder that holds something else."""


class Options(NamedTuple):
    """Options that decide what the records are (workers and progress do not).

    Attributes:
        tile: base pixels along a tile.
        gsd: metres of a base pixel.
        ratio: HR pixels along a base pixel.
        sensors: sensors of the dataset; () = all of the catalog.
        holdout: share of the places that go to the test split by a hash of their name, where the catalog does not say.
        shard_places: catalog places in a unit.
        max_pixels: largest number of pixels of one file.
        max_upsample: largest factor by which a file may be enlarged.
        georeferenced: False = images without a place on Earth (`plain_images`); gsd and max_upsample then mean nothing.
    """

    tile: int = 16
    gsd: float = 10.0
    ratio: int = 16
    sensors: tuple[str, ...] = ()
    holdout: float = 0.2
    shard_places: int = 8
    max_pixels: int = MAX_PIXELS
    max_upsample: float = 8.0
    georeferenced: bool = True


DEFAULTS = Options()


class _Build(NamedTuple):
    """One build. folder: DIR/parts. key: digest of `described`. described: {"build": catalog digest and options}."""

    out: Path
    folder: Path
    catalog: Catalog
    settings: Settings
    units: list[Unit]
    key: str
    described: dict[str, Any]


def split_of(place: str, rows: Sequence[Row], holdout: float) -> str:
    """The split of a place: the catalog's word, else a hash of the place's name (the same in every catalog).

    Args:
        place: name of the place.
        rows: its catalog rows, which all have the same `split`.
        holdout: share 0..1 of the places that go to the test split by the hash.

    Returns:
        "train" or "test".
    """
    if rows[0].split:
        return rows[0].split
    uniform = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") / 2**64
    return "test" if uniform < holdout else "train"


def plan(catalog: Catalog, options: Options) -> tuple[Settings, list[Unit]]:
    """The settings that every worker gets, and the fixed units of the build.

    Args:
        catalog: the validated catalog.
        options: the build's options.

    Returns:
        (settings, units), the units of the train split first.

    Raises:
        BuildError: an option is wrong, or the catalog has no usable image row.
    """
    unknown = [name for name in options.sensors if name not in catalog.sensors]
    if unknown:
        raise BuildError(
            f"--sensors {','.join(unknown)}: no such images in the catalog, which has {','.join(catalog.sensors)}"
        )
    sensors = tuple(name for name in SENSORS if name in (options.sensors or catalog.sensors))
    if not sensors:
        raise BuildError(
            f"{catalog.path}: no usable image row"
            + "".join(f"\n  row {entry['row']}: {entry['path']}: {entry['reason']}" for entry in catalog.refused[:10])
        )
    if (
        options.tile < 1
        or options.ratio < 1
        or options.gsd <= 0
        or options.shard_places < 1
        or not 0 <= options.holdout <= 1
    ):
        raise BuildError(f"tile, ratio, gsd and shard places must be positive and holdout within 0..1, got {options}")
    if not options.georeferenced and (options.gsd, options.max_upsample) != (DEFAULTS.gsd, DEFAULTS.max_upsample):
        raise BuildError("gsd and max upsample mean nothing where the size of a pixel on the ground is not known")
    settings = Settings(
        tile=options.tile,
        gsd=options.gsd,
        ratio=options.ratio,
        sensors=sensors,
        label_classes=catalog.label_classes,
        root=catalog.root,
        max_pixels=options.max_pixels,
        max_upsample=options.max_upsample,
        georeferenced=options.georeferenced,
    )
    by_split: dict[str, list[tuple[str, tuple[Row, ...]]]] = {split: [] for split in SPLITS}
    for place, rows in catalog.places.items():
        left_out = set(catalog.sensors) - set(sensors)
        rows = tuple(row for row in rows if row.sensor not in left_out)
        if rows:
            by_split[split_of(place, rows, options.holdout)].append((place, rows))
    step = options.shard_places
    units = [
        Unit(f"{split}-{start // step:05d}", split, tuple(places[start : start + step]))
        for split, places in by_split.items()
        for start in range(0, len(places), step)
    ]
    return settings, units


def _collect(done: Sequence[dict[str, Any]], catalog: Catalog, settings: Settings) -> dict[str, Any]:
    """One report of all units plus the rows that the catalog refused, files in row order. done: sidecars' contents."""
    total = new_report(settings.sensors)
    for sidecar in done:
        merge(total, sidecar["report"])
    total["files"] += [{**entry, "status": REFUSED} for entry in catalog.refused]
    total["files"].sort(key=lambda entry: entry["row"])
    lost = {entry["place"] for entry in catalog.refused} - set(catalog.places)
    total["places"] += len(lost)
    total["places_without_tiles"] = sorted({*total["places_without_tiles"], *lost})
    return total


def _progress(units: Sequence[Unit], finished: Sequence[dict[str, Any]], show: bool) -> tqdm:
    return tqdm(
        total=sum(len(unit.places) for unit in units),
        initial=sum(sidecar["places"] for sidecar in finished),
        unit="place",
        desc="ingest",
        disable=not show,
        mininterval=0.5,
    )


def check(catalog_path: str | Path, options: Options, workers: int = 1, progress: bool = True) -> dict[str, Any]:
    """Reads everything that a build would read and reports on it, writing nothing.

    Args:
        catalog_path: the catalog file.
        options: the build's options.
        workers: processes.
        progress: show a progress bar.

    Returns:
        The report (`report.summary`).

    Raises:
        CatalogError: the catalog cannot be used.
        BuildError: an option is wrong, or the catalog has no usable image row.
    """
    catalog = read_catalog(catalog_path)
    settings, units = plan(catalog, options)
    done: dict[str, dict[str, Any]] = {}
    with _progress(units, (), progress) as bar:
        for unit, result in in_processes(units, settings, None, "", workers):
            done[unit.name] = result
            bar.update(len(unit.places))
    return summary(_collect([done[unit.name] for unit in units], catalog, settings))


@contextlib.contextmanager
def _claimed(out: Path, key: str, described: dict[str, Any]) -> Iterator[Path]:
    """DIR/parts, created now or by an earlier run of the same build, and locked against a second process."""
    folder = out / PARTS
    others = [entry.name for entry in out.iterdir() if entry.name != PARTS] if out.is_dir() else []
    if others and not (folder / "build.json").is_file():
        raise BuildError(
            f"{out} is neither empty nor an unfinished build (it has {', '.join(sorted(others)[:5])}); choose "
            f"another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"another process is building {out}") from error
        stamp = folder / "build.json"
        if stamp.is_file():
            _check_same(json.loads(stamp.read_bytes()), key, described, out)
        else:
            write_atomically(stamp, encode({"build_key": key} | described))
        for leftover in folder.glob(".*.tmp-*"):
            leftover.unlink()
        yield folder


def _check_same(stored: dict[str, Any], key: str, described: dict[str, Any], out: Path) -> None:
    """Raises BuildError, naming the options that differ, where `stored` was written by another build."""
    if stored.get("build_key") != key:
        earlier = stored.get("build", {})
        different = [
            f"{name}: {earlier.get(name)!r} there, {value!r} now"
            for name, value in described["build"].items()
            if earlier.get(name) != value
        ]
        raise BuildError(
            f"{out} was built with another catalog or other options ({'; '.join(different)}); choose another --out"
        )


def build(
    catalog_path: str | Path,
    out: str | Path,
    options: Options = DEFAULTS,
    workers: int = 1,
    progress: bool = True,
    run_units: RunUnits | None = None,
) -> tuple[Meta, bool]:
    """Builds the dataset in `out`, or continues an unfinished build; a complete dataset is left as it is.

    Args:
        catalog_path: the catalog file.
        out: the dataset's folder.
        options: what the records are.
        workers: processes of this machine.
        progress: show a progress bar.
        run_units: what runs the units; None = `workers` processes of this machine.

    Returns:
        (content of places.json, whether anything was done).

    Raises:
        CatalogError: the catalog cannot be used.
        BuildError: an option is wrong, `out` holds something else, or no tile has a valid pixel.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is not a folder")
    catalog = read_catalog(catalog_path)
    settings, units = plan(catalog, options)
    chosen = json.loads(json.dumps(options._asdict()))
    if options.georeferenced:
        del chosen["georeferenced"]  # datasets from before there was a choice keep their key and id
    described = {"build": {"format": FORMAT, "catalog_sha256": catalog.sha256} | chosen}
    key = hashlib.sha256(encode(described)).hexdigest()
    if (out / METADATA).is_file():
        meta = json.loads((out / METADATA).read_bytes())
        _check_same(meta, key, described, out)
        if (out / PARTS).is_dir():
            shutil.rmtree(out / PARTS)  # the last step of a build that was stopped right there
        return meta, False
    with _claimed(out, key, described) as folder:
        done = {
            unit.name: json.loads((folder / f"{unit.name}.json").read_bytes())
            for unit in units
            if (folder / f"{unit.name}.json").is_file()
        }
        pending = [unit for unit in units if unit.name not in done]
        run_units = run_units or functools.partial(in_processes, workers=workers)
        with _progress(units, list(done.values()), progress) as bar:
            for unit, result in run_units(pending, settings, folder, key):
                done[unit.name] = result
                bar.update(len(unit.places))
        total = _collect([done[unit.name] for unit in units], catalog, settings)
        if not total["tiles"]:
            reasons = "".join(
                f"\n  row {entry['row']}: {entry['path']}: {entry['reason']}"
                for entry in total["files"]
                if entry["status"] == REFUSED
            )
            raise BuildError(
                f"no tile has a single valid pixel, nothing to write; {out}/{PARTS} can be deleted.{reasons[:4000]}"
            )
        meta = _finish(_Build(out, folder, catalog, settings, units, key, described), done, total)
    shutil.rmtree(folder)
    return meta, True


def _finish(work: _Build, done: dict[str, dict[str, Any]], total: Report) -> Meta:
    """Names the parts as TFDS shards and writes the metadata. Every step can be repeated after a crash.

    Args:
        work: the build.
        done: unit name -> content of its sidecar.
        total: the report of all units.

    Returns:
        The content of places.json.
    """
    out, folder, settings = work.out, work.folder, work.settings
    infos = []
    for split in SPLITS:
        full = [unit for unit in work.units if unit.split == split and done[unit.name]["length"]]
        for number, unit in enumerate(full):
            shard = out / f"{NAME}-{split}.array_record-{number:05d}-of-{len(full):05d}"
            part = folder / f"{unit.name}.array_record"
            if part.is_file():
                move(part, shard)
            elif not shard.is_file():
                raise BuildError(f"{part} is gone; delete {folder / (unit.name + '.json')} and build again")
        if full:
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[done[unit.name]["length"] for unit in full],
                    num_bytes=sum(done[unit.name]["bytes"] for unit in full),
                    filename_template=tfds.core.ShardedFileTemplate(
                        data_dir=str(out),
                        dataset_name=NAME,
                        split=split,
                        filetype_suffix="array_record",
                        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    ),
                )
            )
    # check_data would open every shard through TensorFlow; lengths come from the writers.
    tfds.folder_dataset.write_metadata(
        data_dir=str(out), features=features_of(settings), split_infos=infos, check_data=False
    )
    lines = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in total["files"])
    write_atomically(out / FILES, lines.encode())
    records = [done[unit.name]["sha256"] for unit in work.units]
    meta = {
        "format": FORMAT,
        "tile": settings.tile,
        "ratio": settings.ratio,
        "georeferenced": settings.georeferenced,
        "gsd": settings.gsd if settings.georeferenced else None,
        "sensors": list(settings.sensors),
        "label_classes": list(settings.label_classes),
        "label_map_classes": {str(number): name for number, name in work.catalog.label_map_classes.items()},
        "synthetic": any(entry.get("synthetic", False) for entry in total["files"]),
        "catalog_sha256": work.catalog.sha256,
        "splits": {info.name: info.num_examples for info in infos},
        "report": summary(total),
        "build_key": work.key,
        "dataset_id": hashlib.sha256(encode([work.described, records])).hexdigest(),
    } | work.described
    write_atomically(out / METADATA, encode(meta))
    return meta
