"""A trained network from a folder, and `load`: a plain function from sensors with dates to features, beside the input
contract.

Four kinds of folder hold a network: a workdir (its newest checkpoint), one checkpoint, an exported folder, imported
weights. All give the same features for the same weights.
"""

from __future__ import annotations

import functools
import inspect
import json
import pathlib
import runpy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax import prepare, train
from skysense_jax.convert import torch_export, torch_import
from skysense_jax.core import paths
from skysense_jax.data import spec
from skysense_jax.models import msgfm
from skysense_jax.models import skysense as models
from skysense_jax.models.inputs import PLACE
from skysense_jax.objectives import msgfm_views
from skysense_jax.objectives import skysense as objectives
from skysense_jax.run import checkpoint

MSGFM = "msgfm"
"""config.model.name of a network whose training has no teacher and whose parts are models.msgfm's."""

OWN_BANK, NO_BANK = "own", "none"
"""Prototype banks of :func:`open_network` beside those of other folders."""

MODEL_FILE, PARTS = "model.json", "parts"
"""Description and folder of modules of imported weights."""

KINDS = {
    "dataset": "a dataset has places.json",
    "export": f"an exported folder has config.json and {torch_export.WEIGHTS} or {torch_export.INDEX}",
    "workdir": "a workdir has checkpoints/",
    "checkpoint": "a checkpoint is WORKDIR/checkpoints/STEP",
    "imported": f"imported weights have {MODEL_FILE} and {PARTS}/",
}


DESCRIBED = {"export": "config.json", "imported": MODEL_FILE}
"""Kinds whose description is a JSON file with architecture, input_contract, provenance."""


class Description(NamedTuple):
    """A network without its weights. kind: key of KINDS. config: the run's whole configuration, None where only the
    model's is known (an export of weights trained elsewhere). model: config.model. contract: the input contract. step:
    of the checkpoint, None in an export that does not say. provenance: facts to print, in order."""

    kind: str
    path: pathlib.Path
    config: config_dict.ConfigDict | None
    model: config_dict.ConfigDict
    contract: dict[str, Any]
    step: int | None
    provenance: dict[str, Any]


class Network(NamedTuple):
    """A network with its weights. encoder: parameters of its model (models.skysense, models.msgfm); of a SkySense run
    the teacher's, with the prototype bank of geo-context. features: (encoder, PlaceInput with batch axis) -> {"image",
    "pixel", "<sensor>_image", "<sensor>_pixel"}; jit it."""

    description: Description
    encoder: Any
    features: Callable[[Any, Mapping[str, Any]], dict[str, jax.Array]]


class Loaded(NamedTuple):
    """What :func:`load` returns. features: see there. contract: the input the network expects. config: the run's
    configuration, or the model's alone under "model" where no more is known."""

    features: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    contract: dict[str, Any]
    config: config_dict.ConfigDict


def identify(path: str | pathlib.Path) -> str:
    """Which kind of folder `path` is, a key of KINDS. Raises FileNotFoundError, or ValueError for a folder that is
    none of them."""
    folder = paths.path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{path}: no such folder")
    if (folder / "places.json").is_file():
        return "dataset"
    if (folder / MODEL_FILE).is_file():
        return "imported"
    if (folder / "config.json").is_file() and torch_export.weight_files(folder):
        return "export"
    if (folder / "checkpoints").is_dir():
        return "workdir"
    if folder.is_dir() and (full := paths.absolute(folder)).parent.name == "checkpoints" and full.name.isdigit():
        return "checkpoint"
    raise ValueError(f"{path} is none of the folders known here: {'; '.join(KINDS.values())}")


def read_config(path: str | pathlib.Path) -> config_dict.ConfigDict:
    """The configuration of a file, as the commands with configuration flags read it.

    Args:
        path: FILE.py, or FILE.py:ARGUMENT to call its `get_config(ARGUMENT)`.

    Returns:
        What `get_config` returns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no configuration, takes no argument, or refuses this one.
    """
    file, *argument = str(path).split(":", 1)
    if not pathlib.Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such configuration file")
    if pathlib.Path(file).suffix != ".py":
        raise ValueError(f"{file}: a configuration is a Python file with get_config()")
    names = runpy.run_path(file)
    if "get_config" not in names:
        raise ValueError(f"{file}: has no get_config()")
    if argument and not inspect.signature(names["get_config"]).parameters:
        raise ValueError(f"{file}: get_config() takes no argument; leave out :{argument[0]}")
    try:
        return names["get_config"](*argument)
    except ValueError as error:  # a refusal of ours, so that a command says it without a traceback
        raise ValueError(f"{path}: {error}") from error


def load(path: str | pathlib.Path, bank: str = OWN_BANK) -> Loaded:
    """Loads a workdir, a checkpoint or an exported folder: (features, contract, config).

    features({sensor: {"image" [T, H, W, C] or [B, T, H, W, C] in the contract's unit and band order, "dates" one per
    acquisition (ISO text, datetime.date or day of year counted from 0), optional "valid" [(B,) T, H, W], "bands"
    names, "unit"}}) with any subset of the contract's sensors and any number of dates returns float32 arrays, without
    the batch axis where the input had none:
      "image" [B, E]             mean of the fused map over the cells with a valid input
      "pixel" [B, h, w, E]       the fused map, one vector per base pixel
      "<sensor>_image" [B, D]    mean of one sensor's map over valid cells and dates
      "<sensor>_pixel" [B, h, w, D]   one sensor's map, mean over valid dates
    A network with geo-context also needs "place": {"lon", "lat"} (degrees, one each or [B]; nan where it is not known):
    the last channels of the fused map are the context of the region, 0 where there is none. bank: as
    :func:`open_network`. Every new combination of shapes is compiled once. Raises ValueError for a folder that holds no
    network, and, naming sensor and rule, for input that does not fit the contract (`skysense_jax.prepare`).
    """
    network = open_network(path, bank)
    forward = jax.jit(network.features)
    contract = network.description.contract

    def features(given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        given = dict(given)
        place = given.pop(PLACE, None)
        inputs, batched = prepare.prepare(contract, given)
        if "geo" in network.encoder:
            if place is None:
                raise ValueError(
                    'this network uses geo-context: give "place": {"lon": degrees, "lat": degrees}, nan '
                    'where it is not known, or open it with bank="none"'
                )
            inputs[PLACE] = prepare.location(place, len(next(iter(inputs.values()))["image"]))
        out = {name: np.asarray(value) for name, value in forward(network.encoder, inputs).items()}
        return out if batched else {name: value[0] for name, value in out.items()}

    config = network.description.config
    return Loaded(
        features, contract, config_dict.ConfigDict({"model": network.description.model}) if config is None else config
    )


def read_description(path: str | pathlib.Path) -> Description:
    """What a folder with a network says about it; no weights are read.

    Raises FileNotFoundError, ValueError for a folder without a network, Damaged (a ValueError) for an altered
    checkpoint.
    """
    kind, folder = identify(path), paths.path(path)
    if kind == "dataset":
        raise ValueError(f"{path} is a dataset, not a network; give a workdir, a checkpoint or an exported folder")
    if kind in DESCRIBED:
        if paths.is_remote(folder):
            raise ValueError(f"{path}: exported and imported weights are read from a disk; copy the folder here first")
        meta = json.loads((folder / DESCRIBED[kind]).read_text())
        if "architecture" not in meta or "input_contract" not in meta:
            raise ValueError(
                f"{path}/{DESCRIBED[kind]} has no architecture and input_contract; it was not written by export-torch "
                "or import-torch"
            )
        provenance = dict(meta.get("provenance", {}))
        config = provenance.pop("config", None)
        return Description(
            kind,
            folder,
            None if config is None else _config(config),
            _config(meta["architecture"]),
            meta["input_contract"],
            provenance.get("step"),
            provenance,
        )
    meta = checkpoint.load_meta(folder)
    config = _config(meta["config"])
    provenance = {
        "step": meta["step"],
        "of steps": config.steps,
        "dataset id": meta["dataset_id"],
        "code": meta["code"],
        "seconds": meta.get("seconds"),
        "seed": config.seed,
    }
    return Description(kind, folder, config, config.model, meta["contract"], meta["step"], provenance)


def open_network(path: str | pathlib.Path, bank: str | pathlib.Path = OWN_BANK) -> Network:
    """A network with its weights. Errors as :func:`read_description`.

    bank: which prototype bank a network with geo-context asks: "own" (frozen, as its training left it), "none" (no
    geo-context: the features are the fusion's alone), or a folder with a network whose bank has the same width: that
    one. The description's model.geo_context.bank says "frozen" or "none", whatever it was in training.
    """
    if bank not in (OWN_BANK, NO_BANK):
        return _with_other_bank(open_network(path), bank)
    found = read_description(path)
    if found.kind == "export":
        encoder = torch_import.load_folder(found.path)[0]
    elif found.kind == "imported":
        encoder = {}
        for name in found.provenance["parts"]:
            encoder |= checkpoint.load_part(found.path / PARTS, name)
    else:
        # the step that was described and no other: a damaged one is an error here, not a silent step back
        trained = "params" if found.model.name == MSGFM else "teacher"
        encoder = checkpoint.load_tree(found.path, trained, found.step)["encoder"]
        if has_geo(found):
            encoder = models.with_bank(encoder, checkpoint.load_tree(found.path, "memory", found.step)["bank"])
    if has_geo(found):
        model = found.model.copy_and_resolve_references()
        model.geo_context.bank = "frozen"
        if bank == NO_BANK:
            model = models.without_bank(model, found.contract)
            encoder = {name: part for name, part in encoder.items() if name != "geo"}
        found = found._replace(model=model)
    return Network(found, encoder, features_of(found))


def has_geo(found: Description) -> bool:
    """Whether the network has geo-context, and so a prototype bank."""
    return found.model.name != MSGFM and "geo" in models.module_names(found.model, found.contract)


def features_of(found: Description) -> Callable[[Any, Mapping[str, Any]], dict[str, jax.Array]]:
    """Network.features of a described network."""
    if found.model.name == MSGFM:
        model = msgfm.make_model(found.model, found.contract)
        return functools.partial(msgfm_views.encoder_features, found.model, found.contract, model)
    return functools.partial(objectives.encoder_features, models.make_model(found.model, found.contract))


def _config(values: Mapping[str, Any]) -> config_dict.ConfigDict:
    """A configuration read from JSON, where tuples became lists."""
    return config_dict.ConfigDict(torch_import.tuples(dict(values)))


def _with_other_bank(network: Network, path: str | pathlib.Path) -> Network:
    other, found = open_network(path), network.description
    for one in (network, other):
        if "geo" not in one.encoder:
            raise ValueError(f"{one.description.path} has no prototype bank: its model has no geo-context")
    ours, theirs = found.model.geo_context, other.description.model.geo_context
    if ours.width != theirs.width:
        raise ValueError(f"the bank of {path} has prototypes of width {theirs.width}, this network needs {ours.width}")
    model = found.model.copy_and_resolve_references()
    model.geo_context = theirs
    found = found._replace(model=model)
    return Network(found, models.with_bank(network.encoder, other.encoder["geo"]["bank"]), features_of(found))


def untrained(found: Description) -> Any:
    """Freshly drawn encoder parameters of the same network, from the run's seed (0 where it is not known); its
    prototype bank is empty."""
    model = (msgfm if found.model.name == MSGFM else models).make_model(found.model, found.contract)
    params = jax.jit(model.init)(jax.random.key(found.config.seed if found.config is not None else 0))
    if not has_geo(found):
        return params
    return models.with_bank(params, models.empty_bank(found.model, jax.random.key(0)))


def abstract(config: Any, contract: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of everything a run of `config` learns: {"params", "teacher", "memory"}; nothing is allocated."""
    objective = train.OBJECTIVES[config.model.name](config, contract)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        spec.batch_spec(config, contract),
        is_leaf=lambda node: isinstance(node, spec.Leaf),
    )
    params, teacher, memory = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch))
    return {"params": params, "teacher": teacher, "memory": memory}
