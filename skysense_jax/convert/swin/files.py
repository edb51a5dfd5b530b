"""Files with the weights of a Swin-V1: SimMIM and GFM checkpoints, supervised (ImageNet) ones, Swin-MoE's, and our own
exports of msGFM. What is in them, and what has to be done to their tensors before they fit `models.msgfm`.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from skysense_jax.convert import keymap, released
from skysense_jax.convert.swin import bias_tables
from skysense_jax.convert.tensor_files import Tensors
from skysense_jax.models import msgfm
from skysense_jax.nn.attention import trunc_normal

DROPPED = (
    (r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask)", "recomputed from the sizes"),
    (r"(teacher|projector)\..*", "GFM's distillation alone needs them"),
    (r"head\.(weight|bias)", "the classifier of supervised training"),
    (r".*\._num_global_experts", "Tutel's count, which the experts' shapes say"),
)
"""(names, why) of what these files hold and a model here does not."""

TABLE = "attn.relative_position_bias_table"
COORDINATES = "relative_coords_table"
GATE_SEED = 0

Readers = dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]
"""name -> (shape, what reads the tensor)."""


class Found(NamedTuple):
    """tensors: those of the model, under the names of `entries`. modules: top-level parameters they make. new: those of
    the same sensors that they do not. notes: what was changed, left out or made new, one line each.
    """

    tensors: Tensors
    entries: list[keymap.Entry]
    modules: tuple[str, ...]
    new: tuple[str, ...]
    notes: tuple[str, ...]


def bare(tensors: Tensors) -> Tensors:
    """The tensors without what wrappers put in front of their names, `module.` and `model.`. Raises ValueError where
    two names become one.
    """
    names: dict[str, str] = {}
    for name in tensors:
        if (short := released.bare(name)) in names:
            raise ValueError(f"{names[short]} and {name} are both {short} once the prefixes are off")
        names[short] = name
    return tensors.renamed(names)


def sensors_in(tensors: Tensors, sensor: str | None) -> tuple[tuple[str, ...], bool]:
    """(sensors whose patch embeddings a file holds, whether it names them). One that does not, holds one: `sensor`,
    "hr" where that is None. Raises ValueError for a file without a patch embedding, and a `sensor` for one that names
    them.
    """
    tensors = bare(tensors)
    named = [found[1] for name in tensors if (found := re.match(r"encoder\.patch_embeds\.(\w+)\.proj\.weight$", name))]
    if named and sensor is not None:
        raise ValueError(f"--sensor {sensor}: the file itself says that its sensors are {', '.join(named)}")
    if named:
        return tuple(named), True
    if {"encoder.patch_embed.proj.weight", "patch_embed.proj.weight"} & tensors.keys():
        return (sensor or "hr",), False
    raise ValueError(
        "no Swin-V1 with a patch embedding in it (patch_embed.proj.weight, with encoder. before it in a "
        f"SimMIM checkpoint); the first tensors are {', '.join(list(tensors)[:5])}"
    )


def fit(
    tensors: Tensors, sensor: str | None, cfg: Any, contract: Mapping[str, Any], leave_out: Sequence[str] = ()
) -> Found:
    """The tensors of a file as those of `models.msgfm.make_model(cfg, contract)`.

    A mask token and decoders that the file does not have stay new; so does the gate where a block with experts gets
    them from an MLP (every expert is a copy of it). Bias tables of another window are resized. What else is missing or
    too much `torch_import.fill` refuses. leave_out: patterns of names that are not wanted. Raises ValueError where the
    file is of another architecture, naming tensor, shape and fix.
    """
    tensors = bare(tensors)
    sensors, named = sensors_in(tensors, sensor)
    for name in sensors:
        if name not in contract["sensors"]:
            raise ValueError(f"the model takes no {name!r}; its input contract has {', '.join(contract['sensors'])}")
    sensors = tuple(name for name in contract["sensors"] if name in sensors)
    prefix = "encoder." if named or "encoder.patch_embed.proj.weight" in tensors else ""
    optional = (msgfm.MASK_TOKEN, *(msgfm.DECODER.format(name) for name in sensors))
    modules = (msgfm.ENCODER, *(msgfm.EMBED.format(name) for name in sensors), *optional)
    entries = {module: keymap.msgfm_entries(cfg, [module]) for module in modules}
    if not named:
        entries = {
            module: [e._replace(torch=own_name(e.torch, sensors[0], prefix)) for e in of]
            for module, of in entries.items()
        }
    readers, notes = kept(tensors, leave_out)
    check(readers, prefix, cfg)
    check_bands(readers, entries, cfg, contract)
    trained = {name: (shape[1] + 1) // 2 for name, shape in tensors.shapes.items() if name.endswith(COORDINATES)}
    notes += with_tables(readers, prefix, trained, cfg) + with_experts(readers, prefix, cfg)
    new = tuple(module for module in optional if not any(e.torch in readers for e in entries[module]))
    held = tuple(module for module in modules if module not in new)
    found = Tensors({name: shape for name, (shape, _) in readers.items()}, lambda name: readers[name][1]())
    return Found(found, [entry for module in held for entry in entries[module]], held, new, tuple(notes))


def own_name(torch: str, sensor: str, prefix: str) -> str:
    """The name of a tensor in a file of one sensor whose encoder has this prefix."""
    torch = keymap.one_sensor(torch, sensor)
    return torch if prefix else torch.removeprefix("encoder.")


def kept(tensors: Tensors, leave_out: Sequence[str]) -> tuple[Readers, list[str]]:
    """The tensors no rule leaves out, and a note for every rule that did. Tutel's older spelling `gate.` is brought to
    `gates.0.`.
    """
    rules = [*DROPPED, *((fnmatch.translate(pattern), f"asked by --leave-out {pattern}") for pattern in leave_out)]
    readers: Readers = {}
    dropped: dict[str, list[str]] = {}
    for name, shape in tensors.shapes.items():
        why = next((why for pattern, why in rules if re.fullmatch(pattern, name)), None)
        if why is None:
            ours = name.replace("_moe_layer.gate.wg.", "_moe_layer.gates.0.wg.")
            readers[ours] = (shape, functools.partial(tensors.__getitem__, name))
        else:
            dropped.setdefault(why, []).append(name)
    return readers, [
        f"{len(names)} tensors left out, {why}: {names[0]}{', ...' if len(names) > 1 else ''}"
        for why, names in dropped.items()
    ]


def check(readers: Readers, prefix: str, cfg: Any) -> None:
    """Raises ValueError, with every contradiction, unless the file's sizes are those of config.model."""
    wrong: list[str] = []

    def compare(name: str, field: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            wrong.append(f"{name} {readers[name][0]}: the file has model.{field} = {found}, the configuration {wanted}")

    blocks: dict[int, dict[int, list[str]]] = {}
    for name in readers:
        if found := re.match(re.escape(prefix) + r"layers\.(\d+)\.blocks\.(\d+)\.", name):
            blocks.setdefault(int(found[1]), {}).setdefault(int(found[2]), []).append(name)
    if blocks:
        depths = tuple(max(blocks.get(stage, {-1: []})) + 1 for stage in range(max(blocks) + 1))
        stage = next((s for s in blocks if s >= len(cfg.depths) or depths[s] != cfg.depths[s]), max(blocks))
        compare(blocks[stage][depths[stage] - 1][0], "depths", depths, tuple(cfg.depths))
    for name, (shape, _) in readers.items():
        short, stage = name.removeprefix(prefix), int((re.search(r"layers\.(\d+)\.", name) or [0, 0])[1])
        width = cfg.embed_dims * 2**stage
        if re.fullmatch(r"patch_embeds?(\.\w+)?\.proj\.weight", short) and len(shape) == 4:
            compare(name, "embed_dims", shape[0], cfg.embed_dims)
            compare(name, "patch", shape[2], cfg.patch)
        elif short.endswith(TABLE) and len(shape) == 2:
            compare(name, f"num_heads[{stage}]", shape[1], cfg.num_heads[stage] if stage < len(cfg.depths) else None)
        elif short.endswith("mlp.fc1.weight") and shape[-1:] == (width,):
            compare(name, "mlp_ratio", shape[0] / width, cfg.mlp_ratio)
        elif short.endswith(f"{keymap.EXPERTS}experts.batched_fc1_w"):
            if stage not in cfg.moe.stages:
                wrong.append(
                    f"{name} {shape}: the file has experts in stage {stage}, model.moe.stages = "
                    f"{tuple(cfg.moe.stages)} has none there"
                )
            else:
                compare(name, "moe.experts", shape[0], cfg.moe.experts)
    if wrong:
        raise ValueError(
            f"the file is of another architecture ({len(wrong)} contradictions); give a --config with its "
            "sizes:\n  " + "\n  ".join(wrong[:20])
        )


def check_bands(readers: Readers, entries: Mapping[str, Sequence[keymap.Entry]], cfg: Any, contract: Any) -> None:
    """Raises ValueError where a patch embedding does not take as many bands as the contract says of its sensor."""
    for sensor, rule in contract["sensors"].items():
        kernel = next((e.torch for e in entries.get(msgfm.EMBED.format(sensor), ()) if e.kind == "conv"), "")
        shape = readers[kernel][0] if kernel in readers else ()
        if len(shape) == 4 and shape[1] != len(rule["bands"]):
            raise ValueError(
                f"{kernel} {shape} takes {shape[1]} bands, {sensor} has {', '.join(rule['bands'])}; choose the sensor "
                f"with --sensor, or its bands in the order of the kernel with --bands {sensor}=..."
            )


def with_tables(readers: Readers, prefix: str, trained: Mapping[str, int], cfg: Any) -> list[str]:
    """Brings the bias tables to the model's windows, in place: computed where the file has Swin-MoE's network for them,
    resized where it has a table of another window. trained: buffer of coordinates -> window it was made for. Returns
    the notes.
    """
    resized, computed = [], []
    for stage, window in enumerate(msgfm.stage_windows(cfg)):
        rows, heads = (2 * window - 1) ** 2, cfg.num_heads[stage]
        for block in range(cfg.depths[stage]):
            attn = f"{prefix}layers.{stage}.blocks.{block}.attn."
            name = f"{attn}relative_position_bias_table"
            network = [f"{attn}cpb_mlp.{key}" for key in ("0.weight", "0.bias", "2.weight")]
            if name in readers:
                shape, read = readers[name]
                if len(shape) == 2 and shape[0] != rows and bias_tables.window_of(shape[0]) is not None:
                    readers[name] = (
                        (rows, heads),
                        lambda read=read, window=window: bias_tables.resized(read(), window),
                    )
                    resized.append(f"{shape[0]} to {rows}")
            elif all(key in readers for key in network):
                reads = [readers.pop(key)[1] for key in network]
                readers[name] = (
                    (rows, heads),
                    lambda reads=reads, attn=attn, window=window: bias_tables.from_network(
                        *(read() for read in reads), window, trained.get(attn + COORDINATES, window)
                    ),
                )
                computed.append(name)
    notes = [f"{resized.count(change)} bias tables resized from {change} rows" for change in dict.fromkeys(resized)]
    return notes + ([f"{len(computed)} bias tables computed by the file's cpb_mlp"] if computed else [])


def with_experts(readers: Readers, prefix: str, cfg: Any) -> list[str]:
    """What blocks with experts need where the file has an MLP there: every expert a copy of it ("upcycling"), a new
    gate. And the bias of the second layer, zeros where no MLP of the file has one, as in Swin-MoE. In place; returns
    the notes.
    """
    notes, made = [], []
    dense = [name for name in readers if name.endswith("mlp.fc2.weight")]
    if dense and not any(name.endswith("mlp.fc2.bias") for name in readers):
        for name in dense:
            width = readers[name][0][0]
            readers[name.removesuffix("weight") + "bias"] = ((width,), functools.partial(np.zeros, width, np.float32))
        notes.append(f"{len(dense)} biases of second layers (mlp.fc2.bias) are zeros: no MLP of the file has one")
    for stage in cfg.moe.stages:
        for block in range(1, cfg.depths[stage], 2):
            torch = f"{prefix}layers.{stage}.blocks.{block}."
            if f"{torch}mlp.fc1.weight" in readers:
                upcycle(readers, torch, int(cfg.moe.experts), jax.random.fold_in(jax.random.key(GATE_SEED), len(made)))
                made.append(f"{torch}{keymap.EXPERTS}gates.0.wg.weight")
    if made:
        notes.append(
            f"{len(made)} blocks have an MLP in the file and experts in the model: every expert is a copy; "
            f"new gates (truncated normal, 0.02, seed {GATE_SEED}): {made[0]}{', ...' if made[1:] else ''}"
        )
    return notes


def upcycle(readers: Readers, torch: str, experts: int, key: jax.Array) -> None:
    """The MLP of a block in Tutel's names and layout, once per expert, and a gate drawn from the key; in place."""
    mlp = {
        part: readers.pop(f"{torch}mlp.{part}")
        for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        if f"{torch}mlp.{part}" in readers
    }
    width = mlp["fc1.weight"][0][-1]

    def copies(part: str, transposed: bool) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
        shape, read = mlp[part]
        turn = (lambda: read().T) if transposed else read
        shape = (experts, *(shape[::-1] if transposed else shape))
        return shape, lambda: np.broadcast_to(turn(), shape)

    layer = f"{torch}{keymap.EXPERTS}"
    for part, name, transposed in (
        ("fc1.weight", "fc1_w", False),
        ("fc1.bias", "fc1_bias", False),
        ("fc2.weight", "fc2_w", True),
        ("fc2.bias", "fc2_bias", False),
    ):
        if part in mlp:
            readers[f"{layer}experts.batched_{name}"] = copies(part, transposed)
    readers[f"{layer}gates.0.wg.weight"] = (
        (experts, width),
        lambda: np.asarray(trunc_normal(key, (experts, width), np.float32)),
    )
