"""A trained network from a folder, and `load`: a plain function from sensors with dates to features.

Four kinds of folder hold a network: a workdir (its newest checkpoint), one checkpoint, an exported folder, imported
weights. All give the same features for the same weights.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax.convert import exported
from skysense_jax.core import paths
from skysense_jax.core.trees import Tree
from skysense_jax.models import prepare, skysense, systems
from skysense_jax.models.description import Description, Reader
from skysense_jax.models.inputs import PLACE
from skysense_jax.run import folder as run_folder
from skysense_jax.run import imported

OWN_BANK, NO_BANK = "own", "none"
"""Prototype banks of :func:`open_network` beside those of other folders."""

DATASET = "dataset"
"""Kind of a folder that holds places and no network."""

READERS: dict[str, Reader] = {
    reader.kind: reader for reader in (imported.READER, exported.READER, run_folder.WORKDIR, run_folder.CHECKPOINT)
}
"""Kind of a folder with a network -> how it is opened; the first that recognises a folder reads it."""


class Network(NamedTuple):
    """A network with its weights.

    Attributes:
        description: what its folder says.
        encoder: parameters of its model (`models.systems`); of a SkySense run the teacher's, with the prototype bank of
            geo-context.
        features: (encoder, PlaceInput with batch axis) -> {"image", "pixel", "<sensor>_image", "<sensor>_pixel"}; to be
            jitted.
    """

    description: Description
    encoder: Tree
    features: Callable[[Tree, Mapping[str, Any]], dict[str, jax.Array]]


class Loaded(NamedTuple):
    """What :func:`load` returns.

    Attributes:
        features: see :func:`load`.
        contract: the input the network expects.
        config: the run's configuration, or the model's alone under "model" where no more is known.
    """

    features: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    contract: dict[str, Any]
    config: config_dict.ConfigDict


def identify(path: str | pathlib.Path) -> str:
    """Tells which kind of folder a path is: "dataset" or a key of READERS.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is none of the kinds.
    """
    folder = paths.path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{path}: no such folder")
    if (folder / "places.json").is_file():
        return DATASET
    for kind, reader in READERS.items():
        if reader.recognise(folder):
            return kind
    marks = ["a dataset has places.json", *(reader.mark for reader in READERS.values())]
    raise ValueError(f"{path} is none of the folders known here: {'; '.join(marks)}")


def load(path: str | pathlib.Path, bank: str = OWN_BANK) -> Loaded:
    """Loads a workdir, a checkpoint, an exported folder or imported weights.

    Args:
        path: the folder.
        bank: as :func:`open_network`.

    Returns:
        (features, contract, config). `features` takes {sensor: {"image" [T, H, W, C] or [B, T, H, W, C] in the
        contract's unit and band order, "dates" one per acquisition (ISO text, datetime.date or day of year counted from
        0), optional "valid" [(B,) T, H, W], "bands" names, "unit"}}, with any subset of the contract's sensors and any
        number of dates. It gives float32 arrays, without the batch axis where the input had none:

          "image" [B, E]                  mean of the fused map over the cells with a valid input
          "pixel" [B, h, w, E]            the fused map, one vector per base pixel
          "<sensor>_image" [B, D]         mean of one sensor's map over valid cells and dates
          "<sensor>_pixel" [B, h, w, D]   one sensor's map, mean over valid dates

        A network with geo-context also needs "place": {"lon", "lat"} (degrees, one number each or [B]; nan where it is
        not known): the last channels of the fused map are the context of the region, 0 where there is none. Every new
        combination of shapes is compiled once. `features` raises ValueError, naming sensor and rule, for input that
        does not fit the contract (`models.prepare`).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no network.
    """
    network = open_network(path, bank)
    forward = jax.jit(network.features)
    contract = network.description.contract

    def features(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        sensors = dict(inputs)
        place = sensors.pop(PLACE, None)
        arrays, batched = prepare.prepare(contract, sensors)
        if "geo" in network.encoder:
            if place is None:
                raise ValueError(
                    'this network uses geo-context: give "place": {"lon": degrees, "lat": degrees}, nan '
                    'where it is not known, or open it with bank="none"'
                )
            arrays[PLACE] = prepare.location(place, len(next(iter(arrays.values()))["image"]))
        out = {name: np.asarray(value) for name, value in forward(network.encoder, arrays).items()}
        return out if batched else {name: value[0] for name, value in out.items()}

    config = network.description.config
    return Loaded(
        features, contract, config_dict.ConfigDict({"model": network.description.model}) if config is None else config
    )


def read_description(path: str | pathlib.Path) -> Description:
    """What a folder says about its network; no weights are read.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no network, or a checkpoint that was altered (Damaged).
    """
    kind = identify(path)
    if kind == DATASET:
        raise ValueError(f"{path} is a dataset, not a network; give a workdir, a checkpoint or an exported folder")
    return READERS[kind].describe(paths.path(path))


def open_network(path: str | pathlib.Path, bank: str | pathlib.Path = OWN_BANK) -> Network:
    """A network with its weights.

    Args:
        path: its folder.
        bank: which prototype bank a network with geo-context asks: "own" (frozen, as its training left it), "none" (no
            geo-context: the features are the fusion's alone), or a folder with a network whose bank has the same width:
            the bank of that network. The description's model.geo_context.bank says "frozen" or "none", whatever it was
            in training.

    Returns:
        The network.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_description`.
    """
    if bank not in (OWN_BANK, NO_BANK):
        return _with_other_bank(open_network(path), bank)
    description = read_description(path)
    encoder = READERS[description.kind].weights(description)
    if has_bank(description):
        model = description.model.copy_and_resolve_references()
        model.geo_context.bank = "frozen"
        if bank == NO_BANK:
            model = skysense.without_bank(model, description.contract)
            encoder = {name: module for name, module in encoder.items() if name != "geo"}
        description = description._replace(model=model)
    return Network(description, encoder, features_of(description))


def has_bank(description: Description) -> bool:
    """Whether the network has geo-context, and so a prototype bank."""
    return systems.system_of(description.model).has_bank(description.model, description.contract)


def features_of(description: Description) -> systems.Features:
    """Network.features of a described network."""
    return systems.system_of(description.model).make_features(description.model, description.contract)


def _with_other_bank(network: Network, path: str | pathlib.Path) -> Network:
    """A network with the prototype bank of another network in the place of its own."""
    other, description = open_network(path), network.description
    for opened in (network, other):
        if "geo" not in opened.encoder:
            raise ValueError(f"{opened.description.path} has no prototype bank: its model has no geo-context")
    width, other_geo = description.model.geo_context.width, other.description.model.geo_context
    if width != other_geo.width:
        raise ValueError(f"the bank of {path} has prototypes of width {other_geo.width}, this network needs {width}")
    model = description.model.copy_and_resolve_references()
    model.geo_context = other_geo
    description = description._replace(model=model)
    encoder = skysense.with_bank(network.encoder, other.encoder["geo"]["bank"])
    return Network(description, encoder, features_of(description))


def untrained(description: Description) -> Tree:
    """Freshly drawn parameters of the same network, from the run's seed (0 where it is not known).

    Its prototype bank is empty.
    """
    seed = 0 if description.config is None else description.config.seed
    system = systems.system_of(description.model)
    return system.fresh(description.model, description.contract, jax.random.key(seed))


def bank_of(network: Network) -> dict[str, np.ndarray]:
    """The prototype bank of a network as numpy arrays.

    Raises:
        ValueError: it has none.
    """
    bank = network.encoder.get("geo", {}).get("bank")
    if bank is None:
        raise ValueError(f"{network.description.path} has no prototype bank: its model has no geo-context")
    return {name: np.asarray(leaf) for name, leaf in bank.items()}
