"""Files with the weights of a Swin-V1, as parts of `models.msgfm`.

These are SimMIM and GFM checkpoints, supervised (ImageNet) ones, Swin-MoE's, and exports of msGFM. This file says what
is in them, and changes tensors where they do not fit the model.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax.convert import keymap, released
from skysense_jax.convert.swin import bias_tables
from skysense_jax.convert.tensor_files import Tensors
from skysense_jax.models import msgfm
from skysense_jax.nn.attention import trunc_normal
from skysense_jax.sensors import Contract, sensor_rule

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

Read = Callable[[], np.ndarray]
Readers = dict[str, tuple[tuple[int, ...], Read]]
"""name -> (shape, what reads the tensor)."""


class Found(NamedTuple):
    """What a file gives the model.

    Attributes:
        tensors: those of the model, under the names of `entries`.
        entries: one per tensor.
        modules: top-level parameters that they make.
        new: those of the same sensors that they do not.
        notes: what was changed, left out or made new, one line each.
    """

    tensors: Tensors
    entries: list[keymap.Entry]
    modules: tuple[str, ...]
    new: tuple[str, ...]
    notes: tuple[str, ...]


def bare(tensors: Tensors) -> Tensors:
    """The tensors without what wrappers put in front of their names, `module.` and `model.`.

    Args:
        tensors: in a file.

    Returns:
        The same ones.

    Raises:
        ValueError: two names become one.
    """
    names: dict[str, str] = {}
    for name in tensors:
        if (short := released.bare(name)) in names:
            raise ValueError(f"{names[short]} and {name} are both {short} once the prefixes are off")
        names[short] = name
    return tensors.renamed(names)


def sensors_in(tensors: Tensors, sensor: str | None) -> tuple[tuple[str, ...], bool]:
    """Finds the sensors whose patch embeddings a file holds.

    Args:
        tensors: in the file.
        sensor: the one that a file without sensors' names holds; None = "hr".

    Returns:
        (the sensors, whether the file names them).

    Raises:
        ValueError: the file has no patch embedding, or it names its sensors and `sensor` is set.
    """
    tensors = bare(tensors)
    matches = (re.match(r"encoder\.patch_embeds\.(\w+)\.proj\.weight$", name) for name in tensors)
    named = [match[1] for match in matches if match]
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
    tensors: Tensors, sensor: str | None, cfg: config_dict.ConfigDict, contract: Contract, leave_out: Sequence[str] = ()
) -> Found:
    """Brings the tensors of a file to those of `models.msgfm.make_model(cfg, contract)`.

    A mask token and decoders that the file does not have stay new; so does the gate where a block with experts gets
    them from an MLP (every expert is a copy of it). Bias tables of another window are resized. `torch_import.fill`
    refuses whatever else is missing or too much.

    Args:
        tensors: in the file.
        sensor: the one that a file without sensors' names holds; None = "hr".
        cfg: config.model.
        contract: the input contract.
        leave_out: patterns of names to be dropped.

    Returns:
        What the file gives the model.

    Raises:
        ValueError: the file is of another architecture; tensor, shape and fix are named.
    """
    tensors = bare(tensors)
    sensors, named = sensors_in(tensors, sensor)
    for name in sensors:
        sensor_rule(contract, name)  # refuses a sensor that the model does not take
    sensors = tuple(name for name in contract["sensors"] if name in sensors)
    prefix = "encoder." if named or "encoder.patch_embed.proj.weight" in tensors else ""
    optional = (msgfm.MASK_TOKEN, *(msgfm.DECODER.format(name) for name in sensors))
    modules = (msgfm.ENCODER, *(msgfm.EMBED.format(name) for name in sensors), *optional)
    entries = {module: keymap.msgfm_entries(cfg, [module]) for module in modules}
    if not named:
        entries = {
            module: [e._replace(torch=name_in_file(e.torch, sensors[0], prefix)) for e in several]
            for module, several in entries.items()
        }
    readers, notes = readers_of(tensors, leave_out)
    check_sizes(readers, prefix, cfg)
    check_bands(readers, entries, contract)
    trained = {name: (shape[1] + 1) // 2 for name, shape in tensors.shapes.items() if name.endswith(COORDINATES)}
    notes += with_tables(readers, prefix, trained, cfg) + with_experts(readers, prefix, cfg)
    new = tuple(module for module in optional if not any(e.torch in readers for e in entries[module]))
    filled = tuple(module for module in modules if module not in new)
    fitted = Tensors({name: shape for name, (shape, _) in readers.items()}, lambda name: readers[name][1]())
    return Found(fitted, [entry for module in filled for entry in entries[module]], filled, new, tuple(notes))


def name_in_file(torch: str, sensor: str, prefix: str) -> str:
    """Translates a tensor's name to a file of one sensor.

    Args:
        torch: key in a file of several sensors.
        sensor: of the file.
        prefix: of its encoder, "encoder." or "".

    Returns:
        The name in the file.
    """
    torch = keymap.one_sensor(torch, sensor)
    return torch if prefix else torch.removeprefix("encoder.")


def readers_of(tensors: Tensors, leave_out: Sequence[str]) -> tuple[Readers, list[str]]:
    """Picks the tensors that no rule leaves out. Tutel's older spelling `gate.` becomes `gates.0.`.

    Args:
        tensors: in a file.
        leave_out: patterns of names to be dropped, beside :data:`DROPPED`.

    Returns:
        (what reads each tensor, a note for every rule that left some out).
    """
    rules = [*DROPPED, *((fnmatch.translate(pattern), f"asked by --leave-out {pattern}") for pattern in leave_out)]
    readers: Readers = {}
    dropped: dict[str, list[str]] = {}
    for name, shape in tensors.shapes.items():
        why = next((why for pattern, why in rules if re.fullmatch(pattern, name)), None)
        if why is None:
            newer = name.replace("_moe_layer.gate.wg.", "_moe_layer.gates.0.wg.")
            readers[newer] = (shape, functools.partial(tensors.__getitem__, name))
        else:
            dropped.setdefault(why, []).append(name)
    return readers, [
        f"{len(names)} tensors left out, {why}: {names[0]}{', ...' if len(names) > 1 else ''}"
        for why, names in dropped.items()
    ]


def check_sizes(readers: Readers, prefix: str, cfg: config_dict.ConfigDict) -> None:
    """Checks that the file's sizes are those of config.model.

    Args:
        readers: of the file.
        prefix: of its encoder.
        cfg: config.model.

    Raises:
        ValueError: names every contradiction.
    """
    wrong: list[str] = []

    def compare(name: str, field: str, size: object, expected: object) -> None:
        if size != expected:
            shape = readers[name][0]
            wrong.append(f"{name} {shape}: the file has model.{field} = {size}, the configuration {expected}")

    blocks: dict[int, dict[int, list[str]]] = {}
    for name in readers:
        if match := re.match(re.escape(prefix) + r"layers\.(\d+)\.blocks\.(\d+)\.", name):
            blocks.setdefault(int(match[1]), {}).setdefault(int(match[2]), []).append(name)
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


def check_bands(readers: Readers, entries: Mapping[str, Sequence[keymap.Entry]], contract: Contract) -> None:
    """Checks that a patch embedding takes as many bands as the contract says of its sensor.

    Args:
        readers: of the file.
        entries: of the top-level parameters, by name.
        contract: the input contract.

    Raises:
        ValueError: it takes another number.
    """
    for sensor, rule in contract["sensors"].items():
        kernel = next((e.torch for e in entries.get(msgfm.EMBED.format(sensor), ()) if e.kind == "conv"), "")
        shape = readers[kernel][0] if kernel in readers else ()
        if len(shape) == 4 and shape[1] != len(rule["bands"]):
            raise ValueError(
                f"{kernel} {shape} takes {shape[1]} bands, {sensor} has {', '.join(rule['bands'])}; choose the sensor "
                f"with --sensor, or its bands in the order of the kernel with --bands {sensor}=..."
            )


def with_tables(readers: Readers, prefix: str, trained: Mapping[str, int], cfg: config_dict.ConfigDict) -> list[str]:
    """Brings the bias tables to the model's windows, in place.

    They are computed where the file has Swin-MoE's network for them, resized where it has a table of another window.

    Args:
        readers: of the file.
        prefix: of its encoder.
        trained: buffer of coordinates -> window that it was made for.
        cfg: config.model.

    Returns:
        The notes.
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
                    readers[name] = (rows, heads), functools.partial(_read_resized, read, window)
                    resized.append(f"{shape[0]} to {rows}")
            elif all(key in readers for key in network):
                reads = [readers.pop(key)[1] for key in network]
                pretrained = trained.get(attn + COORDINATES, window)
                readers[name] = (rows, heads), functools.partial(_read_computed, reads, window, pretrained)
                computed.append(name)
    notes = [f"{resized.count(change)} bias tables resized from {change} rows" for change in dict.fromkeys(resized)]
    return notes + ([f"{len(computed)} bias tables computed by the file's cpb_mlp"] if computed else [])


def _read_resized(read: Read, window: int) -> np.ndarray:
    return bias_tables.resized(read(), window)


def _read_computed(reads: Sequence[Read], window: int, trained: int) -> np.ndarray:
    kernel1, bias1, kernel2 = (read() for read in reads)
    return bias_tables.from_network(kernel1, bias1, kernel2, window, trained)


def with_experts(readers: Readers, prefix: str, cfg: config_dict.ConfigDict) -> list[str]:
    """Makes what blocks with experts need where the file has an MLP, in place.

    Every expert is a copy of it ("upcycling"), the gate is new. And the bias of the second layer: zeros where no MLP of
    the file has one, as in Swin-MoE.

    Args:
        readers: of the file.
        prefix: of its encoder.
        cfg: config.model.

    Returns:
        The notes.
    """
    notes: list[str] = []
    gates: list[str] = []
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
                upcycle(readers, torch, int(cfg.moe.experts), jax.random.fold_in(jax.random.key(GATE_SEED), len(gates)))
                gates.append(f"{torch}{keymap.EXPERTS}gates.0.wg.weight")
    if gates:
        notes.append(
            f"{len(gates)} blocks have an MLP in the file and experts in the model: every expert is a copy; "
            f"new gates (truncated normal, 0.02, seed {GATE_SEED}): {gates[0]}{', ...' if gates[1:] else ''}"
        )
    return notes


def upcycle(readers: Readers, torch: str, experts: int, key: jax.Array) -> None:
    """Turns the MLP of a block into experts, in Tutel's names and layout, and draws a gate; in place.

    Args:
        readers: of the file.
        torch: prefix of the block's names.
        experts: number of copies.
        key: of the gate.
    """
    mlp = {
        tensor: readers.pop(f"{torch}mlp.{tensor}")
        for tensor in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        if f"{torch}mlp.{tensor}" in readers
    }
    width = mlp["fc1.weight"][0][-1]

    def copies(tensor: str, transposed: bool) -> tuple[tuple[int, ...], Read]:
        shape, read = mlp[tensor]
        turn = (lambda: read().T) if transposed else read
        shape = (experts, *(shape[::-1] if transposed else shape))
        return shape, lambda: np.broadcast_to(turn(), shape)

    layer = f"{torch}{keymap.EXPERTS}"
    for tensor, name, transposed in (
        ("fc1.weight", "fc1_w", False),
        ("fc1.bias", "fc1_bias", False),
        ("fc2.weight", "fc2_w", True),
        ("fc2.bias", "fc2_bias", False),
    ):
        if tensor in mlp:
            readers[f"{layer}experts.batched_{name}"] = copies(tensor, transposed)
    readers[f"{layer}gates.0.wg.weight"] = (
        (experts, width),
        lambda: np.asarray(trunc_normal(key, (experts, width), np.float32)),
    )
