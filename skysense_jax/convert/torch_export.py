"""A folder that PyTorch reads.

It holds model.safetensors in official names, config.json, a frozen batch, a model card and the modelling file.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from ml_collections import config_dict

from skysense_jax.convert import frozen, keymap, layouts
from skysense_jax.convert.model_card import model_card
from skysense_jax.convert.tensor_files import sha256
from skysense_jax.core import trees
from skysense_jax.models.skysense import Params
from skysense_jax.sensors import Contract

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Hugging Face's names of the weights in one file, and of the index of several."""

SUMS = "SHA256SUMS"
"""Digests of an exported folder's files, for `sha256sum -c` and :func:`changed_files`."""


PARITY_REL_L2 = 3e-5
"""Relative L2 within which another implementation must reproduce the frozen batch."""


def state_from_params(params: trees.Tree, entries: Sequence[keymap.Entry]) -> dict[str, np.ndarray]:
    """Makes the torch tensors of a module's parameters, or of their gradients.

    Args:
        params: a tree.
        entries: of the module, one per tensor.

    Returns:
        Torch key -> contiguous numpy array, float32; tables of integers are int32.

    Raises:
        ValueError: the tree and the entries do not name the same leaves.
    """
    leaves = trees.flatten(params)
    stray = set(leaves) ^ {e.name for e in entries}
    if stray:
        raise ValueError(f"the key table and the parameters disagree about {sorted(stray)}")
    dtypes = {name: np.int32 if np.issubdtype(leaf.dtype, np.integer) else np.float32 for name, leaf in leaves.items()}
    host = {name: np.asarray(leaf, dtypes[name]) for name, leaf in leaves.items()}
    state = {}
    for entry in entries:
        leaf = host[entry.name]
        value = leaf if entry.index is None else leaf[entry.index]
        # safetensors writes the buffer in memory order: a transposed view would be stored wrong under the right shape.
        state[entry.torch] = np.ascontiguousarray(keymap.TRANSFORMS[entry.kind][1](value))
    return state


def relative_l2(value: np.ndarray, expected: np.ndarray) -> float:
    """The relative distance |value - expected| / |expected|, in float64.

    Args:
        value: an array.
        expected: another of the same shape.

    Returns:
        The distance.
    """
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(value - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def export(
    params: Params,
    contract: Contract,
    cfg: config_dict.ConfigDict,
    out_dir: str | pathlib.Path,
    provenance: Mapping[str, Any],
    per_module: bool = False,
) -> pathlib.Path:
    """Writes a folder that PyTorch reads.

    Args:
        params: of the model cfg.name with this configuration and contract.
        contract: the input contract.
        cfg: config.model.
        out_dir: the folder.
        provenance: JSON-able account of where the weights come from (commit, config, dataset id, steps, licence,
            inherited licence).
        per_module: one file of weights per module as the SkySense release has them, with Hugging Face's index,
            instead of one for all: at full size it needs a module's memory less.

    Returns:
        The folder.

    Raises:
        ValueError: out_dir holds another export, or per_module is asked of a model that was never released in parts.
    """
    out = pathlib.Path(out_dir)
    layout = layouts.LAYOUTS[cfg.name]
    if per_module and not layout.in_parts:
        raise ValueError(f"{cfg.name} is one encoder for all sensors; --per-module is for skysense")
    if weight_files(out):
        raise ValueError(f"{out} already holds exported weights; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    inputs, outputs = layouts.frozen_batch(params, cfg, contract)
    stored = {
        f"input.{name}.{key}": frozen.channels_first(x) if key == "image" else x
        for name, sensor in inputs.items()
        for key, x in sensor.items()
    }
    stored |= {f"output.{key}": value for key, value in outputs.items()}
    code, classes = f"modeling_{cfg.name}", layout.classes
    config = {
        "model_type": cfg.name,
        "format": 1,
        "architectures": [f"{classes}Model"],
        "auto_map": {"AutoConfig": f"{code}.{classes}Config", "AutoModel": f"{code}.{classes}Model"},
        "architecture": _plain(cfg),
        "input_contract": _plain(contract),
        "provenance": _plain(provenance),
        "parameters": count_parameters(params),
        "parity": {"tolerance_rel_l2": PARITY_REL_L2, "computed_with": f"jax {jax.__version__}, float32"},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "README.md").write_text(model_card(config, layouts.LAYOUTS[config["model_type"]].card(config)))
    shutil.copyfile(pathlib.Path(__file__).with_name(f"{code}.py"), out / f"{code}.py")
    _save(out / "parity.safetensors", {k: np.ascontiguousarray(v) for k, v in stored.items()})
    if not per_module:
        _save(out / WEIGHTS, state_from_params(params, layouts.model_entries(cfg, contract)))
        write_sums(out)
        return out
    weight_map: dict[str, str] = {}
    total = 0
    for module, entries in by_module(layouts.model_entries(cfg, contract)).items():
        module_params = {name: params[name] for name in {e.name.split("/")[0] for e in entries}}
        state = state_from_params(module_params, entries)
        _save(out / f"skysense_model_{module}.safetensors", state)
        weight_map |= dict.fromkeys(state, f"skysense_model_{module}.safetensors")
        total += sum(value.nbytes for value in state.values())
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")
    write_sums(out)
    return out


def write_sums(folder: pathlib.Path) -> None:
    """Writes the digests of everything in an exported folder but its model card, which people go on writing."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".py", ".safetensors"))
    (folder / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))


def changed_files(folder: pathlib.Path) -> list[str]:
    """Lists the files of an exported folder whose bytes are not those that were exported, or that are gone."""
    lines = (line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines())
    return [name for digest, name in lines if not (folder / name).is_file() or sha256(folder / name) != digest]


def record_parity(folder: pathlib.Path, figures: Mapping[str, float]) -> float:
    """Writes what plain torch measured on the frozen batch into config.json and the model card.

    Args:
        folder: an exported folder.
        figures: {output: relative L2}, of `verify.in_torch`.

    Returns:
        The worst figure.

    Raises:
        ValueError: it is beyond the tolerance: such a folder is not to be handed on.
    """
    config, worst = json.loads((folder / "config.json").read_text()), float(np.max(list(figures.values())))
    if not worst <= config["parity"]["tolerance_rel_l2"]:  # nan is not
        raise ValueError(
            f"{folder}: plain torch differs by {worst:.1e} from JAX on the frozen batch, the tolerance is "
            f"{config['parity']['tolerance_rel_l2']:g}"
        )
    config["parity"]["torch_rel_l2"] = {name.removeprefix("output."): value for name, value in figures.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(config, layouts.LAYOUTS[config["model_type"]].card(config)))
    write_sums(folder)
    return worst


def by_module(entries: Sequence[keymap.Entry]) -> dict[str, list[keymap.Entry]]:
    """Groups entries by the file of a release that they belong to.

    Args:
        entries: of a SkySense model.

    Returns:
        backbone_hr, backbone_s2 (with the calendar, where there is one), backbone_s1, head_s2, head_s1, fusion, glbank
        (geo-context and its bank, readable alone) -> their entries.
    """
    files: dict[str, list[keymap.Entry]] = {}
    for entry in entries:
        module = entry.name.split("/")[0]
        if module == "ctpe":
            module = "s2" if "backbone_s2" in files else "fusion"
        files.setdefault(keymap.PREFIXES[module].rstrip("."), []).append(entry)
    return files


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files with an exported folder's weights: one, or one per module; none where it holds no weights."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]


def _save(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(dict(state), path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library writes through a private temporary file


def count_parameters(params: Params) -> dict[str, int]:
    """Counts parameters by top-level name, and "total". Works on ShapeDtypeStructs."""
    counts = {key: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(part)) for key, part in params.items()}
    return counts | {"total": sum(counts.values())}


def _plain(value: Any) -> Any:
    """ConfigDicts, tuples and numpy numbers as JSON values."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
