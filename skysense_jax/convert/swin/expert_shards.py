"""The files of Swin-MoE, one per process, as one: every file holds the experts, or slices of experts, of its process.

FILE.rank0, FILE.rank1, ... hold experts, FILE.master what all processes share (microsoft/Swin-Transformer, utils_moe).
Process r of E experts x s slices has slice r % s of expert r // s (tutel, experts/ffn.py with a negative count per
node).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from skysense_jax.convert.tensor_files import Tensors, joined

SHARDED = ("batched_fc1_w", "batched_fc1_bias", "batched_fc2_w", "batched_fc2_bias")
"""Last parts of the names of what a process has of its own, [local experts, hidden or out, ...]."""


class Shards(NamedTuple):
    """Files of one checkpoint in the order of their processes. count: of experts of the model. stem: path without the
    rank."""

    files: tuple[Tensors, ...]
    stem: str
    count: int

    def merged(self, name: str, hidden: int) -> tuple[tuple[int, ...], int]:
        """(shape of a tensor of all experts, slices an expert is cut into). Raises ValueError naming the files that are
        missing, or that do not have their part.
        """
        first = name.rsplit("batched_", 1)[0] + "batched_fc1_w"
        for rank, file in enumerate(self.files):
            if absent := [wanted for wanted in (name, first) if wanted not in file.shapes]:
                raise ValueError(f"{self.stem}.rank{rank} holds no {absent[0]}, which other ranks hold")
        shapes = [file.shapes[name] for file in self.files]
        if len(set(shapes)) > 1:
            other = next(rank for rank, shape in enumerate(shapes) if shape != shapes[0])
            raise ValueError(f"{name} is {shapes[0]} in {self.stem}.rank0 and {shapes[other]} in rank{other}")
        local, *rest = shapes[0]
        kernel = self.files[0].shapes[first]
        slices = max(hidden // kernel[1], 1)
        if (len(self.files) * local, hidden) != (self.count * slices, kernel[1] * slices):
            whole = self.count * slices // local
            absent = ", ".join(f"{self.stem}.rank{rank}" for rank in range(len(self.files), whole))
            raise ValueError(
                f"{name} is {shapes[0]} in each of {len(self.files)} files ({self.stem}.rank*): "
                f"{len(self.files) * local} x {kernel[1]} hidden channels, the model has {self.count} experts "
                f"(model.moe.experts) x {hidden}" + (f"; missing: {absent}" if absent else "")
            )
        width = rest[0] * slices
        if name.endswith("fc2_bias"):  # cut into equal slices, so that the last one may reach beyond
            width = min(width, self.files[0].shapes[name.removesuffix("bias") + "w"][2])
        return (self.count, width, *rest[1:]), slices

    def read(self, name: str, slices: int, width: int) -> np.ndarray:
        """The tensor of all experts: slices of an expert side by side, experts one after the other."""
        arrays = [file[name] for file in self.files]
        experts = [np.concatenate(arrays[i : i + slices], axis=1)[:, :width] for i in range(0, len(arrays), slices)]
        return np.concatenate(experts, axis=0)


def flat_biases(tensors: Tensors) -> Tensors:
    """Biases of experts [E,1,n] as [E,n]: Tutel had that axis until August 2022, two months after Swin-MoE's files."""
    for name, shape in tensors.shapes.items():
        if name.endswith(("batched_fc1_bias", "batched_fc2_bias")) and len(shape) == 3 and shape[1] == 1:
            tensors = tensors.changed(name, (shape[0], shape[2]), lambda bias: bias[:, 0])
    return tensors


def join(files: Mapping[str, Tensors], experts: int, hidden: Mapping[int, int]) -> Tensors:
    """One mapping of the files of a checkpoint: those of all ranks and what they share, or files that are no shards.

    files: path -> tensors. experts: of the model. hidden: stage -> channels inside an expert there. Raises ValueError
    naming a rank that is missing or given twice, ranks that do not make the model's experts, and a tensor that two
    files hold differently.
    """
    files, ranks = {path: flat_biases(tensors) for path, tensors in files.items()}, {}
    for path in files:
        if found := re.fullmatch(r"\.rank(\d+)", pathlib.Path(path).suffix):
            rank = int(found[1])
            if rank in ranks:
                raise ValueError(f"{ranks[rank]} and {path} are both of rank {rank}")
            ranks[rank] = path
    if not ranks:
        return joined(list(files.values()))
    stem = str(pathlib.Path(ranks[min(ranks)]).with_suffix(""))
    if absent := [f"{stem}.rank{rank}" for rank in range(max(ranks)) if rank not in ranks]:
        raise ValueError(f"the files of {stem} go up to rank {max(ranks)}, missing: {', '.join(absent)}")
    shards = Shards(tuple(files[ranks[rank]] for rank in range(len(ranks))), stem, experts)
    owner: dict[str, Tensors] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    slices: dict[str, int] = {}
    for path, tensors in files.items():
        for name, shape in tensors.shapes.items():
            if name.rsplit(".", 1)[-1] in SHARDED and path in ranks.values():
                stage = re.search(r"layers\.(\d+)\.", name)
                if name not in slices:
                    shapes[name], slices[name] = shards.merged(name, hidden.get(int(stage[1]) if stage else -1, 0))
            elif name not in owner:
                owner[name], shapes[name] = tensors, shape
            elif not np.array_equal(owner[name][name], tensors[name]):
                raise ValueError(f"{path} holds another {name} than the files before it")
    if not any(name.endswith("patch_embed.proj.weight") for name in shapes):
        raise ValueError(f"{stem}.rank* hold experts alone; give {stem}.master too, which holds what they share")

    def read(name: str) -> np.ndarray:
        return shards.read(name, slices[name], shapes[name][1]) if name in slices else owner[name][name]

    return Tensors(shapes, read)
