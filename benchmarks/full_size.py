"""Import, export and verify at full size, timed, with peak memory.

    python -m benchmarks.full_size DIR [--config FILE] [--keep]

Random weights in the released layouts stand in for the real files: of SkySense one .pth per module, with the names and
shapes of the release; for msGFM what its encoder can begin with (tests/helpers/swin_layouts.py), one after the other:
GFM's checkpoint, a supervised Swin with its classifier, at 224 pixels with window 7, Swin-MoE's files of one process
each, every expert in 4 slices, and SimMIM's checkpoint. Needs torch, and for configs/skysense_full.py about 30 GiB of
disk and 16 GiB of memory (configs/msgfm_base.py: 5 and 5). Each command runs in a process of its own; its peak memory
is what the kernel reports for that process (VmHWM: resident pages, those of mapped files included).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import safetensors
import torch

from skysense_jax import sensors
from skysense_jax.convert import keymap
from skysense_jax.core.config import read_config
from skysense_jax.models.skysense import module_names, param_shapes
from tests.helpers import swin_layouts

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "skysense_full.py"
PREFIX = {"hr": "backbone."}
"""Prefix of the names in a released single-module file; the other files have none."""

Released = Iterator[tuple[list[str], Callable[[pathlib.Path], bool]]]
"""(paths of the files of one release, whether an exported folder holds what they held); they are removed after use."""

UNUSED = re.compile(r"(teacher|projector|head)\..*|.*(attn_mask|_index|_coords_table|_global_experts)|.*\.cpb_mlp\..*")
"""Names in the files of a Swin that no tensor of an export is a copy of."""

MADE = ("relative_position_bias_table", "gates.0.wg.weight", "mlp.fc2.bias")
"""Last parts of exported names whose tensors a file need not hold: computed or resized, new, zeros."""


def write_skysense(folder: pathlib.Path, cfg: Any) -> Released:
    """SkySense's files with random weights, float32."""
    cfg.model.geo_context.bank = "none"  # the release holds none
    contract = sensors.input_contract(cfg.data.bands.to_dict(), cfg.model.ratio)
    shapes, rng, paths = param_shapes(cfg.model, contract), np.random.default_rng(0), []
    for module in module_names(cfg.model, contract):
        named = dict(jax.tree_util.tree_leaves_with_path(shapes[module]))
        leaves = {"/".join(str(key.key) for key in path): leaf for path, leaf in named.items()}
        state = {}
        for entry in keymap.module_entries(module, cfg.model):
            shape = keymap.torch_shape(entry, leaves[entry.name].shape)
            scale = 0.02 if len(shape) > 1 else 0.1
            norm = "norm" in entry.torch and "weight" in entry.torch
            values = scale * rng.standard_normal(shape, np.float32) + norm
            state[PREFIX.get(module, "") + entry.torch] = torch.from_numpy(values.astype(np.float32))
        if module == "s2" and "ctpe" in shapes:
            state["ctpe"] = torch.from_numpy(0.02 * rng.standard_normal(shapes["ctpe"].shape, np.float32))
        paths.append(str(folder / f"skysense_model_{keymap.PREFIXES[module].rstrip('.')}.pth"))
        save(state, paths[-1])
    yield paths, lambda out: all(_same(path, out) for path in paths)


def write_swins(folder: pathlib.Path, cfg: Any) -> Released:
    """What a msGFM of this configuration can begin with, random weights, float32."""
    model = cfg.model
    sizes = (tuple(model.depths), model.embed_dims, tuple(model.num_heads))
    last = model.embed_dims * 2 ** (len(model.depths) - 1)
    own, other = (*sizes, model.window, model.img_size // model.patch), (*sizes, 7, 224 // model.patch)
    fields, count = {"patch": model.patch, "ratio": int(model.mlp_ratio)}, model.moe.experts
    experts = [(stage, block) for stage in model.moe.stages for block in range(1, model.depths[stage], 2)]

    def simmim() -> dict[str, np.ndarray]:
        return swin_layouts.simmim(*own, **fields)

    def gfm() -> dict[str, np.ndarray]:
        teacher = swin_layouts.swin(*other, seed=2, **fields)
        return (
            simmim()
            | {f"teacher.{name}": value for name, value in teacher.items()}
            | {"projector.weight": np.zeros((last, last), np.float32), "projector.bias": np.zeros(last, np.float32)}
        )

    def supervised() -> dict[str, np.ndarray]:
        return swin_layouts.swin(*other, **fields) | {
            "head.weight": np.zeros((21841, last), np.float32),
            "head.bias": np.zeros(21841, np.float32),
        }

    def mixture() -> dict[str, np.ndarray]:
        return swin_layouts.with_networks(swin_layouts.swin(*own, experts=experts, count=count, bias2=False, **fields))

    for make in (gfm, supervised, mixture, simmim):
        state = {name: _calm(name, value) for name, value in make().items()}
        parts = {"": state}
        if make is mixture:
            parts = {f".{part}": held for part, held in swin_layouts.shards(state, 4 * count, 4).items()}
        paths = [str(folder / f"{make.__name__}.pth{part}") for part in parts]
        for path, held in zip(paths, parts.values(), strict=True):
            save({"model": {name: torch.from_numpy(np.array(value)) for name, value in held.items()}}, path)
        yield paths, lambda out, state=state: _same_swin(state, out)


def save(content: Any, path: str) -> None:
    """torch.save, and a line about it."""
    torch.save(content, path)
    print(f"{path}: {os.path.getsize(path) / 2**30:.2f} GiB", flush=True)


def _calm(name: str, value: np.ndarray) -> np.ndarray:
    """Weights of the layouts, whose deviation is 0.3, as those of a network: 0.02, norms around 1."""
    if value.dtype != np.float32:
        return value
    return value / np.float32(15) + np.float32("norm" in name and name.endswith("weight"))


def measured(*words: str) -> tuple[float, float]:
    """Runs a command of skysense-jax; (seconds, peak GiB). Raises CalledProcessError."""
    code = (
        "import sys; from skysense_jax import cli; code = cli.main(sys.argv[1:]); "
        "print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1], file=sys.stderr); "
        "sys.exit(code)"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, words)
    return time.monotonic() - begin, int(done.stderr.split()[-1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--config", type=pathlib.Path, default=CONFIG)
    parser.add_argument("--keep", action="store_true", help="leave the files in DIR")
    args = parser.parse_args()
    args.dir.mkdir(parents=True)
    cfg, same = read_config(args.config), True
    swin = cfg.model.name == "msgfm"
    for number, (files, held) in enumerate((write_swins if swin else write_skysense)(args.dir, cfg)):
        there, out = args.dir / f"in{number}", args.dir / f"out{number}"
        steps = {
            "import-torch": (*files, "--out", str(there), "--config", str(args.config)),
            "export-torch": (str(there), "--out", str(out), *([] if swin else ["--per-module"])),
            "verify": (str(out),),
        }
        table = {name: measured(name, *words) for name, words in steps.items()}
        print("\n".join(f"{name:<14}{seconds:>8.1f} s{peak:>8.2f} GiB peak" for name, (seconds, peak) in table.items()))
        here = held(out)
        print(f"torch -> JAX -> torch, every tensor of the files that is kept, bit for bit: {here}", flush=True)
        same &= here
        for path in [] if args.keep else [*files, there, out]:
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    if not args.keep:
        args.dir.rmdir()
    sys.exit(0 if same else 1)


def _same_swin(state: dict[str, np.ndarray], out: pathlib.Path) -> bool:
    """Whether an exported folder holds the tensors of a Swin's file, an MLP as every expert where it has experts."""
    before, used = {name.removeprefix("encoder."): value for name, value in state.items()}, set()
    mlp = {"fc1_w": "fc1.weight", "fc1_bias": "fc1.bias", "fc2_w": "fc2.weight", "fc2_bias": "fc2.bias"}
    counts = {"equal": 0, "resized, computed or new": 0, "different": 0}
    with safetensors.safe_open(out / "model.safetensors", framework="numpy") as after:
        for name in after.keys():
            own, got = name.removeprefix("encoder."), after.get_tensor(name)
            own = own.replace("patch_embeds.hr.", "patch_embed.").replace("decoders.hr.", "decoder.")
            layer, _, part = own.partition("_moe_layer.experts.batched_")
            copied = own not in before and part in mlp
            own = layer + mlp[part] if copied else own
            value = before.get(own)
            used.add(own)
            if copied and part == "fc2_w":
                value = value.T
            if name.endswith(MADE) and (value is None or value.shape != got.shape):
                counts["resized, computed or new"] += 1
            else:
                same = value is not None and np.array_equal(np.broadcast_to(value, got.shape), got)
                counts["equal" if same else "different"] += 1
    lost = [name for name in before if name not in used and not UNUSED.fullmatch(name)]
    print(f"{len(before)} tensors in the files, exported: {counts}, lost: {lost}")
    return not counts["different"] and not lost


def _same(file: str, out: pathlib.Path) -> bool:
    """Whether the exported file of a module holds exactly the tensors of the released one."""
    before = torch.load(file, mmap=True, weights_only=True)
    name = pathlib.Path(file).stem
    prefix = name.removeprefix("skysense_model_") + "."
    with safetensors.safe_open(out / f"{name}.safetensors", framework="pt") as after:
        keys = {key: key if key == "ctpe" else prefix + key.removeprefix("backbone.") for key in before}
        return set(keys.values()) == set(after.keys()) and all(
            torch.equal(before[key], after.get_tensor(there)) for key, there in keys.items()
        )


if __name__ == "__main__":
    main()
