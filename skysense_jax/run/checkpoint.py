"""Checkpoints: one complete unit per step, each part loadable alone, every leaf with a digest of our own.

A thin wrapper around Orbax v1. FOLDER/<step>/ holds the checkpointables params, opt, teacher, memory (an empty tree is
left out), counters (step, skipped), data (JSON: where the data stream stands) and meta (JSON: config, contract, digests
and what the caller adds). Orbax writes into a temporary folder and renames it when everything is on disk, so that a
killed save leaves nothing that looks like a checkpoint; on an object store, where nothing can be renamed, it writes a
mark last.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from skysense_jax.core import paths, trees
from skysense_jax.run import digest
from skysense_jax.run.state import TrainState

FOLDER = "checkpoints"
"""Name of the folder of checkpoints inside a workdir."""

REJECTED = "checkpoints_rejected"
"""Where a damaged step is moved when an older one is used in its place; nothing is deleted."""

COMMITTED = "commit_success.txt"
"""Orbax's mark of a complete step on an object store."""

TREES = ("params", "opt", "teacher", "memory")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
"""What Orbax, tensorstore and json raise on truncated, missing or altered files."""


class Damaged(ValueError):
    """A checkpoint that cannot be trusted; the message names what is wrong with it."""


class NotSaved(OSError):
    """A checkpoint could not be written (a full disk, a lost mount); the complete ones stand."""


class Restored(NamedTuple):
    """state on its mesh; data, meta: the JSON parts; step."""

    state: TrainState
    data: dict[str, Any]
    meta: dict[str, Any]
    step: int


def _split(state: TrainState) -> dict[str, Any]:
    """The state as checkpointables, empty trees left out (Orbax refuses them)."""
    parts = {name: getattr(state, name) for name in TREES if jax.tree.leaves(getattr(state, name))}
    return {**parts, "counters": {"step": state.step, "skipped": state.skipped}}


def _seal(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry(include_global_registry=True)
    for name in ("data", "meta"):  # a dict would otherwise be stored as arrays; as JSON it can be read with `cat`
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def steps(folder: pathlib.Path | str) -> list[int]:
    """Complete steps in a folder of checkpoints, ascending."""
    folder = paths.path(folder)
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    if paths.is_remote(folder):
        found = [path for path in found if (path / COMMITTED).exists()]
    return sorted(int(path.name) for path in found)


class Saver:
    """Writes checkpoints in the background and keeps the newest `keep`."""

    def __init__(self, workdir: pathlib.Path | str, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"config.run.keep={keep}: at least one checkpoint must stay")
        self._folder = paths.absolute(workdir) / FOLDER
        self._step = -1  # of the save that was started last
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            context=_context(),
            cleanup_tmp_directories=True,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        )

    def save(self, state: TrainState, data: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
        """Start saving; returns once the state is copied (the caller may donate it). False: this step is already there.

        data, meta: JSON values. Raises NotSaved, also for a *previous* save that failed in the background.
        """
        step = int(state.step)
        if step in steps(self._folder):
            return False
        parts = _split(state)
        digests = {name: digest.tree_digests(tree) for name, tree in parts.items()}
        body = {**json.loads(json.dumps(meta)), "step": step, "digests": digests, "data_seal": _seal(dict(data))}
        checkpointables = {**parts, "data": dict(data), "meta": {**body, "seal": _seal(body)}}
        self._checked(lambda: self._orbax.save_checkpointables_async(step, checkpointables, force=True))
        self._step = step
        return True

    def wait(self) -> None:
        """Until the save in progress is on disk; raises NotSaved if it failed."""
        self._checked(self._orbax.wait)

    def close(self) -> None:
        """Wait and release the background threads; raises NotSaved as :meth:`wait`."""
        self._checked(self._orbax.close)

    def _checked(self, action: Callable[[], Any]) -> None:
        """tensorstore says ValueError where a disk is full, which elsewhere is a bad configuration."""
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            raise NotSaved(
                f"{self._folder}: a checkpoint could not be written after step {max(self._step, 0)}: "
                f"{_first_line(error)}. The complete ones stand: make room and start again"
            ) from error


def save_part(folder: pathlib.Path | str, name: str, tree: trees.Tree) -> None:
    """Writes one tree as a checkpoint of its own, FOLDER/NAME, with a digest of every leaf: for weights that come
    module by module. An older one is replaced."""
    body = {"digests": {name: digest.tree_digests(tree)}}
    tree = jax.tree.map(jax.device_put, tree)  # no copy on a CPU; Orbax copies numpy arrays once more before it writes
    with _context():
        ocp.save_checkpointables(
            paths.absolute(folder) / name, {name: tree, "meta": {**body, "seal": _seal(body)}}, overwrite=True
        )


def load_part(folder: pathlib.Path | str, name: str) -> trees.Tree:
    """The tree :func:`save_part` wrote, as numpy arrays. Raises FileNotFoundError, Damaged."""
    path = paths.absolute(folder) / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such part of the weights")
    meta = _read_sealed(path, "meta")["meta"]
    return _load(path.parent, path.name, {name: _empty_tree(meta["digests"][name])}, meta)[name]


def read_json(folder: pathlib.Path | str, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data, meta) of one step, seals checked. Raises Damaged."""
    path = paths.absolute(folder) / str(step)
    parts = _read_sealed(path, "data", "meta")
    data, meta = parts["data"], parts["meta"]
    if meta["data_seal"] != _seal(data):
        raise Damaged("data position was altered: its seal does not fit")
    return data, meta


def _read_sealed(path: epath.Path, *names: str) -> dict[str, Any]:
    """The JSON parts `names` of one checkpoint, "meta" among them, whose seal is checked and taken off. Raises
    Damaged.
    """
    try:
        parts = dict(ocp.load_checkpointables(path, dict.fromkeys(names)))
    except UNREADABLE as error:
        raise Damaged(f"{path}: {' or '.join(names)} cannot be read: {_first_line(error)}") from error
    parts["meta"] = dict(parts["meta"])
    if parts["meta"].pop("seal", None) != _seal(parts["meta"]):
        raise Damaged(f"{path}: meta was altered: its seal does not fit")
    return parts


def _load(
    folder: pathlib.Path | str, step: int | str, wanted: Mapping[str, Any], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The trees `wanted` (name -> shapes with shardings) of one step, every leaf against its digest. Raises Damaged."""
    path = paths.absolute(folder) / str(step)
    try:
        loaded = ocp.load_checkpointables(path, dict(wanted))
    except UNREADABLE as error:
        raise Damaged(f"{', '.join(wanted)} cannot be read: {_first_line(error)}") from error
    for name in wanted:
        found, stored = digest.tree_digests(loaded[name]), meta["digests"][name]
        wrong = [leaf for leaf in stored if found.get(leaf) != stored[leaf]]
        if wrong:
            first = wrong[0]
            raise Damaged(
                f"{len(wrong)} leaves do not have the digest they were saved with, first {name}/{first}: "
                f"saved {stored[first]}, read {found.get(first)}"
            )
    return loaded


def _first_line(error: BaseException) -> str:
    """What went wrong, from the end of the chain: Orbax wraps the cause in errors that do not say it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _check_structure(meta: Mapping[str, Any], parts: Mapping[str, Any], where: str) -> None:
    """The saved trees are those this configuration builds; otherwise ValueError naming the first differences."""
    differences = []
    for name in sorted(set(parts) | set(meta["digests"])):
        stored = {leaf: text.split()[0] for leaf, text in meta["digests"].get(name, {}).items()}
        wanted = {leaf: digest.describe(shape) for leaf, shape in trees.flatten(parts.get(name, {})).items()}
        for leaf in sorted(set(stored) | set(wanted)):
            if stored.get(leaf) != wanted.get(leaf):
                differences.append(
                    f"{name}/{leaf}: saved {stored.get(leaf, 'nothing')}, "
                    f"the configuration builds {wanted.get(leaf, 'nothing')}"
                )
    if differences:
        some = "; ".join(differences[:5])
        raise ValueError(f"{where} holds another model ({len(differences)} leaves differ): {some}")


def restore_latest_valid(
    workdir: pathlib.Path | str, shapes: TrainState, check: Callable[[Mapping[str, Any]], None] = lambda meta: None
) -> Restored | None:
    """The newest step whose every leaf has its digest, on the mesh of `shapes`; None where there is no checkpoint.

    check(meta) may refuse a sound checkpoint that belongs to another run by raising ValueError. A damaged step is named
    on stderr with the reason and, once an older one is used, moved to REJECTED. Raises Damaged when there are steps but
    none is sound: a run never starts over silently; ValueError when the newest readable step holds another model.
    """
    folder = paths.absolute(workdir) / FOLDER
    rejected: dict[int, str] = {}
    for step in reversed(steps(folder)):
        try:
            data, meta = read_json(folder, step)
            check(meta)
            parts = _split(shapes)
            _check_structure(meta, parts, f"{folder / str(step)}")
            loaded = _load(folder, step, parts, meta)
        except Damaged as error:
            rejected[step] = str(error)
            print(f"checkpoint {step} rejected: {error}", file=sys.stderr)
            continue
        _set_aside(paths.absolute(workdir), rejected)
        counters = loaded["counters"]
        trees_ = {name: loaded.get(name, {}) for name in TREES}
        return Restored(TrainState(step=counters["step"], skipped=counters["skipped"], **trees_), data, meta, step)
    if rejected:
        reasons = "; ".join(f"{step}: {reason}" for step, reason in rejected.items())
        raise Damaged(
            f"{folder} has checkpoints but none can be trusted ({reasons}). Move the folder away to start over."
        )
    return None


def _set_aside(workdir: epath.Path, rejected: Mapping[int, str]) -> None:
    """Moves damaged steps out of the way of the steps that will be saved again."""
    if not rejected or jax.process_index() != 0:
        return
    aside = workdir / REJECTED
    if paths.is_remote(aside):  # a folder is there as long as an object in it is
        (aside / "README.txt").write_text("Damaged checkpoints, each with its reason\n")
    else:
        aside.mkdir(parents=True, exist_ok=True)
    for step, reason in rejected.items():
        earlier = [path for path in aside.iterdir() if path.name.startswith(f"{step}-")]
        target = aside / f"{step}-{len(earlier)}"
        (workdir / FOLDER / str(step)).rename(target)
        (target / "REASON.txt").write_text(reason + "\n")


def find(path: pathlib.Path | str, step: int | None = None) -> tuple[epath.Path, list[int]]:
    """(folder of checkpoints, candidate steps, newest first) from a workdir, a folder of checkpoints, or one step's
    folder.
    """
    path = paths.absolute(path)
    if path.name.isdigit() and (path / "meta").exists():
        return path.parent, [int(path.name)]
    folder = path / FOLDER if (path / FOLDER).exists() else path
    found = steps(folder)[::-1]
    if step is not None:
        found = [n for n in found if n == step]
    if not found:
        raise FileNotFoundError(f"no checkpoint{'' if step is None else f' of step {step}'} in {path}")
    return folder, found


def load_meta(path: pathlib.Path | str, step: int | None = None) -> dict[str, Any]:
    """meta of the newest readable step under `path` (see :func:`find`): "config", "contract", "step", ... Raises
    Damaged.
    """
    folder, candidates = find(path, step)
    return _newest(candidates, lambda n: read_json(folder, n)[1], folder)


def load_tree(path: pathlib.Path | str, name: str, step: int | None = None) -> trees.Tree:
    """One part ("params", "teacher", ...) alone as a tree of numpy arrays, whatever mesh it was trained on.

    path: a workdir, its folder of checkpoints, or one step's folder; the newest sound step unless `step` is given.
    Raises FileNotFoundError where there is none, Damaged with the reasons where none is sound, ValueError for a part
    that is not there.
    """
    folder, candidates = find(path, step)

    def read(n: int) -> trees.Tree:
        _, meta = read_json(folder, n)
        if name not in meta["digests"]:
            raise ValueError(f"checkpoint {folder / str(n)} has no {name!r}; it has {', '.join(meta['digests'])}")
        return _load(folder, n, {name: _empty_tree(meta["digests"][name])}, meta)[name]

    return _newest(candidates, read, folder)


def _newest(candidates: list[int], read: Callable[[int], Any], folder: epath.Path) -> Any:
    """read(step) of the first candidate that is not damaged; Damaged with all reasons where every one is."""
    reasons = []
    for n in candidates:
        try:
            return read(n)
        except Damaged as error:
            reasons.append(f"{n}: {error}")
            print(f"checkpoint {n} rejected: {error}", file=sys.stderr)
    raise Damaged(f"{folder}: no checkpoint can be trusted ({'; '.join(reasons)})")


def _empty_tree(digests: Mapping[str, str]) -> trees.Tree:
    """Arrays to read into, from the digests of a tree."""
    return trees.nest({leaf: _empty_like(text.split()[0]) for leaf, text in digests.items()})


def _empty_like(text: str) -> np.ndarray:
    """An array to read into, from digest.describe's spelling."""
    dtype, shape = text.removesuffix("]").split("[")
    return np.empty([int(n) for n in shape.split(",") if n], np.dtype(jax.numpy.dtype(dtype)))
