"""`skysense-jax import-torch`: PyTorch weights as a folder `load`, `eval`, `inspect`, `export-torch` and `train
--init_from` read: those of SkySense and SkySense++, or, with a configuration of msGFM, those of a Swin-V1 (GFM, SimMIM,
ImageNet, Swin-MoE).

OUT/parts/<module>/ is one Orbax checkpoint per module, each with digests; OUT/model.json, written last, says what the
model is (architecture, input contract) and where every module comes from. Of SkySense, one module is in memory at a
time.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax import __version__, embed, sensors
from skysense_jax.configs import skysense_full
from skysense_jax.convert import expert_shards, keymap, released, swin_files, tensor_files, torch_import
from skysense_jax.data.parts import write_atomically
from skysense_jax.models import msgfm
from skysense_jax.models.skysense import param_shapes
from skysense_jax.ops import regions
from skysense_jax.run import checkpoint

FULL_SIZE = pathlib.Path(skysense_full.__file__)
"""The released architecture, in a checkout or in an installed package."""

LICENCE = "non-commercial research, inherited from the released SkySense weights"
SWIN_LICENCE = "that of the imported files, which do not state it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=".pth, .pt, .ckpt, .bin or .safetensors; MODULE=FILE says which module a file of SkySense holds "
        f"({', '.join(keymap.PREFIXES)}). Swin-MoE: FILE.rank0 FILE.rank1 ... FILE.master",
    )
    parser.add_argument("--out", required=True, help="folder to write; must not hold imported weights yet")
    parser.add_argument("--config", default=str(FULL_SIZE), help="configuration of the model (the released size)")
    parser.add_argument(
        "--bands",
        action="append",
        default=[],
        metavar="SENSOR=B,B,...",
        help="other bands than the configuration's, by the reference's kernel rules: hr=R,G,B,NIR, or some of s2's",
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
    parser.add_argument(
        "--licence",
        help=f"licence of the files, carried into every export (SkySense: {LICENCE}; others: {SWIN_LICENCE})",
    )
    parser.add_argument(
        "--sensor",
        choices=tuple(sensors.SENSORS),
        help="msGFM: the sensor whose patch embedding and decoder a file of one sensor holds (hr)",
    )


def run(args: argparse.Namespace) -> int:
    """Imports and prints what came from where."""
    if not pathlib.Path(args.config).is_file():
        raise FileNotFoundError(f"{args.config}: no such configuration; give --config FILE with the model's sizes")
    config = embed.read_config(args.config)
    swin = config.model.name == "msgfm"
    if args.sensor is not None and not swin or args.calendar is not None and swin:
        raise ValueError(f"--{'calendar' if swin else 'sensor'} means nothing for a model {config.model.name!r}")
    bands = {name: tuple(names) for name, names in config.data.bands.items()} | _bands(args.bands)
    if args.calendar:
        config.model.calendar = args.calendar
    if swin:
        licence = SWIN_LICENCE if args.licence is None else args.licence
        print(import_swin(args.files, config.model, bands, args.sensor, args.out, args.leave_out, licence))
    else:
        licence = LICENCE if args.licence is None else args.licence
        print(import_files(args.files, config.model, bands, args.out, args.leave_out, licence))
    return 0


def _bands(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    chosen = {}
    for option in options:
        name, equals, names = option.partition("=")
        if not equals or name not in sensors.SENSORS:
            raise ValueError(
                f"--bands {option}: write SENSOR=BAND,BAND,... with SENSOR one of {', '.join(sensors.SENSORS)}"
            )
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
    out = _empty(out)
    parts = released.gather(dict(_open(file) for file in files), leave_out)
    cfg, contract = describe(parts, model, bands)
    shapes = param_shapes(cfg, contract)
    wanted = [name for name in parts if name in shapes]
    unused = {name: part.path.name for name, part in parts.items() if name not in wanted}
    _check_room(out, wanted, shapes)
    origins = {}
    for name in wanted:
        part, started = _fitted(parts.pop(name), name, cfg, contract), time.monotonic()
        imported = torch_import.import_module(part.tensors, name, cfg, contract)
        path = part.path
        notes = [*part.notes, *(f"{key} absent in the file: {_default(key)}" for key in imported.filled)]
        del part  # the file is mapped as long as a part of it is held, and its pages count as ours
        checkpoint.save_part(out / embed.PARTS, name, {name: imported.params})
        if imported.ignored:
            notes.append(f"{len(imported.ignored)} buffers are recomputed, not read")
        count = sum(leaf.size for leaf in jax.tree.leaves(imported.params))
        origins[name] = {"file": path.name, "sha256": tensor_files.sha256(path), "parameters": count, "notes": notes}
        print(f"{name}: {count:,} parameters from {path.name}, {time.monotonic() - started:.1f} s", flush=True)
        for note in notes:
            print(f"  {note}", flush=True)
        del imported
    for name, file in unused.items():
        print(f"{name}: in {file}, not part of this model (no fusion to use it)", flush=True)
    _describe(out, cfg, contract, origins, licence)
    return out


def import_swin(
    files: Sequence[str],
    model: Any,
    bands: Mapping[str, Sequence[str]],
    sensor: str | None,
    out: str | pathlib.Path,
    leave_out: Sequence[str] = (),
    licence: str = SWIN_LICENCE,
) -> pathlib.Path:
    """Imports the weights of a Swin-V1 as those of msGFM; returns `out`.

    files: one, or those of Swin-MoE's processes. model: config.model of the whole architecture. bands: sensor -> bands
    in the model's order. sensor: whose patch embedding and decoder a file of one sensor holds, None = "hr". What the
    model has beyond the files (other sensors, decoders, the mask token) is named, and left to `train --init_from`.
    Errors as :func:`import_files`, and those of `swin_files.fit` and `expert_shards.join`.
    """
    out, started = _empty(out), time.monotonic()
    hidden = {stage: int(model.embed_dims * 2**stage * model.mlp_ratio) for stage in range(len(model.depths))}
    experts = int(model.moe.get("experts", 0))
    tensors = expert_shards.join({file: tensor_files.open_tensors(file) for file in files}, experts, hidden)
    names, _ = swin_files.sensors_in(tensors, sensor)
    if unknown := [name for name in names if name not in bands]:
        raise ValueError(f"the configuration has no bands for {unknown}; give --bands {unknown[0]}=...")
    contract = sensors.input_contract({name: bands[name] for name in bands if name in names}, model.ratio)
    imported, found = torch_import.import_swin(tensors, sensor, model, contract, leave_out)
    cfg = config_dict.ConfigDict(model.to_dict())
    with cfg.unlocked():
        cfg.modules = found.modules
    _check_room(out, list(found.modules), imported.params)
    digests = {pathlib.Path(file).name: tensor_files.sha256(pathlib.Path(file)) for file in files}
    origins = {}
    for name in found.modules:
        checkpoint.save_part(out / embed.PARTS, name, {name: imported.params[name]})
        count = sum(leaf.size for leaf in jax.tree.leaves(imported.params[name]))
        origins[name] = {"files": digests, "parameters": count}
        print(f"{name}: {count:,} parameters", flush=True)
    whole = msgfm.module_names(model, {"sensors": bands})
    new = [name for name in whole if name not in found.modules]
    notes = [*found.notes, f"not in the files, new in a run that starts from here: {', '.join(new) or 'nothing'}"]
    origins[msgfm.ENCODER]["notes"] = notes
    for note in notes:
        print(f"  {note}", flush=True)
    print(f"from {', '.join(digests)} in {time.monotonic() - started:.1f} s", flush=True)
    _describe(out, cfg, contract, origins, licence)
    return out


def _empty(out: str | pathlib.Path) -> pathlib.Path:
    if (pathlib.Path(out) / embed.MODEL_FILE).exists():
        raise ValueError(f"{out} already holds imported weights; choose another folder")
    return pathlib.Path(out)


def _check_room(out: pathlib.Path, names: Sequence[str], shapes: Any) -> None:
    need = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(shapes))
    free = shutil.disk_usage(_existing(out)).free
    print(f"{', '.join(names)}: up to {need / 2**30:.2f} GiB on disk, {free / 2**30:.2f} GiB free", flush=True)
    if free < need:
        raise ValueError(f"{out}: {need / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free")


def _describe(
    out: pathlib.Path, cfg: Any, contract: Mapping[str, Any], origins: Mapping[str, Any], licence: str
) -> None:
    """Writes OUT/model.json, which makes the folder one of imported weights."""
    description = {
        "format": 1,
        "model_type": cfg.name,
        "architecture": json.loads(cfg.to_json()),
        "input_contract": contract,
        "provenance": {
            "source": "imported PyTorch weights",
            "parts": origins,
            "imported_with": __version__,
            "licence": licence,
        },
    }
    write_atomically(out / embed.MODEL_FILE, (json.dumps(description, indent=1) + "\n").encode())


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
    if "geo_context" in cfg:
        cfg.geo_context.bank = "frozen" if "geo" in parts else "none"
    if "geo" in parts:
        if len(shape := parts["geo"].tensors.shapes.get("prototypes", ())) == 3:
            cfg.geo_context.regions, cfg.geo_context.prototypes, cfg.geo_context.width = shape
        if "cells" in parts["geo"].tensors:
            hashed = regions.is_shared(parts["geo"].tensors["cells"])
            if hashed != (cfg.geo_context.table == "hashed"):
                cfg.geo_context.table = "hashed" if hashed else "stream"
        for name, edges in zip(("lon_edges", "lat_edges"), regions.grid_edges(cfg.geo_context.cell)):
            if name in parts["geo"].tensors and not np.array_equal(parts["geo"].tensors[name], edges):
                raise ValueError(
                    f"{parts['geo'].path}: the grid of its regions ({name}) is not the one of squares of "
                    f"model.geo_context.cell={cfg.geo_context.cell:g} metres; give --config with theirs"
                )
    held = [name for name in parts if name != released.CALENDAR]
    with cfg.unlocked():
        cfg.modules = tuple(held)
    if "fusion" not in held:
        cfg.calendar = "none"
    elif cfg.calendar != "none" and released.CALENDAR not in parts:
        raise ValueError(
            f"the fusion adds a calendar table (model.calendar={cfg.calendar!r}) and no file holds ctpe: "
            "the release keeps it in the file of the S2 encoder; --calendar none does without"
        )
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
