"""Files as the SkySense and SkySense++ releases hold them.

This file says which module is in which file, and changes tensors where they do not fit the model. It reads nothing but
names, shapes and the tensors that change.
"""

from __future__ import annotations

import fnmatch
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from skysense_jax.convert import keymap
from skysense_jax.convert.tensor_files import Tensors
from skysense_jax.models.skysense import HEADS, SWIN
from skysense_jax.sensors import SKYSENSE_BANDS

OUTER_PREFIXES = ("module.", "model.")
MODULE_PREFIXES = {
    "hr": ("backbone_gep.", "backbone_hr.", "visual.", "backbone."),
    "s2": ("backbone_s2.", "backbone."),
    "s1": ("backbone_s1.", "backbone."),
    "fusion": ("fusion.", "backbone."),
    "head_s2": ("head_s2.", "backbone."),
    "head_s1": ("head_s1.", "backbone."),
    "geo": ("glbank.", "backbone."),
}
"""Prefixes the tensors of a module may carry, as they are tried (SkySense ckpt_convert, README, SkySense-O)."""

DROPPED = ("head_gep*",)
"""Tensors of the full checkpoint that the release's own converter drops."""

CALENDAR = "ctpe"

UNUSED = ("mask_token", CALENDAR)
"""Tensors a released encoder file carries beside the encoder's own: the first is left out, and reported."""

IN_CONTEXT = ("vocabulary_token", "vocabulary_weight", "attn[123].*", "norm_attn.*")
"""SkySense++: tokens and global attention of its in-context stage, which the encoders here do not have."""


class Part(NamedTuple):
    """One module in a file.

    Attributes:
        path: the file.
        tensors: under the module's official names, without prefix.
        notes: what was changed or left out.
    """

    path: pathlib.Path
    tensors: Tensors
    notes: tuple[str, ...]


def bare(name: str) -> str:
    """A name without the wrappers' prefixes `module.` and `model.`."""
    for prefix in OUTER_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def official_names(names: Sequence[str], module: str) -> dict[str, str]:
    """Translates the names of a single-module file to the module's official ones.

    The prefixes go (`module.`, `model.`, then the first of MODULE_PREFIXES that occurs), and the fused-attention
    builds' `Wqkv` names become in_proj.

    Args:
        names: in the file.
        module: which the file holds.

    Returns:
        {official name: name in the file}.

    Raises:
        ValueError: two names become one.
    """
    prefixes = MODULE_PREFIXES.get(module, ())
    prefix = next((p for p in prefixes if any(bare(name).startswith(p) for name in names)), "")
    official: dict[str, str] = {}
    for name in names:
        short = bare(name).removeprefix(prefix)
        short = short.replace(".Wqkv.weight", ".in_proj_weight").replace(".Wqkv.bias", ".in_proj_bias")
        if short in official:
            raise ValueError(f"{official[short]} and {name} are both {short} once the prefixes are off")
        official[short] = name
    return official


def modules_in(
    path: pathlib.Path, tensors: Tensors, told: str | None = None, leave_out: Sequence[str] = ()
) -> dict[str, Part]:
    """Finds the modules of a file.

    A file with the prefixes of several modules is a whole checkpoint, any other one module, recognised by its prefix or
    its tensors; UP heads without a prefix look alike and are told apart by the file's name, or by `told`.

    Args:
        path: of the file, for errors, notes and the names of UP heads.
        tensors: in it.
        told: the module it holds, as the user says; None = recognise it.
        leave_out: patterns of names in a whole checkpoint that belong to no module and are to be dropped.

    Returns:
        {"hr", "s2", "s1", "head_s2", "head_s1", "fusion", "geo", "ctpe": Part}, those that the file holds.

    Raises:
        ValueError: a name belongs to no module, or the module cannot be told.
    """
    groups: dict[str, list[str]] = {}
    for name in tensors:
        prefixed = (m for m in keymap.PREFIXES for p in MODULE_PREFIXES[m][:-1] if bare(name).startswith(p))
        groups.setdefault(next(prefixed, ""), []).append(name)
    stray = groups.pop("", [])
    dropped: list[str] = []
    if told is not None or len(groups) < 2:  # one module
        groups, stray = {told or next(iter(groups), "") or _single(path, tensors): list(tensors)}, []
    patterns = (*DROPPED, *leave_out)
    for name in stray:
        if bare(name) == CALENDAR:
            groups[CALENDAR] = [name]
        elif any(fnmatch.fnmatch(bare(name), pattern) for pattern in patterns):
            dropped.append(name)
    if unknown := [name for name in stray if name not in dropped and bare(name) != CALENDAR]:
        raise ValueError(
            f"{path}: {len(unknown)} tensors belong to no module of SkySense: {', '.join(unknown[:10])}; "
            "--leave-out PATTERN leaves them out"
        )
    parts: dict[str, Part] = {}
    for module, names in groups.items():
        official = official_names(names, module)
        if CALENDAR in official:
            parts[CALENDAR] = Part(path, tensors.renamed({CALENDAR: official[CALENDAR]}), ())
        if module != CALENDAR:
            notes = tuple(f"{name} left out: not part of the encoder" for name in official if name == "mask_token")
            parts[module] = Part(path, tensors.renamed({k: v for k, v in official.items() if k not in UNUSED}), notes)
    if dropped:
        first = next(iter(parts))
        note = f"{len(dropped)} tensors of the file that fit {', '.join(patterns)} left out"
        parts[first] = parts[first]._replace(notes=(*parts[first].notes, note))
    return parts


def _single(path: pathlib.Path, tensors: Tensors) -> str:
    """The module of a file without a prefix that tells it, by tensors only that module has."""
    names = {module: official_names(list(tensors), module) for module in keymap.PREFIXES}
    if any(name.endswith("attn.w_msa.logit_scale") for name in names["hr"]):
        return "hr"
    if "porj_linear.weight" in names["fusion"]:
        return "fusion"
    if "prototypes" in names["geo"] and "cells" in names["geo"]:
        return "geo"
    if "pos_embed" in names["s2"] and "patch_embed.projection.weight" in names["s2"]:
        return "s1" if tensors.shapes[names["s2"]["patch_embed.projection.weight"]][1] == 2 else "s2"
    if "decoder.0.weight" in names["head_s2"]:
        told = [sensor for sensor in ("s2", "s1") if sensor in path.stem.lower()]
        if len(told) == 1:
            return f"head_{told[0]}"
        raise ValueError(
            f"{path} is an UP head, of S2 or S1 its tensors do not say; write head_s2={path} or head_s1={path}"
        )
    raise ValueError(
        f"{path} holds no module of SkySense that can be recognised; its first tensors are "
        f"{', '.join(list(tensors)[:5])}. Write MODULE={path} "
        f"with MODULE one of {', '.join(keymap.PREFIXES)}"
    )


def without(part: Part, patterns: Sequence[str]) -> Part:
    """Drops the tensors of a part whose names fit a pattern; a note says so.

    Args:
        part: a module of a file.
        patterns: of names, as the shell has them.

    Returns:
        The part without them.

    Raises:
        ValueError: it has SkySense++'s in-context tensors, and no pattern names them.
    """
    gone = [name for name in part.tensors if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    left = [name for name in part.tensors if name not in gone]
    if extra := [name for name in left if any(fnmatch.fnmatch(name, pattern) for pattern in IN_CONTEXT)]:
        asked = sorted({name.split(".")[0] for name in extra})
        raise ValueError(
            f"{part.path}: {', '.join(asked)} belong to SkySense++'s in-context stage. The encoders here do not have "
            "it (its global attention changes the HR maps); "
            + " ".join(f"--leave-out '{name}*'" for name in asked)
            + " imports the encoder without it"
        )
    note = (f"left out as asked: {len(gone)} tensors, {', '.join(gone[:5])}",) if gone else ()
    return Part(part.path, part.tensors.renamed({name: name for name in left}), part.notes + note)


def table_side(part: Part, module: str) -> int | None:
    """The tokens along a side of a ViT's position table.

    Args:
        part: a module of a file.
        module: its name.

    Returns:
        The side; None for modules that are no ViT.

    Raises:
        ValueError: the table is no square grid.
    """
    if module not in HEADS or "pos_embed" not in part.tensors.shapes:
        return None
    rows = part.tensors.shapes["pos_embed"][1]
    for count in (rows - 1, rows):
        if count > 0 and math.isqrt(count) ** 2 == count:
            return math.isqrt(count)
    raise ValueError(f"{part.path}: a position table of {rows} rows is no square grid, with or without a class row")


def with_class_row(part: Part, side: int, cls_token: bool) -> Part:
    """Gives a ViT's position table the row of the class token: SkySense++ stores the grid's rows alone.

    Args:
        part: a ViT.
        side: tokens along a side of its table.
        cls_token: whether the model reads that row.

    Returns:
        The part, with a row of zeros in front where it had none.

    Raises:
        ValueError: it has no such row, and the model reads it.
    """
    _, rows, width = part.tensors.shapes.get("pos_embed", (1, 1 + side * side, 0))  # an absent one is named later
    if rows == 1 + side * side:
        return part
    if cls_token:
        raise ValueError(f"{part.path}: its position table has no row for the class token, model.cls_token needs one")
    return Part(
        part.path,
        part.tensors.changed("pos_embed", (1, rows + 1, width), _add_class_row),
        part.notes + ("pos_embed has no row for the class token: zeros, which nothing reads",),
    )


def _add_class_row(table: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)


def for_bands(part: Part, module: str, bands: Sequence[str]) -> Part:
    """Makes the patch kernel for these bands, by the rules of the reference code, where they are not the release's.

    HR with NIR: the red slice again, as a fourth one, unscaled (SkySense ckpt_convert, `rgbnir`). Fewer or reordered
    bands of S2 or S1: their slices, times stored / asked for (SkySense++ load_pretrained). A kernel that already has as
    many slices as there are other bands is taken as it is.

    Args:
        part: a module of a file.
        module: its name.
        bands: of the model, in its order.

    Returns:
        The part, with the kernel for these bands.

    Raises:
        ValueError: no rule makes such a kernel.
    """
    key, stored = "patch_embed.projection.weight", SKYSENSE_BANDS.get(module)
    if stored is None or tuple(bands) == stored or key not in part.tensors.shapes:
        return part
    shape = part.tensors.shapes[key]
    if shape[1] == len(bands) != len(stored):
        return part
    if module == SWIN and tuple(bands) == (*stored, "NIR"):
        index, factor = [0, 1, 2, 0], 1.0
    elif set(bands) <= set(stored) and (module != SWIN or len(bands) == len(stored)):
        index, factor = [stored.index(band) for band in bands], len(stored) / len(bands)
    else:
        raise ValueError(f"{part.path}: no rule makes a kernel for {module} bands {list(bands)} from {list(stored)}")
    note = f"patch kernel for {', '.join(bands)}: slices {index} of the stored ones, times {factor:g}"
    new_shape = (shape[0], len(index), *shape[2:])
    return Part(
        part.path,
        part.tensors.changed(key, new_shape, lambda kernel: kernel[:, index] * np.float32(factor)),
        part.notes + (note,),
    )


def gather(files: Mapping[str, tuple[str | None, Tensors]], leave_out: Sequence[str] = ()) -> dict[str, Part]:
    """Puts the modules of several files together.

    Args:
        files: path -> (the module it is told to hold, or None; its tensors).
        leave_out: patterns, as :func:`modules_in` and :func:`without`.

    Returns:
        Name of a module -> its part.

    Raises:
        ValueError: two files hold the same module, or two calendar tables that differ.
    """
    parts: dict[str, Part] = {}
    for path, (told, tensors) in files.items():
        for module, part in modules_in(pathlib.Path(path), tensors, told, leave_out).items():
            if module not in parts:
                parts[module] = without(part, leave_out)
            elif module != CALENDAR:
                raise ValueError(f"{parts[module].path} and {path} both hold {module}")
            elif not np.array_equal(parts[module].tensors[CALENDAR], part.tensors[CALENDAR]):
                raise ValueError(f"{parts[module].path} and {path} hold calendar tables (ctpe) that differ")
    return parts
