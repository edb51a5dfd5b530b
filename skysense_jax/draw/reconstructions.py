"""Pictures of what msGFM reconstructs: of one place, during training and afterwards."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict
from PIL import Image

from skysense_jax.core import paths, rngs
from skysense_jax.core.trees import Tree
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import acquisitions, views, whole_places
from skysense_jax.draw import panels
from skysense_jax.models import msgfm, msgfm_outputs
from skysense_jax.models.inputs import PlaceInput
from skysense_jax.sensors import Contract

FOLDER = "pictures"
"""Folder of a workdir that holds them, one per step."""

CANDIDATES = 16
"""Places of a split among which the one with most sensors is drawn during training."""


def place_inputs(contract: Contract, record: dataset_records.Record, meta: dataset_records.Meta) -> PlaceInput:
    """Takes the clearest acquisition of each sensor that the contract and the place have.

    Args:
        contract: the input contract.
        record: of the place.
        meta: the dataset's metadata.

    Returns:
        PlaceInput [1, 1, ...].

    Raises:
        ValueError: they share no sensor.
    """
    shared = {"sensors": {name: rule for name, rule in contract["sensors"].items() if name in meta["sensors"]}}
    plans = views.sensor_plans(shared, int(meta["ratio"]), dict.fromkeys(shared["sensors"], 1))
    inputs = whole_places.whole_place(record, plans, int(meta["tile"]))["sensors"]
    measured = {name: sensor for name, sensor in inputs.items() if sensor["valid"].any()}
    if not measured:
        raise ValueError(f"the place has none of the model's sensors {', '.join(contract['sensors'])}")
    return jax.tree.map(lambda leaf: leaf[None], measured)


def reconstructor(
    cfg: config_dict.ConfigDict, contract: Contract, seed: int, **options: Any
) -> Callable[[Tree, PlaceInput], dict[str, Tree]]:
    """Compiles `models.msgfm_outputs.reconstructions` for a configuration.

    Args:
        cfg: the whole configuration.
        contract: the input contract.
        seed: of the masks.
        **options: of jit.

    Returns:
        (encoder, inputs) -> the reconstructions.
    """
    model = msgfm.make_model(cfg.model, contract)

    def reconstruct(encoder: Tree, inputs: PlaceInput) -> dict[str, Tree]:
        return msgfm_outputs.reconstructions(cfg, contract, model, encoder, inputs, rngs.key(seed, "picture"))

    return jax.jit(reconstruct, **options)


def draw(
    contract: Contract,
    reconstructed: Mapping[str, Tree],
    record: dataset_records.Record,
    meta: dataset_records.Meta,
    note: str,
) -> Image.Image:
    """Draws the reconstructions of a place, under its name.

    Args:
        contract: the input contract.
        reconstructed: of :func:`reconstructor`.
        record: of the place.
        meta: the dataset's metadata.
        note: text after the name.

    Returns:
        The picture.
    """
    arrays = jax.tree.map(np.asarray, dict(reconstructed))
    title = f"{dataset_records.as_text(record['place'])}   {note}"
    return panels.draw(contract, arrays, title, bool(meta.get("synthetic")))


def write(image: Image.Image, path: pathlib.Path) -> None:
    """Writes a picture as a PNG; also to a gs:// path, which nothing can be streamed to.

    Args:
        image: the picture.
        path: of the file.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def in_training(
    cfg: config_dict.ConfigDict,
    contract: Contract,
    workdir: pathlib.Path,
    replicated: jax.sharding.Sharding,
    writes: bool,
) -> Callable[[Mapping[str, Tree], int], None]:
    """Makes what draws reconstructions during training.

    It draws the same place with the same masks at every step: of the first places of split "test" (of the training
    split where there is none) the one with most sensors. Every process computes, the one that `writes` draws.

    Args:
        cfg: the whole configuration.
        contract: the input contract.
        workdir: of the run.
        replicated: sharding of the result, replicated over the mesh.
        writes: whether this process writes the files.

    Returns:
        (params, step) -> None: every config.run.picture_every steps and after the last one writes
        WORKDIR/pictures/step-<step>.png; does nothing where the configuration has no such field.
    """
    interval = int(cfg.run.get("picture_every", 0))
    if not interval:
        return lambda params, step: None
    meta = dataset_records.read_metadata(cfg.data.dir)
    split = "test" if "test" in dataset_records.splits(cfg.data.dir) else cfg.data.split
    places = dataset_records.open_places(cfg.data.dir, split, int(cfg.data.max_bad_records))
    records = [places[number] for number in range(min(len(places), CANDIDATES))]
    shared = [name for name in contract["sensors"] if name in meta["sensors"]]
    record = max(records, key=lambda place: sum(len(acquisitions.usable(place, name)) > 0 for name in shared))
    inputs = place_inputs(contract, record, meta)
    compiled = reconstructor(cfg, contract, int(cfg.seed), out_shardings=replicated)
    folder = workdir / FOLDER
    paths.make_folder(folder)

    def draw_step(params: Mapping[str, Tree], step: int) -> None:
        if step % interval and step < cfg.steps:
            return
        reconstructed = compiled(params["encoder"], inputs)
        if writes:
            write(draw(contract, reconstructed, record, meta, f"step {step}"), folder / f"step-{step:06d}.png")

    return draw_step
