"""Pictures of what msGFM reconstructs: of one place, during training and afterwards."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from skysense_jax.core import paths, rngs
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import views
from skysense_jax.draw import panels
from skysense_jax.models import msgfm, msgfm_outputs

FOLDER = "pictures"
"""Folder of a workdir that holds them, one per step."""

CANDIDATES = 16
"""Places of a split among which the one with most sensors is drawn during training."""


def place_inputs(contract: Mapping[str, Any], record: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """PlaceInput [1, 1, ...] of the clearest acquisition of each sensor that the contract and the place have.
    ValueError where they share none.
    """
    held = {"sensors": {name: rule for name, rule in contract["sensors"].items() if name in meta["sensors"]}}
    plans = views.sensor_plans(held, int(meta["ratio"]), dict.fromkeys(held["sensors"], 1))
    inputs = views.whole_place(record, plans, int(meta["tile"]))["sensors"]
    found = {name: one for name, one in inputs.items() if one["valid"].any()}
    if not found:
        raise ValueError(f"the place has none of the model's sensors {', '.join(contract['sensors'])}")
    return jax.tree.map(lambda leaf: leaf[None], found)


def reconstructor(cfg: Any, contract: Mapping[str, Any], seed: int, **options: Any) -> Callable[..., dict[str, Any]]:
    """The compiled objectives.msgfm_views.reconstructions of a configuration: (encoder, inputs). seed: of the masks;
    options: of jit.
    """
    model = msgfm.make_model(cfg.model, contract)

    def run(encoder: Any, inputs: Any) -> dict[str, Any]:
        return msgfm_outputs.reconstructions(cfg, contract, model, encoder, inputs, rngs.key(seed, "picture"))

    return jax.jit(run, **options)


def picture(
    contract: Mapping[str, Any], found: Mapping[str, Any], record: Mapping[str, Any], meta: Mapping[str, Any], what: str
) -> Image.Image:
    """The grid of reconstructions `found` of a place, under its name and `what`."""
    found = jax.tree.map(np.asarray, dict(found))
    title = f"{dataset_records.as_text(record['place'])}   {what}"
    return panels.draw(contract, found, title, bool(meta.get("synthetic")))


def write(image: Image.Image, path: pathlib.Path) -> None:
    """The picture as a PNG; also of a gs:// path, which nothing can be streamed to."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def in_training(
    cfg: Any, contract: Mapping[str, Any], workdir: pathlib.Path, whole: Any, writes: bool
) -> Callable[[Any, int], None]:
    """draw(params, step): every config.run.picture_every steps and after the last one writes
    WORKDIR/pictures/step-<step>.png, of the same place and masks at every step: of the first places of split "test" (of
    the training split where there is none) the one with most sensors. Nothing where the configuration has no such
    field.

    Every process computes, the one that `writes` draws. whole: sharding of the result, replicated over the mesh.
    """
    every = int(cfg.run.get("picture_every", 0))
    if not every:
        return lambda params, step: None
    meta = dataset_records.read_metadata(cfg.data.dir)
    split = "test" if "test" in dataset_records.splits(cfg.data.dir) else cfg.data.split
    places = dataset_records.open_places(cfg.data.dir, split, int(cfg.data.max_bad_records))
    records = [places[number] for number in range(min(len(places), CANDIDATES))]
    shared = [name for name in contract["sensors"] if name in meta["sensors"]]
    record = max(records, key=lambda one: sum(len(views.usable(one, name)) > 0 for name in shared))
    inputs = place_inputs(contract, record, meta)
    compiled = reconstructor(cfg, contract, int(cfg.seed), out_shardings=whole)
    folder = workdir / FOLDER
    paths.make_folder(folder)

    def draw(params: Any, step: int) -> None:
        if step % every and step < cfg.steps:
            return
        found = compiled(params["encoder"], inputs)
        if writes:
            write(picture(contract, found, record, meta, f"step {step}"), folder / f"step-{step:06d}.png")

    return draw
