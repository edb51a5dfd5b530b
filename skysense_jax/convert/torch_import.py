"""PyTorch tensors in: read a file of weights, bring its names to the official ones, fill our parameter tree; strict
throughout.
"""
from __future__ import annotations

import importlib.util
import json
import pathlib
import zipfile
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np
import safetensors.numpy
from ml_collections import config_dict

from skysense_jax.convert import keymap
from skysense_jax.core import trees
from skysense_jax.models.skysense import param_shapes

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which a checkpoint may hold its tensors."""

OUTER_PREFIXES = ("module.", "model.")
MODULE_PREFIXES = {
    "hr": ("backbone_gep.", "backbone_hr.", "visual.", "backbone."), "s2": ("backbone_s2.", "backbone."),
    "s1": ("backbone_s1.", "backbone."), "fusion": ("fusion.", "backbone."), "head_s2": ("head_s2.", "backbone."),
    "head_s1": ("head_s1.", "backbone."),
}
"""Prefixes a single-module file may carry, in the order they are tried (SkySense ckpt_convert, README, SkySense-O)."""

UNUSED_IN_ENCODERS = ("mask_token", "ctpe")
"""Tensors a released encoder file carries beside the encoder's own; left out, and reported."""


class Imported(NamedTuple):
    """params: our tree. filled: torch keys the state lacked and a default replaced. ignored: keys left out on
    purpose.
    """

    params: dict[str, Any]
    filled: list[str]
    ignored: list[str]


def fill(
    state: Mapping[str, np.ndarray], entries: Sequence[keymap.Entry], shapes: Any, ignore: Sequence[str] = (),
) -> Imported:
    """The tree of `shapes` (arrays or ShapeDtypeStructs) from torch tensors, by the entries of a module.

    Every tensor must be expected and every expected one present with the right shape; recomputed buffers
    (keymap.BUFFERS) and the names in `ignore` may be there. float16, bfloat16 and float64 become float32. Raises
    ValueError naming every missing, unexpected and wrongly shaped tensor at once.
    """
    leaves = trees.flatten(shapes)
    stray = set(leaves) ^ {e.name for e in entries}
    if stray:
        raise ValueError(f"the key table and the model disagree about {sorted(stray)}")
    known = {e.torch for e in entries}
    ignored = [k for k in state if k not in known and (k.split(".")[-1] in keymap.BUFFERS or k in ignore)]
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
        if value.dtype.kind in "iub?":
            problems.append(f"wrong type: {entry.torch} is {value.dtype}, a float is needed")
            continue
        if entry.name not in arrays:
            arrays[entry.name] = np.empty(leaf.shape, np.float32)
        arrays[entry.name][... if entry.index is None else entry.index] = keymap.TRANSFORMS[entry.kind][0](value)
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit the model:\n  " + "\n  ".join(problems))
    return Imported(trees.nest(arrays), filled, ignored)


def import_state(state: Mapping[str, np.ndarray], cfg: Any, contract: Mapping[str, Any]) -> Imported:
    """A whole model from tensors in official names (backbone_hr., ... as :func:`keymap.model_entries`), with the
    account of it.
    """
    return fill(state, keymap.model_entries(cfg, contract), param_shapes(cfg, contract))


def params_from_torch(state: Mapping[str, np.ndarray], cfg: Any, contract: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of `make_model(cfg, contract)` (numpy, float32) from tensors in official names. Strict: see
    :func:`fill`.
    """
    return import_state(state, cfg, contract).params


def import_module(
    state: Mapping[str, np.ndarray], module: str, cfg: Any, contract: Mapping[str, Any],
) -> Imported:
    """One top-level parameter ("hr", "s2", "s1", "head_s2", "head_s1", "fusion") from a single-module file in official
    names, with or without the prefixes such files carry. The tree in the result is the module's own."""
    if module not in keymap.PREFIXES:
        raise ValueError(f"unknown module {module!r}; known: {', '.join(keymap.PREFIXES)}")
    prefix = keymap.PREFIXES[module]
    own = [e for e in keymap.model_entries(cfg, contract) if e.name.startswith(f"{module}/")]
    own = [e._replace(torch=e.torch[len(prefix):], name=e.name[len(module) + 1:]) for e in own]
    return fill(strip_prefixes(state, module), own, param_shapes(cfg, contract)[module], UNUSED_IN_ENCODERS)


def strip_prefixes(state: Mapping[str, np.ndarray], module: str) -> dict[str, np.ndarray]:
    """Names of a single-module file without its prefixes (module., model., then the first of MODULE_PREFIXES that
    occurs), and the fused-attention builds' `Wqkv` names brought to in_proj. Raises ValueError where two names become
    one."""
    found = next((p for p in MODULE_PREFIXES[module] if any(_outer(k).startswith(p) for k in state)), "")
    stripped: dict[str, np.ndarray] = {}
    for key, value in state.items():
        name = _outer(key)
        name = name[len(found):] if name.startswith(found) else name
        name = name.replace(".Wqkv.weight", ".in_proj_weight").replace(".Wqkv.bias", ".in_proj_bias")
        if name in stripped:
            raise ValueError(f"two tensors of the file are both named {name} once the prefixes are off")
        stripped[name] = value
    return stripped


def _outer(key: str) -> str:
    for prefix in OUTER_PREFIXES:
        key = key[len(prefix):] if key.startswith(prefix) else key
    return key


def read_tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors or PyTorch file, unwrapped from `state_dict` / `model`, as numpy arrays.

    PyTorch files are read with weights_only=True (never executing what a pickle asks for), memory-mapped where the
    file is a zip archive; bfloat16 becomes float32. Raises ValueError for an unknown ending, a file without tensors,
    or where torch is needed and absent.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        return dict(safetensors.numpy.load_file(path))
    if path.suffix not in (".pth", ".pt", ".ckpt", ".bin"):
        raise ValueError(f"{path}: weights are read from .safetensors, .pth, .pt, .ckpt or .bin files")
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f"{path}: reading PyTorch files needs torch; install the extra `torch`, or use .safetensors")
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path}: no tensors in it; found {sorted(map(str, content))[:10]}")
    return {k: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for k, v in tensors.items()}


def tuples(value: Any) -> Any:
    """JSON lists as tuples, recursively: configurations hold tuples."""
    if isinstance(value, dict):
        return {k: tuples(v) for k, v in value.items()}
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value


def load_folder(
    folder: str | pathlib.Path,
) -> tuple[dict[str, Any], config_dict.ConfigDict, dict[str, Any], dict[str, Any]]:
    """An exported folder back in JAX: (params, cfg, contract, the whole config.json). Raises ValueError naming what
    does not fit.
    """
    folder = pathlib.Path(folder)
    meta = json.loads((folder / "config.json").read_text())
    if meta.get("model_type") != "skysense":
        raise ValueError(f"{folder}/config.json: model_type is {meta.get('model_type')!r}, not 'skysense'")
    cfg = config_dict.ConfigDict(tuples(meta["architecture"]))
    state = read_tensors(folder / "model.safetensors")
    return params_from_torch(state, cfg, meta["input_contract"]), cfg, meta["input_contract"], meta
