"""Folders of imported weights: written module by module from PyTorch files, then described and read.

OUT/parts/<module>/ is one Orbax checkpoint per module, each with digests; OUT/model.json, written last, says what the
model is (architecture, input contract) and where every module comes from. Of SkySense, a single module is in memory at
a time.
"""

from __future__ import annotations

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

from skysense_jax import __version__, sensors
from skysense_jax.convert import exported, keymap, released, tensor_files, torch_import
from skysense_jax.convert.swin import expert_shards
from skysense_jax.convert.swin import files as swin_files
from skysense_jax.core import trees
from skysense_jax.core.files import write_atomically
from skysense_jax.models import msgfm
from skysense_jax.models.description import Description, Reader
from skysense_jax.models.skysense import SWIN, param_shapes
from skysense_jax.ops import regions
from skysense_jax.run.stored import sealed

DESCRIPTION, PARTS = "model.json", "parts"
"""Description and folder of modules of imported weights."""

LICENCE = "non-commercial research, inherited from the released SkySense weights"
SWIN_LICENCE = "that of the imported files, which do not state it"
"""Licences that exports carry where the user names none: of SkySense's files, of a Swin-V1's."""


def import_files(
    files: Sequence[str],
    model: config_dict.ConfigDict,
    bands: Mapping[str, Sequence[str]],
    out: str | pathlib.Path,
    leave_out: Sequence[str] = (),
    licence: str = LICENCE,
) -> pathlib.Path:
    """Imports released files of SkySense or SkySense++.

    Args:
        files: paths, or "MODULE=PATH".
        model: config.model of the whole architecture; what no file holds is left out of it (`model.modules`).
        bands: sensor -> bands in the model's order.
        out: folder to write.
        leave_out: patterns of tensors that are not imported.
        licence: of the files; every export of them carries it on.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file cannot be read safely, a tensor is missing, unknown or misshapen, the modules do not make a
            model, the disk has no room, or `out` holds weights already.
    """
    out = _empty(out)
    modules = released.gather(dict(_open(file) for file in files), leave_out)
    cfg, contract = architecture_of(modules, model, bands)
    shapes = param_shapes(cfg, contract)
    used = [name for name in modules if name in shapes]
    unused = {name: module.path.name for name, module in modules.items() if name not in used}
    _check_room(out, used, shapes)
    origins = {}
    for name in used:
        module, started = _fitted(modules.pop(name), name, cfg, contract), time.monotonic()
        imported = torch_import.import_module(module.tensors, name, cfg, contract)
        path = module.path
        notes = [*module.notes, *(f"{key} absent in the file: {_default(key)}" for key in imported.filled)]
        del module  # the file is mapped as long as a module of it lives, and its pages count as this process's
        sealed.write_tree(out / PARTS, name, {name: imported.params})
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
    _write_description(out, cfg, contract, origins, licence)
    return out


def import_swin(
    files: Sequence[str],
    model: config_dict.ConfigDict,
    bands: Mapping[str, Sequence[str]],
    sensor: str | None,
    out: str | pathlib.Path,
    leave_out: Sequence[str] = (),
    licence: str = SWIN_LICENCE,
) -> pathlib.Path:
    """Imports the weights of a Swin-V1 as those of msGFM.

    What the model has beyond the files (other sensors, decoders, the mask token) is named, and left to `train
    --init_from`.

    Args:
        files: a single file, or those of Swin-MoE's processes.
        model: config.model of the whole architecture.
        bands: sensor -> bands in the model's order.
        sensor: whose patch embedding and decoder a file of a single sensor holds; None: "hr".
        out: folder to write.
        leave_out: patterns of tensors that are not imported.
        licence: of the files; every export of them carries it on.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: as :func:`import_files`.
        ValueError: as :func:`import_files`, `swin_files.fit` and `expert_shards.join`; the bands of a sensor of the
            files are not known.
    """
    out, started = _empty(out), time.monotonic()
    hidden = {stage: int(model.embed_dims * 2**stage * model.mlp_ratio) for stage in range(len(model.depths))}
    experts = int(model.moe.get("experts", 0))
    tensors = expert_shards.join({file: tensor_files.open_tensors(file) for file in files}, experts, hidden)
    names, _ = swin_files.sensors_in(tensors, sensor)
    if unknown := [name for name in names if name not in bands]:
        raise ValueError(f"the configuration has no bands for {unknown}; give --bands {unknown[0]}=...")
    contract = sensors.input_contract({name: bands[name] for name in bands if name in names}, model.ratio)
    imported, translated = torch_import.import_swin(tensors, sensor, model, contract, leave_out)
    cfg = config_dict.ConfigDict(model.to_dict())
    with cfg.unlocked():
        cfg.modules = translated.modules
    _check_room(out, list(translated.modules), imported.params)
    digests = {pathlib.Path(file).name: tensor_files.sha256(pathlib.Path(file)) for file in files}
    origins = {}
    for name in translated.modules:
        sealed.write_tree(out / PARTS, name, {name: imported.params[name]})
        count = sum(leaf.size for leaf in jax.tree.leaves(imported.params[name]))
        origins[name] = {"files": digests, "parameters": count}
        print(f"{name}: {count:,} parameters", flush=True)
    whole = msgfm.module_names(model, {"sensors": bands})
    new = [name for name in whole if name not in translated.modules]
    notes = [*translated.notes, f"not in the files, new in a run that starts from here: {', '.join(new) or 'nothing'}"]
    origins[msgfm.ENCODER]["notes"] = notes
    for note in notes:
        print(f"  {note}", flush=True)
    print(f"from {', '.join(digests)} in {time.monotonic() - started:.1f} s", flush=True)
    _write_description(out, cfg, contract, origins, licence)
    return out


def _empty(out: str | pathlib.Path) -> pathlib.Path:
    """The folder to write, which must not hold imported weights yet."""
    if (pathlib.Path(out) / DESCRIPTION).exists():
        raise ValueError(f"{out} already holds imported weights; choose another folder")
    return pathlib.Path(out)


def _check_room(out: pathlib.Path, names: Sequence[str], shapes: trees.Tree) -> None:
    """Refuses a disk without room for the modules as float32."""
    need = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(shapes))
    free = shutil.disk_usage(_existing(out)).free
    print(f"{', '.join(names)}: up to {need / 2**30:.2f} GiB on disk, {free / 2**30:.2f} GiB free", flush=True)
    if free < need:
        raise ValueError(f"{out}: {need / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free")


def _write_description(
    out: pathlib.Path, cfg: config_dict.ConfigDict, contract: sensors.Contract, origins: Mapping[str, Any], licence: str
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
    write_atomically(out / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())


def architecture_of(
    modules: Mapping[str, released.Part], model: config_dict.ConfigDict, bands: Mapping[str, Sequence[str]]
) -> tuple[config_dict.ConfigDict, sensors.Contract]:
    """The model that imported modules make.

    Args:
        modules: name of a module -> its tensors and the file they come from.
        model: config.model of the whole architecture.
        bands: sensor -> bands in the model's order.

    Returns:
        (config.model, input contract) of the model with these modules.

    Raises:
        ValueError: an UP head or the fusion lacks the modules it needs, or the modules contradict the configuration.
    """
    cfg = config_dict.ConfigDict(model.to_dict())
    encoders = [name for name in sensors.SKYSENSE_BANDS if name in modules]
    if not encoders:
        raise ValueError(f"no encoder among the modules found ({', '.join(modules)}); a model needs hr, s2 or s1")
    if unknown := [name for name in encoders if name not in bands]:
        raise ValueError(f"the configuration has no bands for {unknown}; give --bands {unknown[0]}=...")
    for name in encoders:
        side = released.table_side(modules[name], name)
        if side is not None:
            cfg[name].img_size = side * cfg[name].patch
    contract = sensors.input_contract({name: bands[name] for name in encoders}, cfg.ratio)
    if "geo" in modules and "geo_context" not in cfg:
        raise ValueError(f"{modules['geo'].path} holds a prototype bank, the configuration has no model.geo_context")
    if "geo_context" in cfg:
        cfg.geo_context.bank = "frozen" if "geo" in modules else "none"
    if "geo" in modules:
        if len(shape := modules["geo"].tensors.shapes.get("prototypes", ())) == 3:
            cfg.geo_context.regions, cfg.geo_context.prototypes, cfg.geo_context.width = shape
        if "cells" in modules["geo"].tensors:
            hashed = regions.is_shared(modules["geo"].tensors["cells"])
            if hashed != (cfg.geo_context.table == "hashed"):
                cfg.geo_context.table = "hashed" if hashed else "stream"
        for name, edges in zip(("lon_edges", "lat_edges"), regions.grid_edges(cfg.geo_context.cell), strict=True):
            if name in modules["geo"].tensors and not np.array_equal(modules["geo"].tensors[name], edges):
                raise ValueError(
                    f"{modules['geo'].path}: the grid of its regions ({name}) is not the one of squares of "
                    f"model.geo_context.cell={cfg.geo_context.cell:g} metres; give --config with theirs"
                )
    names = tuple(name for name in modules if name != released.CALENDAR)
    with cfg.unlocked():
        cfg.modules = names
    if "fusion" not in names:
        cfg.calendar = "none"
    elif cfg.calendar != "none" and released.CALENDAR not in modules:
        raise ValueError(
            f"the fusion adds a calendar table (model.calendar={cfg.calendar!r}) and no file holds ctpe: "
            "the release keeps it in the file of the S2 encoder; --calendar none does without"
        )
    return cfg, contract


def _open(option: str) -> tuple[str, tuple[str | None, tensor_files.Tensors]]:
    """(path, (module or None, its tensors)) of a file as the command line names it."""
    module, equals, path = option.partition("=")
    if not equals or module not in keymap.PREFIXES:
        module, path = "", option
    return path, (module or None, tensor_files.open_tensors(path))


def _fitted(part: released.Part, name: str, cfg: config_dict.ConfigDict, contract: sensors.Contract) -> released.Part:
    """A module with the bands and the class row that the model expects."""
    if name not in contract["sensors"]:
        return part
    part = released.for_bands(part, name, contract["sensors"][name]["bands"])
    if name == SWIN:
        return part
    return released.with_class_row(part, cfg[name].img_size // cfg[name].patch, cfg[name].cls_token)


def _default(key: str) -> str:
    """What a tensor that the file lacks is filled with."""
    return "ones" if key.endswith(".weight") else "zeros"


def _existing(path: pathlib.Path) -> pathlib.Path:
    """The nearest folder of a path that exists."""
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


def recognise(folder: pathlib.Path) -> bool:
    """Whether a folder holds imported weights."""
    return (folder / DESCRIPTION).is_file()


def describe(folder: pathlib.Path) -> Description:
    """The description of imported weights, in a bucket too. Errors as `exported.read_description`."""
    return exported.read_description("imported", folder, DESCRIPTION)


def _describe_local(folder: pathlib.Path) -> Description:
    exported.refuse_bucket(folder)
    return describe(folder)


def weights(description: Description) -> trees.Tree:
    """The parameters of imported weights by module; errors as `run.stored.sealed.read_tree`."""
    tree: dict[str, Any] = {}
    for name in description.provenance["parts"]:
        tree |= sealed.read_tree(description.path / PARTS, name)
    return tree


READER = Reader("imported", f"imported weights have {DESCRIPTION} and {PARTS}/", recognise, _describe_local, weights)
