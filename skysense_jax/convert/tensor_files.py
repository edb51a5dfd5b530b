"""Files of PyTorch weights as lazy mappings: names and shapes at once, one tensor in memory when it is asked for.

Safe formats only: safetensors, and pickles through `torch.load(weights_only=True)`, which executes nothing a file asks
for. Files in torch's zip format are memory-mapped; older ones are read whole, which is what torch does with them.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import safetensors

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which a checkpoint may hold its tensors, in any depth."""

ENDINGS = (".pth", ".pt", ".ckpt", ".bin")

PARTS = re.compile(r"\.(rank\d+|master|global)")
"""What Swin-MoE appends to the name of a file that one process wrote."""

UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, IndexError, KeyError, ValueError, AttributeError)
"""What torch's unpickler raises on files that are damaged, or that ask for more than tensors."""


INERT = [(collections.OrderedDict, "yacs.config.CfgNode")]
"""(what stands in for it, class): the configuration that SimMIM, GFM and Swin checkpoints hold is a dict with methods;
its values are read, and none of its code.
"""


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name; a value is read when it is asked for, bfloat16 as float32.

    Attributes:
        shapes: name -> shape, without reading.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]) -> None:
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """Some of the tensors under other names.

        Args:
            names: new name -> name here.

        Returns:
            Those of `names` only.
        """
        return Tensors({new: self.shapes[old] for new, old in names.items()}, lambda new: self._read(names[new]))

    def changed(self, name: str, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> Tensors:
        """The same tensors with one of them changed when it is read.

        Args:
            name: of that tensor.
            shape: that it has afterwards.
            change: what makes the new value of the stored one.

        Returns:
            The tensors; nothing is read yet.
        """

        def read(asked: str) -> np.ndarray:
            return change(self._read(name)) if asked == name else self._read(asked)

        return Tensors({**self.shapes, name: shape}, read)


def in_memory(arrays: Mapping[str, np.ndarray]) -> Tensors:
    """Presents arrays as the tensors of a file."""
    return Tensors({name: tuple(value.shape) for name, value in arrays.items()}, lambda name: arrays[name])


def joined(files: Sequence[Tensors]) -> Tensors:
    """Presents the tensors of several files as one mapping.

    Args:
        files: their tensors.

    Returns:
        All of them.

    Raises:
        ValueError: two files hold the same name.
    """
    owner: dict[str, Tensors] = {}
    for tensors in files:
        if twice := owner.keys() & tensors.shapes.keys():
            raise ValueError(f"two files of weights hold {sorted(twice)[0]}")
        owner |= dict.fromkeys(tensors, tensors)
    return Tensors({name: tensors.shapes[name] for name, tensors in owner.items()}, lambda name: owner[name][name])


def sha256(path: pathlib.Path) -> str:
    """The digest of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def torch_is_there() -> bool:
    """Whether torch can be imported; it is not imported to find out."""
    return importlib.util.find_spec("torch") is not None


def open_tensors(path: str | pathlib.Path) -> Tensors:
    """Opens a .safetensors or PyTorch file, unwrapped from `state_dict` / `model` / `module`.

    Args:
        path: of the file.

    Returns:
        Its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its ending is unknown, it is damaged, holds no tensors or needs more than tensors to be read (the
            message names what), or torch is needed and absent.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix not in ENDINGS and not PARTS.fullmatch(path.suffix):
        raise ValueError(
            f"{path}: weights are read from .safetensors, {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} files"
        )
    if not torch_is_there():
        raise ValueError(f"{path}: reading PyTorch files needs torch; install the extra `torch`, or use .safetensors")
    return _open_torch(path)


def _open_safetensors(path: pathlib.Path) -> Tensors:
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a sound safetensors file: {error}") from error
    narrow = [name for name in file.keys() if file.get_slice(name).get_dtype() == "BF16"]
    if narrow:  # numpy has no bfloat16
        return _open_narrow(path)
    return Tensors({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor)


def _open_narrow(path: pathlib.Path) -> Tensors:
    """A safetensors file with bfloat16 tensors, through jax's own bfloat16."""
    from safetensors.flax import load_file

    arrays = load_file(path)
    return Tensors({name: tuple(x.shape) for name, x in arrays.items()}, lambda name: _wide(np.asarray(arrays[name])))


def _wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def _open_torch(path: pathlib.Path) -> Tensors:
    import torch

    try:
        with torch.serialization.safe_globals([*INERT]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UNREADABLE as error:
        asked = re.findall(r"GLOBAL (\w+(?:\.\w+)+)", str(error))
        if asked and zipfile.is_zipfile(path):  # all of them, where the format lets torch look ahead
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            asked = [name for name in unsafe if name not in (known for _, known in INERT)] or asked
        if asked:
            raise ValueError(
                f"{path}: reading it would run code that its pickle asks for ({', '.join(sorted(set(asked)))}), which "
                "is refused. Where you trust the file, load it in a process of its own and save the tensors alone: "
                "torch.save(checkpoint['state_dict'], FILE), or checkpoint['model'] where it has that"
            ) from error
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # without torch's advice to allow code
        reason = re.split(r"\. |\n", reason)[0] or type(error).__name__
        raise ValueError(f"{path}: not a sound PyTorch file of weights: {reason}") from error
    state = content
    while wrapper := next((w for w in WRAPPERS if isinstance(state, dict) and isinstance(state.get(w), dict)), None):
        state = state[wrapper]
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        inside = sorted(map(str, content))[:10] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: no tensors in it; found {inside}")

    def read(name: str) -> np.ndarray:
        value = tensors[name].detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()

    return Tensors({name: tuple(value.shape) for name, value in tensors.items()}, read)
