"""Import, export and verify at full size, timed, with peak memory.

    python -m tests.full_size DIR [--config FILE] [--keep]

Random weights in the released layout (one .pth per module, names and shapes of the release) stand in for the real
files. Needs torch, about 30 GiB of disk and 16 GiB of memory for configs/skysense_full.py. Each command runs in a
process of its own; its peak memory is what the kernel reports for that process (VmHWM: resident pages, those of mapped
files included).
"""
from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import torch

from skysense_jax import embed, sensors
from skysense_jax.convert import keymap
from skysense_jax.models.skysense import module_names, param_shapes

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "skysense_full.py"
PREFIX = {"hr": "backbone."}
"""Prefix of the names in a released single-module file; the other files have none."""


def write_released(folder: pathlib.Path, config: pathlib.Path) -> list[str]:
    """The released files with random weights, float32; returns their paths."""
    cfg = embed.read_config(config)
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
        torch.save(state, paths[-1])
        print(f"{paths[-1]}: {os.path.getsize(paths[-1]) / 2**30:.2f} GiB", flush=True)
    return paths


def measured(*words: str) -> tuple[float, float]:
    """Runs a command of skysense-jax; (seconds, peak GiB). Raises CalledProcessError."""
    code = ("import sys; from skysense_jax import cli; code = cli.main(sys.argv[1:]); "
            "print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1], file=sys.stderr); "
            "sys.exit(code)")
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
    files = write_released(args.dir, args.config)
    steps = {
        "import-torch": (*files, "--out", str(args.dir / "in"), "--config", str(args.config)),
        "export-torch": (str(args.dir / "in"), "--out", str(args.dir / "out"), "--per-module"),
        "verify": (str(args.dir / "out"),),
    }
    table = {name: measured(name, *words) for name, words in steps.items()}
    same = all(_same(file, args.dir / "out") for file in files)
    print("\n".join(f"{name:<14}{seconds:>8.1f} s{peak:>8.2f} GiB peak" for name, (seconds, peak) in table.items()))
    print(f"torch -> JAX -> torch, every tensor bit for bit: {same}")
    if not args.keep:
        shutil.rmtree(args.dir)
    sys.exit(0 if same else 1)


def _same(file: str, out: pathlib.Path) -> bool:
    """Whether the exported file of a module holds exactly the tensors of the released one."""
    from safetensors import safe_open

    before = torch.load(file, mmap=True, weights_only=True)
    name = pathlib.Path(file).stem
    prefix = name.removeprefix("skysense_model_") + "."
    with safe_open(out / f"{name}.safetensors", framework="pt") as after:
        keys = {key: key if key == "ctpe" else prefix + key.removeprefix("backbone.") for key in before}
        return set(keys.values()) == set(after.keys()) and all(
            torch.equal(before[key], after.get_tensor(there)) for key, there in keys.items())


if __name__ == "__main__":
    main()
