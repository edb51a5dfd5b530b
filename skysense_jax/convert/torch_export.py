"""A folder PyTorch reads: model.safetensors in official names, config.json, a frozen batch, a model card, the
modelling file.
"""
from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any, Mapping, Sequence

import jax
import numpy as np
import safetensors.numpy
from ml_collections import config_dict

from skysense_jax.convert import keymap
from skysense_jax.core import trees
from skysense_jax.models.skysense import PLACE, Params, make_model, per_stage
from skysense_jax.ops import regions

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Hugging Face's names of the weights in one file, and of the index of several."""

MODELING = pathlib.Path(__file__).with_name("modeling_skysense.py")
PARITY_REL_L2 = 3e-5
"""Relative L2 within which another implementation must reproduce the frozen batch."""


def state_from_params(params: Any, entries: Sequence[keymap.Entry]) -> dict[str, np.ndarray]:
    """Torch tensors (contiguous numpy, float32; tables of integers int32) of a module's parameters, or of their
    gradients, by its entries.

    Raises ValueError where the tree and the entries do not name the same leaves.
    """
    leaves = trees.flatten(params)
    stray = set(leaves) ^ {e.name for e in entries}
    if stray:
        raise ValueError(f"the key table and the parameters disagree about {sorted(stray)}")
    whole = {name: np.issubdtype(leaf.dtype, np.integer) for name, leaf in leaves.items()}
    host = {name: np.asarray(leaf, np.int32 if whole[name] else np.float32) for name, leaf in leaves.items()}
    state = {}
    for entry in entries:
        leaf = host[entry.name]
        value = leaf if entry.index is None else leaf[entry.index]
        # safetensors writes the buffer in memory order: a transposed view would be stored wrong under the right shape.
        state[entry.torch] = np.ascontiguousarray(keymap.TRANSFORMS[entry.kind][1](value))
    return state


def frozen_inputs(cfg: Any, contract: Mapping[str, Any], seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """A small deterministic PlaceInput in raw units: two places, with invalid pixels, a masked date and an unmeasured
    band.
    """
    rng = np.random.default_rng(seed)
    cells = 4
    if "hr" in contract["sensors"]:
        windows = per_stage(cfg.hr.window, len(cfg.hr.depths), "window")
        cells = max(-(-window * cfg.hr.patch * 2**stage // cfg.ratio) for stage, window in enumerate(windows))
    inputs = {}
    for name, rule in contract["sensors"].items():
        dates = 1 if name == "hr" else 3
        side, bands = cells * (cfg.ratio if rule["grid"] == "hr" else 1), len(rule["bands"])
        noise = rng.standard_normal((2, dates, side, side, bands))
        valid = np.ones((2, dates, side, side), np.float32)
        valid[0, 0, : side // 4] = 0
        measured = np.ones((2, dates, bands), np.float32)
        if dates > 1:
            valid[1, -1] = 0
            measured[0, 1, 0] = 0
        days = rng.integers(0, 365, (2, dates)) if name != "hr" else np.full((2, dates), -1)
        inputs[name] = {
            "image": (np.asarray(rule["mean"]) + np.asarray(rule["std"]) * noise).astype(np.float32),
            "valid": valid, "bands": measured, "dates": np.sort(days, axis=1).astype(np.int32)}
    return inputs


def frozen_place(bank: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where the two frozen places are: in the first region of the bank that was visited, and nowhere."""
    cells = np.asarray(bank["cells"])[np.asarray(bank["visits"]) > 0]
    here = regions.cell_centre(cells[0], bank["lon_edges"], bank["lat_edges"]) if len(cells) else (0.0, 0.0)
    return {name: np.array([value, np.nan], np.float32) for name, value in zip(("lon", "lat"), here)}


def frozen_outputs(
    params: Params, cfg: Any, contract: Mapping[str, Any], inputs: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Outputs on a frozen batch in float32 at full matmul precision, flat, in torch's layout: fused [B,E,h,w],
    fused_mask, maps.<sensor> [B,T,D,h,w], mask.<sensor>, hr_stages.<i> [B,T,C,H,W]."""
    model = make_model(config_dict.ConfigDict({**cfg.to_dict(), "dtype": "float32"}), contract)
    with jax.default_matmul_precision("highest"):
        outputs = jax.device_get(jax.jit(model.apply)(params, inputs))
    flat = {}
    if "fused" in outputs:
        flat = {"fused": _channels_first(outputs["fused"]), "fused_mask": outputs["fused_mask"]}
    flat |= {f"maps.{name}": _channels_first(x) for name, x in outputs["maps"].items()}
    flat |= {f"mask.{name}": x for name, x in outputs["mask"].items()}
    flat |= {f"hr_stages.{i}": _channels_first(x) for i, x in enumerate(outputs.get("hr_stages", ()))}
    return {k: np.ascontiguousarray(v) for k, v in flat.items()}


def relative_l2(value: np.ndarray, expected: np.ndarray) -> float:
    """|value - expected| / |expected|, in float64."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(value - expected) / max(np.linalg.norm(expected), 1e-30))


def export(
    params: Params, contract: Mapping[str, Any], cfg: Any, out_dir: str | pathlib.Path, provenance: Mapping[str, Any],
    per_module: bool = False,
) -> pathlib.Path:
    """Write the folder and return its path.

    params: the encoder of make_model(cfg, contract). cfg: config.model. provenance: JSON-able account of where the
    weights come from (commit, config, dataset id, steps, licence, inherited licence). per_module: one file of weights
    per module as the release has them, with Hugging Face's index, instead of one for all: at full size it needs a
    module's memory less. Raises ValueError if out_dir holds another export.
    """
    out = pathlib.Path(out_dir)
    if weight_files(out):
        raise ValueError(f"{out} already holds exported weights; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    inputs = frozen_inputs(cfg, contract)
    if "geo" in params:
        inputs[PLACE] = frozen_place(params["geo"]["bank"])
    frozen = {f"input.{name}.{key}": _channels_first(x) if key == "image" else x
              for name, sensor in inputs.items() for key, x in sensor.items()}
    frozen |= {f"output.{k}": v for k, v in frozen_outputs(params, cfg, contract, inputs).items()}
    config = {
        "model_type": "skysense", "format": 1, "architectures": ["SkySenseModel"],
        "auto_map": {"AutoConfig": "modeling_skysense.SkySenseConfig", "AutoModel": "modeling_skysense.SkySenseModel"},
        "architecture": _plain(cfg), "input_contract": _plain(contract), "provenance": _plain(provenance),
        "parameters": count_parameters(params),
        "parity": {"tolerance_rel_l2": PARITY_REL_L2, "computed_with": f"jax {jax.__version__}, float32"},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "README.md").write_text(model_card(config))
    shutil.copyfile(MODELING, out / MODELING.name)
    _save(out / "parity.safetensors", {k: np.ascontiguousarray(v) for k, v in frozen.items()})
    if not per_module:
        _save(out / WEIGHTS, state_from_params(params, keymap.model_entries(cfg, contract)))
        return out
    weight_map, total = {}, 0
    for module, entries in by_module(keymap.model_entries(cfg, contract)).items():
        held = {name: params[name] for name in {e.name.split("/")[0] for e in entries}}
        state = state_from_params(held, entries)
        _save(out / f"skysense_model_{module}.safetensors", state)
        weight_map |= dict.fromkeys(state, f"skysense_model_{module}.safetensors")
        total += sum(value.nbytes for value in state.values())
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")
    return out


def record_parity(folder: pathlib.Path, figures: Mapping[str, float]) -> float:
    """Writes what plain torch measured on the frozen batch into config.json and the model card; returns the worst.

    Raises ValueError where it is beyond the tolerance: such a folder is not to be handed on.
    """
    config, worst = json.loads((folder / "config.json").read_text()), max(figures.values())
    if worst > config["parity"]["tolerance_rel_l2"]:
        raise ValueError(f"{folder}: plain torch differs by {worst:.1e} from JAX on the frozen batch, the tolerance is "
                         f"{config['parity']['tolerance_rel_l2']:g}")
    config["parity"]["torch_rel_l2"] = {name.removeprefix("output."): value for name, value in figures.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(config))
    return worst


def by_module(entries: Sequence[keymap.Entry]) -> dict[str, list[keymap.Entry]]:
    """Entries by the file of a release they belong to: backbone_hr, backbone_s2 (with the calendar, where there is
    one), backbone_s1, head_s2, head_s1, fusion, glbank (geo-context and its bank, readable alone)."""
    files: dict[str, list[keymap.Entry]] = {}
    for entry in entries:
        module = entry.name.split("/")[0]
        if module == "ctpe":
            module = "s2" if "backbone_s2" in files else "fusion"
        files.setdefault(keymap.PREFIXES[module].rstrip("."), []).append(entry)
    return files


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files with an exported folder's weights: one, or one per module; none where it holds no weights."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]


def _save(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(dict(state), path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library writes through a private temporary file


def count_parameters(params: Params) -> dict[str, int]:
    """Number of parameters by top-level name, and "total". Works on ShapeDtypeStructs."""
    counts = {key: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(part)) for key, part in params.items()}
    return counts | {"total": sum(counts.values())}


def model_card(config: Mapping[str, Any]) -> str:
    """README.md of an exported folder: what it is, what it eats, how to load it, where it comes from."""
    architecture, contract, provenance = config["architecture"], config["input_contract"], config["provenance"]
    rows = [f"| {name} | {', '.join(rule['bands'])} | {rule['unit']} | {rule['gsd']} m |"
            for name, rule in contract["sensors"].items()]
    counts = [f"| {name} | {count:,} |" for name, count in config["parameters"].items()]
    origin = [f"- {key}: {json.dumps(value)}" for key, value in provenance.items()] or ["- not recorded"]
    figures = config["parity"].get("torch_rel_l2")
    measured = f"plain torch within {max(figures.values()):.1e} of JAX (relative L2)" if figures else "nothing, without torch"
    outputs = "outputs['maps'], outputs.get('hr_stages')"
    if "fusion" in config["parameters"]:
        outputs = f"outputs['fused'], {outputs}"
    sensor = next(iter(contract["sensors"]))
    where = ", 'place': {'lon': degrees, 'lat': degrees}" if "geo" in config["parameters"] else ""
    return "\n".join([
        "# SkySense weights exported by skysense_jax", "",
        "Encoders per sensor on one grid, a fusion transformer per cell. Parameter names are the SkySense release's.",
        "",
        "## Input", "", "| sensor | bands, in this order | unit | pixel |", "|---|---|---|---|", *rows, "",
        f"One base cell is one Sentinel-2 pixel; {contract['ratio']} HR pixels lie along it. "
        "Give raw units: the model normalises, with the statistics in `config.json`. Invalid pixels and unmeasured "
        "bands are declared by masks.", "",
        "## Use (PyTorch, this folder only)", "",
        "```python", "from modeling_skysense import load", "", "model = load('.')",
        f"outputs = model({{'{sensor}': {{'image': image, 'dates': day_of_year}}{where}}})",
        "# image: [B,T,C,H,W] in raw units, dates: [B,T]",
        outputs, "```", "",
        "`python modeling_skysense.py` runs the frozen batch in `parity.safetensors` and prints the differences.",
        f"Measured at export: {measured}.", "",
        "## Size", "", "| part | parameters |", "|---|---|", *counts, "",
        f"Width of the common grid {architecture['width']}, calendar `{architecture['calendar']}`.", "",
        "## Provenance", "", *origin, ""])


def _channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, -3))


def _plain(value: Any) -> Any:
    """ConfigDicts, tuples and numpy numbers as JSON values."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
