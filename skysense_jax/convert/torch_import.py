"""PyTorch tensors in: they come under the official names and fill the parameter tree; strict throughout."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import config_dict

from skysense_jax.convert import keymap, layouts, torch_export
from skysense_jax.convert.swin import files as swin_files
from skysense_jax.convert.tensor_files import Tensors, joined, open_tensors
from skysense_jax.core import config, trees
from skysense_jax.models import msgfm, systems
from skysense_jax.models.skysense import param_shapes
from skysense_jax.sensors import Contract


class Imported(NamedTuple):
    """Imported parameters, with an account of them.

    Attributes:
        params: the parameter tree.
        filled: torch keys that the state lacked and a default replaced.
        ignored: keys left out on purpose.
    """

    params: dict[str, Any]
    filled: list[str]
    ignored: list[str]


def fill(state: Mapping[str, np.ndarray], entries: Sequence[keymap.Entry], shapes: trees.Tree) -> Imported:
    """Fills a tree from torch tensors, by the entries of a module.

    Every tensor must be expected and every expected one present with the right shape; only recomputed buffers
    (keymap.BUFFERS) may come beside them. float16, bfloat16 and float64 become float32; a table of integers (int32,
    int64) stays one.

    Args:
        state: torch key -> array.
        entries: of the module, one per tensor.
        shapes: the tree to fill, arrays or ShapeDtypeStructs.

    Returns:
        The tree, and the account of it.

    Raises:
        ValueError: names every missing, unexpected and wrongly shaped tensor at once.
    """
    leaves = trees.flatten(shapes)
    stray = set(leaves) ^ {e.name for e in entries}
    if stray:
        raise ValueError(f"the key table and the model disagree about {sorted(stray)}")
    known = {e.torch for e in entries}
    ignored = [k for k in state if k not in known and k.split(".")[-1] in keymap.BUFFERS]
    problems = [f"unexpected: {k} {tuple(state[k].shape)}" for k in state if k not in known and k not in ignored]
    arrays: dict[str, np.ndarray] = {}
    filled = []
    for entry in entries:
        leaf = leaves[entry.name]
        shape = keymap.torch_shape(entry, leaf.shape)
        if entry.torch not in state:
            if entry.default is None:
                problems.append(f"missing: {entry.torch} {shape}")
                continue
            filled.append(entry.torch)
            value = np.full(shape, entry.default, np.float32)
        else:
            value = state[entry.torch]
        if tuple(value.shape) != shape:
            problems.append(f"wrong shape: {entry.torch} is {tuple(value.shape)}, the model needs {shape}")
            continue
        is_integer = np.issubdtype(leaf.dtype, np.integer)
        if (value.dtype.kind in "iub?") != is_integer or value.dtype.kind in "ub?":
            needed = "an int" if is_integer else "a float"
            problems.append(f"wrong type: {entry.torch} is {value.dtype}, {needed} is needed")
            continue
        if entry.name not in arrays:
            arrays[entry.name] = np.empty(leaf.shape, np.int32 if is_integer else np.float32)
        arrays[entry.name][... if entry.index is None else entry.index] = keymap.TRANSFORMS[entry.kind][0](value)
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit the model:\n  " + "\n  ".join(problems))
    return Imported(trees.nest(arrays), filled, ignored)


def import_state(state: Mapping[str, np.ndarray], cfg: config_dict.ConfigDict, contract: Contract) -> Imported:
    """Makes a whole model (`cfg.name`) from tensors in official names.

    Args:
        state: torch key (backbone_hr., ... as :func:`layouts.model_entries`) -> array.
        cfg: config.model.
        contract: the input contract.

    Returns:
        The parameters, with the account of them.
    """
    return fill(state, layouts.model_entries(cfg, contract), systems.system_of(cfg).param_shapes(cfg, contract))


def params_from_torch(state: Mapping[str, np.ndarray], cfg: config_dict.ConfigDict, contract: Contract) -> trees.Tree:
    """Makes the parameters of a whole model from tensors in official names. Strict: see :func:`fill`.

    Args:
        state: torch key -> array.
        cfg: config.model.
        contract: the input contract.

    Returns:
        The parameter tree, numpy float32.
    """
    return import_state(state, cfg, contract).params


def import_module(
    state: Mapping[str, np.ndarray], module: str, cfg: config_dict.ConfigDict, contract: Contract
) -> Imported:
    """Makes one top-level parameter of SkySense from tensors in the module's official names.

    Args:
        state: name without the module's prefix -> array (`released.modules_in` brings files to that).
        module: "hr", "s2", "s1", "head_s2", "head_s1", "fusion", "geo" or "ctpe".
        cfg: config.model.
        contract: the input contract.

    Returns:
        The parameters, whose tree is that of the module alone, with the account of them.
    """
    entries = [keymap.Entry("ctpe", "ctpe")] if module == "ctpe" else keymap.module_entries(module, cfg)
    shapes = param_shapes(cfg, contract)[module]
    imported = fill(state, entries, {"ctpe": shapes} if module == "ctpe" else shapes)
    return imported._replace(params=imported.params["ctpe"]) if module == "ctpe" else imported


def import_swin(
    tensors: Tensors, sensor: str | None, cfg: config_dict.ConfigDict, contract: Contract, leave_out: Sequence[str] = ()
) -> tuple[Imported, swin_files.Found]:
    """Makes parts of `models.msgfm.make_model(cfg, contract)` from the weights of a Swin-V1 file.

    That is a SimMIM, GFM or Swin-MoE checkpoint, a supervised one, or an export of msGFM. Strict: see :func:`fill` and
    `swin.files.fit`.

    Args:
        tensors: in the file.
        sensor: whose patch embedding and decoder a file of one sensor holds; None = "hr".
        cfg: config.model.
        contract: the input contract.
        leave_out: patterns of names to be dropped.

    Returns:
        (the top-level parameters that the file holds, with the account of them; what was made of the file).
    """
    fitted = swin_files.fit(tensors, sensor, cfg, contract, leave_out)
    shapes = msgfm.param_shapes(cfg, contract)
    return fill(fitted.tensors, fitted.entries, {name: shapes[name] for name in fitted.modules}), fitted


def load_folder(folder: str | pathlib.Path) -> tuple[trees.Tree, config_dict.ConfigDict, Contract, dict[str, Any]]:
    """Reads an exported folder back into JAX.

    Args:
        folder: that :func:`torch_export.export` wrote.

    Returns:
        (params, cfg, contract, the whole config.json).

    Raises:
        ValueError: it holds another model, or a tensor does not fit; it is named.
    """
    folder = pathlib.Path(folder)
    meta = json.loads((folder / "config.json").read_text())
    if meta.get("model_type") not in systems.SYSTEMS:
        raise ValueError(
            f"{folder}/config.json: model_type is {meta.get('model_type')!r}, not one of "
            f"{', '.join(map(repr, systems.SYSTEMS))}"
        )
    cfg = config.from_json(meta["architecture"])
    files = torch_export.weight_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no weights: neither {torch_export.WEIGHTS} nor {torch_export.INDEX}")
    state = joined([open_tensors(file) for file in files])
    return params_from_torch(state, cfg, meta["input_contract"]), cfg, meta["input_contract"], meta
