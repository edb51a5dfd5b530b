"""PyTorch tensors in: names brought to the official ones, our parameter tree filled; strict throughout."""

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


class Imported(NamedTuple):
    """params: our tree. filled: torch keys the state lacked and a default replaced. ignored: keys left out on
    purpose.
    """

    params: dict[str, Any]
    filled: list[str]
    ignored: list[str]


def fill(state: Mapping[str, np.ndarray], entries: Sequence[keymap.Entry], shapes: Any) -> Imported:
    """The tree of `shapes` (arrays or ShapeDtypeStructs) from torch tensors, by the entries of a module.

    Every tensor must be expected and every expected one present with the right shape; recomputed buffers
    (keymap.BUFFERS) may be there. float16, bfloat16 and float64 become float32; a table of integers (int32, int64)
    stays one. Raises ValueError naming every missing, unexpected and wrongly shaped tensor at once.
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
        wanted = keymap.torch_shape(entry, leaf.shape)
        if entry.torch not in state:
            if entry.default is None:
                problems.append(f"missing: {entry.torch} {wanted}")
                continue
            filled.append(entry.torch)
            value = np.full(wanted, entry.default, np.float32)
        else:
            value = state[entry.torch]
        if tuple(value.shape) != wanted:
            problems.append(f"wrong shape: {entry.torch} is {tuple(value.shape)}, the model needs {wanted}")
            continue
        whole = np.issubdtype(leaf.dtype, np.integer)
        if (value.dtype.kind in "iub?") != whole or value.dtype.kind in "ub?":
            problems.append(f"wrong type: {entry.torch} is {value.dtype}, {'an int' if whole else 'a float'} is needed")
            continue
        if entry.name not in arrays:
            arrays[entry.name] = np.empty(leaf.shape, np.int32 if whole else np.float32)
        arrays[entry.name][... if entry.index is None else entry.index] = keymap.TRANSFORMS[entry.kind][0](value)
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit the model:\n  " + "\n  ".join(problems))
    return Imported(trees.nest(arrays), filled, ignored)


def import_state(state: Mapping[str, np.ndarray], cfg: Any, contract: Mapping[str, Any]) -> Imported:
    """A whole model (`cfg.name`) from tensors in official names (backbone_hr., ... as :func:`keymap.model_entries`),
    with the account of it.
    """
    return fill(state, layouts.model_entries(cfg, contract), systems.system_of(cfg).param_shapes(cfg, contract))


def params_from_torch(state: Mapping[str, np.ndarray], cfg: Any, contract: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of that model (numpy, float32) from tensors in official names. Strict: see :func:`fill`."""
    return import_state(state, cfg, contract).params


def import_module(state: Mapping[str, np.ndarray], module: str, cfg: Any, contract: Mapping[str, Any]) -> Imported:
    """One top-level parameter ("hr", "s2", "s1", "head_s2", "head_s1", "fusion", "geo", "ctpe") from tensors in the
    module's official names without prefix (`released.modules_in` brings files to them). params is the module's own
    tree.
    """
    entries = [keymap.Entry("ctpe", "ctpe")] if module == "ctpe" else keymap.module_entries(module, cfg)
    shapes = param_shapes(cfg, contract)[module]
    imported = fill(state, entries, {"ctpe": shapes} if module == "ctpe" else shapes)
    return imported._replace(params=imported.params["ctpe"]) if module == "ctpe" else imported


def import_swin(
    tensors: Tensors, sensor: str | None, cfg: Any, contract: Mapping[str, Any], leave_out: Sequence[str] = ()
) -> tuple[Imported, swin_files.Found]:
    """The weights of a Swin-V1 file (SimMIM, GFM, supervised, Swin-MoE, an export of msGFM) as parts of
    `models.msgfm.make_model(cfg, contract)`: params has those of the top-level parameters the file holds, the patch
    embedding and the decoder of a file of one sensor as those of `sensor`. Strict: see :func:`fill` and
    `swin_files.fit`.
    """
    found = swin_files.fit(tensors, sensor, cfg, contract, leave_out)
    shapes = msgfm.param_shapes(cfg, contract)
    return fill(found.tensors, found.entries, {name: shapes[name] for name in found.modules}), found


def load_folder(
    folder: str | pathlib.Path,
) -> tuple[dict[str, Any], config_dict.ConfigDict, dict[str, Any], dict[str, Any]]:
    """An exported folder back in JAX: (params, cfg, contract, the whole config.json). Raises ValueError naming what
    does not fit.
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
