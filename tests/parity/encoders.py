"""Parity of the encoders: Swin-V2 and its block, the ViT, the resize of its position table (see tests.parity.command).

Each kind builds our module from the reference constructor's arguments, with what meta_json states for one input alone,
and returns every array it can under the file's names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.convert import keymap
from skysense_jax.convert.torch_import import fill
from skysense_jax.nn.attention import layer_norm
from skysense_jax.nn.position import resize_positions
from skysense_jax.nn.swin import SwinBlock, SwinTransformerV2
from skysense_jax.nn.vit import VisionTransformer
from tests.parity.case import (
    Arrays,
    Case,
    Variant,
    differentiate,
    eps_of,
    join,
    load,
    merged,
    nchw,
    nhwc,
    output_names,
    runs,
    take,
    with_class_rows,
    without_class_rows,
)

# ----------------------------------------------------------------------------------------------------------- Swin-V2
PADDING = {"pad": {"pad_small_map": True}, "nopad": {"pad_small_map": False}}
"""Word in a name -> the arguments of the run that made the array."""


def swinv2_block(case: Case) -> Arrays:
    """One block; `hw` is the map's height and width."""
    return merged(_swinv2_block(case, run, word) for v in case.variants() for word, run in runs(case, v, PADDING))


def _swinv2_block(case: Case, variant: Variant, word: str) -> Arrays:
    height, width = variant.settings.pop("hw", None) or case.setting("hw")
    a = take(
        case.arguments(variant),
        {},
        embed_dims=0,
        num_heads=0,
        window_size=8,
        shift=False,
        extra_norm=False,
        ffn_ratio=4,
        pad_small_map=False,
        pretrained_window_size=0,
    )
    pretrained = np.max(a["pretrained_window_size"]).item()
    block = SwinBlock(
        a["num_heads"], a["window_size"], a["shift"], a["ffn_ratio"], pretrained, a["pad_small_map"], dtype=case.dtype
    )
    norm = layer_norm(1e-5, "norm3")
    b, _, c = variant.x.shape
    image = (b, height, width, c)
    shapes = {"block": jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros(image)))["params"]}
    entries = keymap.swin_block_entries("", "block/")
    if a["extra_norm"]:
        shapes["norm3"] = {key: jax.ShapeDtypeStruct((c,), jnp.float32) for key in ("scale", "bias")}
        entries += [keymap.Entry("norm3.weight", "norm3/scale"), keymap.Entry("norm3.bias", "norm3/bias")]
    params = fill(case.weights, entries, shapes).params

    def run(p: Any, x: jax.Array) -> jax.Array:
        y = block.apply({"params": p["block"]}, x.reshape(image))
        y = norm.apply({"params": p["norm3"]}, y) if a["extra_norm"] else y
        return y.reshape(x.shape)

    x, name = jnp.asarray(variant.x), join(variant.name, word)
    g = case.cotangent(variant.name, word)
    if g is None:
        return {join("y", name): jax.jit(run)(params, x)}
    y, _, gradients, dx = differentiate(run, lambda y: jnp.sum(y * g), params, x, entries)
    return {join("y", name): y, join("dx", name): dx, join("dx", variant.name): dx} | gradients


ARCHITECTURES = {  # mmcls 0.25 SwinTransformerV2.arch_zoo: width, depths, heads, extra norm every
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 0),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 0),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 0),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48], 0),
    "huge": (352, [2, 2, 18, 2], [8, 16, 32, 64], 6),
    "giant": (512, [2, 2, 42, 4], [16, 32, 64, 128], 6),
}


def swin_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """The reference constructor's arguments as one flat dict with per-stage windows."""
    a = take(
        args,
        {
            "use_abs_pos_embed": False,
            "interpolate_mode": "bicubic",
            "patch_norm": True,
            "stage_cfgs": {},
            "patch_cfg": {},
        },
        arch="tiny",
        in_channels=3,
        patch_size=4,
        window_size=8,
        out_indices=(3,),
        pad_small_map=False,
        img_size=None,
        pretrained_window_sizes=None,
        norm_cfg=None,
    )
    arch = a["arch"]
    if isinstance(arch, str):
        width, depths, heads, every = ARCHITECTURES[arch]
        arch = {"embed_dims": width, "depths": depths, "num_heads": heads, "extra_norm_every_n_blocks": every}
    stages = len(arch["depths"])
    window = a["window_size"]
    return {
        "width": arch["embed_dims"],
        "patch": a["patch_size"],
        "depths": tuple(arch["depths"]),
        "heads": tuple(arch["num_heads"]),
        "windows": (window,) * stages if isinstance(window, int) else tuple(window),
        "pretrained_windows": tuple(a["pretrained_window_sizes"] or (0,) * stages),
        "extra_norm_every": arch.get("extra_norm_every_n_blocks", 0),
        "pad_small_map": a["pad_small_map"],
        "outputs": tuple(sorted(i % stages for i in a["out_indices"])),
        "eps": 1e-5,
        "channels": a["in_channels"],
    }


def swinv2(case: Case) -> Arrays:
    """The whole network: outputs `y_<input>_<stage>`."""
    return merged(_swinv2(case, run, word) for v in case.variants() for word, run in runs(case, v, PADDING))


def _swinv2(case: Case, variant: Variant, word: str) -> Arrays:
    a = swin_arguments(case.arguments(variant))
    channels = a.pop("channels")
    entries = keymap.swin_entries(a["depths"], a["extra_norm_every"], a["outputs"])
    module = SwinTransformerV2(**a, dtype=case.dtype)
    x, name = nhwc(variant.x), join(variant.name, word)
    params = load(module, entries, case.weights, (1, *x.shape[1:3], channels))
    names = output_names(case, name, a["outputs"])
    stored = {i: case.cotangent(output) for i, output in enumerate(names)}
    cotangents = {i: nhwc(g) for i, g in stored.items() if g is not None}

    def run(p: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        return module.apply({"params": p}, x)

    def weigh(maps: tuple[jax.Array, ...]) -> Any:
        return sum(jnp.sum(maps[i] * g) for i, g in cotangents.items())

    out: Arrays = {}
    if cotangents:
        maps, out[join("y64", "loss", name)], gradients, dx = differentiate(run, weigh, params, x, entries)
        out |= gradients | {join("dx", name): nchw(dx), join("dx", variant.name): nchw(dx)}
    else:
        maps = jax.jit(run)(params, x)
    return out | {join("y", output): nchw(m) for output, m in zip(names, maps, strict=True)}


# --------------------------------------------------------------------------------------------------------------- ViT
def vit_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    a = take(
        args,
        {
            "patch_norm": False,
            "final_norm": False,
            "qkv_bias": True,
            "interpolate_mode": "bicubic",
            "num_fcs": 2,
            "patch_pad": "corner",
            "patch_bias": True,
            "output_cls_token": False,
        },
        img_size=224,
        patch_size=16,
        in_channels=3,
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        mlp_ratio=4,
        out_indices=-1,
        norm_cfg=None,
        with_cls_token=True,
    )
    image = a["img_size"] if isinstance(a["img_size"], (list, tuple)) else (a["img_size"],) * 2
    outputs = (a["out_indices"],) if isinstance(a["out_indices"], int) else tuple(a["out_indices"])
    return {
        "width": a["embed_dims"],
        "patch": a["patch_size"],
        "depth": a["num_layers"],
        "heads": a["num_heads"],
        "table_grid": (image[0] // a["patch_size"], image[-1] // a["patch_size"]),
        "mlp_ratio": a["mlp_ratio"],
        "eps": eps_of(a["norm_cfg"]),
        "cls_token": a["with_cls_token"],
        "outputs": outputs,
    }


CLASS_TOKEN = {"cls": {"with_cls_token": True}, "nocls": {"with_cls_token": False}}
"""Word in a name -> the arguments of the run that made the array."""


def vit(case: Case) -> Arrays:
    """The ViT, for every input with the class token or without: as the outputs' names say, else as the arguments do."""
    parts = []
    for variant in case.variants():
        named = runs(case, variant, CLASS_TOKEN)
        # A cotangent without the word belongs to the last output of the released setting (no class token).
        weighed = "nocls" if "nocls" in dict(named) else named[-1][0]
        plain = case.cotangent(variant.name)
        parts += [_vit(case, run, word, plain if word == weighed else None) for word, run in named]
    return merged(parts)


def _vit(case: Case, variant: Variant, word: str, plain: np.ndarray | None) -> Arrays:
    a = vit_arguments(case.arguments(variant))
    weights, added = with_class_rows(case.weights, {"pos_embed": a["table_grid"]})
    if added and a["cls_token"]:
        raise ValueError(
            "pos_embed has no row for the class token, which with_cls_token=True needs; store 1 + h*w rows, or name "
            "the outputs nocls (with_cls_token false)"
        )
    module, entries = VisionTransformer(**a, dtype=case.dtype), keymap.vit_entries(a["depth"])
    x = nhwc(variant.x)
    params = load(module, entries, weights, x.shape)
    names = output_names(case, join(variant.name, word), [i % a["depth"] for i in a["outputs"]])
    stored = {i: case.cotangent(output) for i, output in enumerate(names)}
    if plain is not None:
        stored[len(names) - 1] = plain
    cotangents = {i: nhwc(g) for i, g in stored.items() if g is not None}

    def run(p: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        return module.apply({"params": p}, x)

    def weigh(maps: tuple[jax.Array, ...]) -> Any:
        return sum(jnp.sum(maps[i] * g) for i, g in cotangents.items())

    out: Arrays = {}
    if cotangents:
        maps, _, gradients, dx = differentiate(run, weigh, params, x, entries)
        out |= without_class_rows(gradients, added)
        out |= {key: nchw(dx) for key in (join("dx", variant.name), join("dx", variant.name, word))}
    else:
        maps = jax.jit(run)(params, x)
    return out | {join("y", output): nchw(m) for output, m in zip(names, maps, strict=True)}


def pos_resize(case: Case) -> Arrays:
    """The resize alone: `y_<table>_<height>x<width>` of the table `x_pos_embed_<table>`, or `x_pos_embed`.

    A table of 1 + h*w rows begins with the class token's, one of h*w rows has the grid alone (SkySense++); an output
    has that row or not, which its row count says.
    """
    if case.setting("mode", "bicubic") != "bicubic" or case.meta.get("align_corners"):
        raise ValueError("only the reference's bicubic resize with half-pixel centres is built")
    tables = {table_name(key.split("_")): jnp.asarray(x) for key, x in case.arrays.items() if key.startswith("x_")}
    out: Arrays = {}
    for key in case.has("y_"):
        words = key.split("_")[1:]
        sizes = [tuple(map(int, word.split("x"))) for word in words if re.fullmatch(r"\d+x\d+", word)]
        if len(sizes) != 1:
            raise ValueError(f"{key} names no size; an output's name is y_HEIGHTxWIDTH or y_TABLE_HEIGHTxWIDTH")
        table = table_name(words)
        stored = tables.get(table, tables.get(""))
        if stored is None:
            raise ValueError(f"{key} has no table: the file holds neither x_pos_embed nor x_pos_embed_{table}")
        out[key] = _resized(stored, table_grid(case, table, stored.shape[1]), sizes[0], case.arrays[key].shape[1])
    return out


def _resized(table: jax.Array, grid: tuple[int, int], size: tuple[int, int], rows: int) -> jax.Array:
    cells = size[0] * size[1]
    has_class_row = table.shape[1] == 1 + grid[0] * grid[1]
    if rows not in (cells, 1 + cells) or rows > cells and not has_class_row:
        raise ValueError(
            f"an output of {rows} rows is no resize to {size[0]}x{size[1]} of a table of {table.shape[1]} rows on a "
            f"{grid[0]}x{grid[1]} grid; store the grid's rows, and the class token's only where the table has it"
        )
    if not has_class_row:
        table = jnp.concatenate([jnp.zeros_like(table[:, :1]), table], axis=1)
    return resize_positions(table, grid, size)[:, 1 + cells - rows :]


def table_name(words: list[str]) -> str:
    """What an array's name calls its position table; "" for the only one."""
    return join(*(w for w in words if w not in ("x", "pos", "embed") and not re.fullmatch(r"\d+x\d+", w)))


def table_grid(case: Case, table: str, rows: int) -> tuple[int, int]:
    """The (rows, columns) of a table: the grid stated for it, or for all, that its row count fits; else a square.

    Raises:
        ValueError: where none fits.
    """
    of_table = case.meta.get(table) if table else None
    stated = [case.inputs.get(table, {}).get("grid"), of_table, case.meta.get("grid")]
    stated = [s.get("grid", s.get(table)) if isinstance(s, Mapping) else s for s in stated]
    for pair in stated:
        if isinstance(pair, (list, tuple)) and len(pair) == 2 and rows - pair[0] * pair[1] in (0, 1):
            return tuple(pair)
    for count in (rows - 1, rows):
        if count > 0 and math.isqrt(count) ** 2 == count:
            return (math.isqrt(count),) * 2
    raise ValueError(
        f"a position table of {rows} rows fits no stated grid {[s for s in stated if s]}, with or without a class row; "
        "write `grid`: [rows, columns] in meta_json, or in the settings of the table in its `inputs`"
    )
