"""The files of Swin-MoE, one per process, as one: each holds the experts, or slices of experts, of its process.

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
"""Last parts of the names of the tensors that differ between processes, [local experts, hidden or out, ...]."""


class Shards(NamedTuple):
    """Files of one checkpoint in the order of their processes.

    Attributes:
        files: their tensors.
        stem: path without the rank.
        experts: of the model.
    """

    files: tuple[Tensors, ...]
    stem: str
    experts: int

    def merged(self, name: str, hidden: int) -> tuple[tuple[int, ...], int]:
        """The shape of a tensor of all experts.

        Args:
            name: of the tensor.
            hidden: channels inside an expert of the model.

        Returns:
            (shape, slices that an expert is cut into).

        Raises:
            ValueError: files are missing, or do not have their part; they are named.
        """
        first = name.rsplit("batched_", 1)[0] + "batched_fc1_w"
        for rank, file in enumerate(self.files):
            if absent := [tensor for tensor in (name, first) if tensor not in file.shapes]:
                raise ValueError(f"{self.stem}.rank{rank} holds no {absent[0]}, which other ranks hold")
        shapes = [file.shapes[name] for file in self.files]
        if len(set(shapes)) > 1:
            other = next(rank for rank, shape in enumerate(shapes) if shape != shapes[0])
            raise ValueError(f"{name} is {shapes[0]} in {self.stem}.rank0 and {shapes[other]} in rank{other}")
        local, *rest = shapes[0]
        kernel = self.files[0].shapes[first]
        slices = max(hidden // kernel[1], 1)
        if (len(self.files) * local, hidden) != (self.experts * slices, kernel[1] * slices):
            whole = self.experts * slices // local
            missing = ", ".join(f"{self.stem}.rank{rank}" for rank in range(len(self.files), whole))
            raise ValueError(
                f"{name} is {shapes[0]} in each of {len(self.files)} files ({self.stem}.rank*): "
                f"{len(self.files) * local} x {kernel[1]} hidden channels, the model has {self.experts} experts "
                f"(model.moe.experts) x {hidden}" + (f"; missing: {missing}" if missing else "")
            )
        width = rest[0] * slices
        if name.endswith("fc2_bias"):  # cut into equal slices, so that the last one may reach beyond
            width = min(width, self.files[0].shapes[name.removesuffix("bias") + "w"][2])
        return (self.experts, width, *rest[1:]), slices

    def read(self, name: str, slices: int, width: int) -> np.ndarray:
        """Reads the tensor of all experts: slices of an expert side by side, experts one after the other.

        Args:
            name: of the tensor.
            slices: that an expert is cut into.
            width: of the tensor's second axis.

        Returns:
            [experts, width, ...].
        """
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
    """Presents the files of a checkpoint as one mapping.

    They are those of all ranks and what they share, or files that are no shards.

    Args:
        files: path -> tensors.
        experts: of the model.
        hidden: stage -> channels inside an expert of it.

    Returns:
        The tensors of all files, experts merged.

    Raises:
        ValueError: a rank is missing or comes twice, the ranks do not make the model's experts, or two files hold a
            tensor differently.
    """
    files = {path: flat_biases(tensors) for path, tensors in files.items()}
    ranks: dict[int, str] = {}
    for path in files:
        if match := re.fullmatch(r"\.rank(\d+)", pathlib.Path(path).suffix):
            rank = int(match[1])
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
