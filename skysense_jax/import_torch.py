"""`skysense-jax import-torch`: the released SkySense and SkySense++ weights as a folder `load`, `eval`, `inspect` and
`export-torch` read, module by module.

OUT/parts/<module>/ is one Orbax checkpoint per module, each with digests; OUT/model.json, written last, says what the
model is (architecture, input contract) and where every module comes from. One module is in memory at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import shutil
import time
from typing import Any, Mapping, Sequence

import jax
from ml_collections import config_dict

from skysense_jax import __version__, embed, sensors
from skysense_jax.convert import keymap, released, tensor_files, torch_import
from skysense_jax.data.parts import write_atomically
from skysense_jax.models.skysense import param_shapes
from skysense_jax.run import checkpoint

FULL_SIZE = pathlib.Path(__file__).resolve().parents[1] / "configs" / "skysense_full.py"
"""The released architecture, in a checkout."""

LICENCE = "non-commercial research, inherited from the released SkySense weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=".pth, .pt, .ckpt, .bin or .safetensors; MODULE=FILE says which module a file holds "
        f"({', '.join(keymap.PREFIXES)})",
    )
    parser.add_argument("--out", required=True, help="folder to write; must not hold imported weights yet")
    parser.add_argument("--config", default=str(FULL_SIZE), help="configuration of the model (the released size)")
    parser.add_argument(
        "--bands",
        action="append",
        default=[],
        metavar="SENSOR=B,B,...",
        help="other bands than the configuration's, by the reference code's kernel rules: hr=R,G,B,NIR, or some of s2's",
    )
    parser.add_argument(
        "--calendar", choices=("s2", "dated", "none"), help="where the calendar table is added (model.calendar)"
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names of tensors (shell patterns) that are not imported, where a file holds more than the model",
    )
    parser.add_argument("--licence", default=LICENCE, help=f"licence of the files, carried into every export ({LICENCE})")


def run(args: argparse.Namespace) -> int:
    """Imports and prints what came from where."""
    if not pathlib.Path(args.config).is_file():
        raise FileNotFoundError(f"{args.config}: no such configuration; give --config FILE with the model's sizes")
    config = embed.read_config(args.config)
    bands = {name: tuple(names) for name, names in config.data.bands.items()} | _bands(args.bands)
    if args.calendar:
        config.model.calendar = args.calendar
    print(import_files(args.files, config.model, bands, args.out, args.leave_out, args.licence))
    return 0


def _bands(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    chosen = {}
    for option in options:
        name, equals, names = option.partition("=")
        if not equals or name not in sensors.SENSORS:
            raise ValueError(f"--bands {option}: write SENSOR=BAND,BAND,... with SENSOR one of {', '.join(sensors.SENSORS)}")
        chosen[name] = tuple(names.split(","))
    return chosen


def import_files(
    files: Sequence[str],
    model: Any,
    bands: Mapping[str, Sequence[str]],
    out: str | pathlib.Path,
    leave_out: Sequence[str] = (),
    licence: str = LICENCE,
) -> pathlib.Path:
    """Imports released files; returns `out`.

    files: paths, or "MODULE=PATH". model: config.model of the whole architecture; what no file holds is left out of it
    (`model.modules`). bands: sensor -> bands in the model's order. leave_out: patterns of tensors not wanted.
    licence: of the files; every export of them carries it on.
    Raises FileNotFoundError; ValueError where a file cannot be read safely, a tensor is missing, unknown or misshapen,
    modules do not make a model, the disk has no room, or `out` holds weights already.
    """
    out = pathlib.Path(out)
    if (out / embed.MODEL_FILE).exists():
        raise ValueError(f"{out} already holds imported weights; choose another folder")
    parts = released.gather(dict(_open(file) for file in files), leave_out)
    cfg, contract = describe(parts, model, bands)
    shapes = param_shapes(cfg, contract)
    wanted = [name for name in parts if name in shapes]
    unused = {name: part.path.name for name, part in parts.items() if name not in wanted}
    need = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(shapes))
    free = shutil.disk_usage(_existing(out)).free
    print(f"{', '.join(wanted)}: up to {need / 2**30:.2f} GiB on disk, {free / 2**30:.2f} GiB free", flush=True)
    if free < need:
        raise ValueError(f"{out}: {need / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free")
    origins = {}
    for name in wanted:
        part, started = _fitted(parts.pop(name), name, cfg, contract), time.monotonic()
        imported = torch_import.import_module(part.tensors, name, cfg, contract)
        path, notes = part.path, [*part.notes, *(f"{key} absent in the file: {_default(key)}" for key in imported.filled)]
        del part  # the file is mapped as long as a part of it is held, and its pages count as ours
        checkpoint.save_part(out / embed.PARTS, name, {name: imported.params})
        if imported.ignored:
            notes.append(f"{len(imported.ignored)} buffers are recomputed, not read")
        count = sum(leaf.size for leaf in jax.tree.leaves(imported.params))
        origins[name] = {"file": path.name, "sha256": _sha256(path), "parameters": count, "notes": notes}
        print(f"{name}: {count:,} parameters from {path.name}, {time.monotonic() - started:.1f} s", flush=True)
        for note in notes:
            print(f"  {note}", flush=True)
        del imported
    for name, file in unused.items():
        print(f"{name}: in {file}, not part of this model (no fusion to use it)", flush=True)
    description = {
        "format": 1, "model_type": "skysense", "architecture": json.loads(cfg.to_json()), "input_contract": contract,
        "provenance": {"source": "imported PyTorch weights", "parts": origins, "imported_with": __version__,
                       "licence": licence},
    }
    write_atomically(out / embed.MODEL_FILE, (json.dumps(description, indent=1) + "\n").encode())
    return out


def describe(
    parts: Mapping[str, released.Part], model: Any, bands: Mapping[str, Sequence[str]]
) -> tuple[config_dict.ConfigDict, dict[str, Any]]:
    """config.model and input contract of the model that these modules make.

    Raises ValueError where an UP head or the fusion lacks the modules it needs.
    """
    cfg = config_dict.ConfigDict(model.to_dict())
    encoders = [name for name in sensors.SKYSENSE_BANDS if name in parts]
    if not encoders:
        raise ValueError(f"no encoder among the modules found ({', '.join(parts)}); a model needs hr, s2 or s1")
    if unknown := [name for name in encoders if name not in bands]:
        raise ValueError(f"the configuration has no bands for {unknown}; give --bands {unknown[0]}=...")
    for name in encoders:
        side = released.table_side(parts[name], name)
        if side is not None:
            cfg[name].img_size = side * cfg[name].patch
    contract = sensors.input_contract({name: bands[name] for name in encoders}, cfg.ratio)
    if "geo" in parts and "geo_context" not in cfg:
        raise ValueError(f"{parts['geo'].path} holds a prototype bank, the configuration has no model.geo_context")
    if "geo" in parts:
        cfg.geo_context.bank = "frozen"
        if len(shape := parts["geo"].tensors.shapes.get("prototypes", ())) == 3:
            cfg.geo_context.regions, cfg.geo_context.prototypes, cfg.geo_context.width = shape
    held = [name for name in parts if name != released.CALENDAR]
    with cfg.unlocked():
        cfg.modules = tuple(held)
    if "fusion" not in held:
        cfg.calendar = "none"
    elif cfg.calendar != "none" and released.CALENDAR not in parts:
        raise ValueError(f"the fusion adds a calendar table (model.calendar={cfg.calendar!r}) and no file holds ctpe: the "
                         "release keeps it in the file of the S2 encoder; --calendar none does without")
    return cfg, contract


def _open(option: str) -> tuple[str, tuple[str | None, tensor_files.Tensors]]:
    module, equals, path = option.partition("=")
    if not equals or module not in keymap.PREFIXES:
        module, path = "", option
    return path, (module or None, tensor_files.open_tensors(path))


def _fitted(part: released.Part, name: str, cfg: Any, contract: Mapping[str, Any]) -> released.Part:
    if name not in contract["sensors"]:
        return part
    part = released.for_bands(part, name, contract["sensors"][name]["bands"])
    if name == "hr":
        return part
    return released.with_class_row(part, cfg[name].img_size // cfg[name].patch, cfg[name].cls_token)


def _default(key: str) -> str:
    return "ones" if key.endswith(".weight") else "zeros"


def _existing(path: pathlib.Path) -> pathlib.Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
