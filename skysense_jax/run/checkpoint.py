"""Checkpoints: one complete unit per step, each tree loadable alone, every leaf with a digest of this package.

This is a thin wrapper around Orbax v1. FOLDER/<step>/ holds the checkpointables params, opt, teacher, memory (an empty
tree is left out), counters (step, skipped), data (JSON: where the data stream stands) and meta (JSON: config, contract,
digests and what the caller adds). Orbax writes into a temporary folder and renames it when everything is on disk, so
that a killed save leaves nothing that looks like a checkpoint. On an object store, where nothing can be renamed, it
writes a mark last.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from skysense_jax.core import paths, trees
from skysense_jax.run.state import TrainState
from skysense_jax.run.stored import digest, sealed
from skysense_jax.run.stored.sealed import Damaged

FOLDER = "checkpoints"
"""Name of the folder of checkpoints inside a workdir."""

REJECTED = "checkpoints_rejected"
"""Where a damaged step is moved when an older one is used in its place; nothing is deleted."""

COMMITTED = "commit_success.txt"
"""Orbax's mark of a complete step on an object store."""

TREES = ("params", "opt", "teacher", "memory")
"""Names of a checkpoint's trees."""


class NotSaved(OSError):
    """A checkpoint could not be written (a full disk, a lost mount); the complete checkpoints stand."""


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        state: on its mesh.
        data: where the data stream stands.
        meta: what the checkpoint says about itself.
        step: steps done.
    """

    state: TrainState
    data: dict[str, Any]
    meta: dict[str, Any]
    step: int


def _split(state: TrainState) -> dict[str, Any]:
    """The state as checkpointables, empty trees left out (Orbax refuses them)."""
    nonempty = {name: getattr(state, name) for name in TREES if jax.tree.leaves(getattr(state, name))}
    return {**nonempty, "counters": {"step": state.step, "skipped": state.skipped}}


def steps(folder: pathlib.Path | str) -> list[int]:
    """Complete steps in a folder of checkpoints, ascending."""
    location = paths.path(folder)
    step_folders = [path for path in location.iterdir() if path.name.isdigit()] if location.exists() else []
    if paths.is_remote(location):
        step_folders = [path for path in step_folders if (path / COMMITTED).exists()]
    return sorted(int(path.name) for path in step_folders)


class Saver:
    """Writes checkpoints in the background and keeps the newest `keep`."""

    def __init__(self, workdir: pathlib.Path | str, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"config.run.keep={keep}: at least one checkpoint must stay")
        self._folder = paths.absolute(workdir) / FOLDER
        self._step = -1  # of the save that was started last
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            context=sealed.context(),
            cleanup_tmp_directories=True,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        )

    def save(self, state: TrainState, data: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
        """Starts saving and returns once the state is copied, so that the caller may donate it.

        Args:
            state: to be saved.
            data: where the data stream stands, JSON values.
            meta: what the checkpoint says about itself, JSON values.

        Returns:
            False where this step is saved already.

        Raises:
            NotSaved: this save, or a *previous* save in the background, failed.
        """
        step = int(state.step)
        if step in steps(self._folder):
            return False
        checkpointables = _split(state)
        digests = {name: digest.tree_digests(tree) for name, tree in checkpointables.items()}
        body = {**json.loads(json.dumps(meta)), "step": step, "digests": digests, "data_seal": sealed.seal(dict(data))}
        checkpointables |= {"data": dict(data), "meta": {**body, "seal": sealed.seal(body)}}
        self._checked(lambda: self._orbax.save_checkpointables_async(step, checkpointables, force=True))
        self._step = step
        return True

    def wait(self) -> None:
        """Waits until the save in progress is on disk; raises NotSaved if it failed."""
        self._checked(self._orbax.wait)

    def close(self) -> None:
        """Waits and releases the background threads; raises NotSaved as :meth:`wait`."""
        self._checked(self._orbax.close)

    def _checked(self, action: Callable[[], Any]) -> None:
        """Runs an action of Orbax; NotSaved where it fails.

        tensorstore raises ValueError where a disk is full, which elsewhere means a bad configuration.
        """
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            raise NotSaved(
                f"{self._folder}: a checkpoint could not be written after step {max(self._step, 0)}: "
                f"{sealed.first_line(error)}. The complete ones stand: make room and start again"
            ) from error


def read_json(folder: pathlib.Path | str, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON parts of one step, their seals checked.

    Args:
        folder: of checkpoints.
        step: of the checkpoint.

    Returns:
        (data, meta).

    Raises:
        Damaged: they cannot be trusted.
    """
    path = paths.absolute(folder) / str(step)
    values = sealed.read_sealed(path, "data", "meta")
    data, meta = values["data"], values["meta"]
    if meta["data_seal"] != sealed.seal(data):
        raise Damaged("data position was altered: its seal does not fit")
    return data, meta


def _check_structure(meta: Mapping[str, Any], shapes: Mapping[str, Any], where: str) -> None:
    """Refuses saved trees that are not those this configuration builds.

    Raises:
        ValueError: names the first differences.
    """
    differences = []
    for name in sorted(set(shapes) | set(meta["digests"])):
        stored = {leaf: text.split()[0] for leaf, text in meta["digests"].get(name, {}).items()}
        built = {leaf: digest.describe(shape) for leaf, shape in trees.flatten(shapes.get(name, {})).items()}
        for leaf in sorted(set(stored) | set(built)):
            if stored.get(leaf) != built.get(leaf):
                differences.append(
                    f"{name}/{leaf}: saved {stored.get(leaf, 'nothing')}, "
                    f"the configuration builds {built.get(leaf, 'nothing')}"
                )
    if differences:
        some = "; ".join(differences[:5])
        raise ValueError(f"{where} holds another model ({len(differences)} leaves differ): {some}")


def restore_latest_valid(
    workdir: pathlib.Path | str, shapes: TrainState, check: Callable[[Mapping[str, Any]], None] = lambda meta: None
) -> Restored | None:
    """Reads the newest step whose leaves all have their digests.

    A damaged step is named on stderr with the reason and, once an older step is used, moved to REJECTED.

    Args:
        workdir: of the run.
        shapes: the state as shapes with shardings; the leaves are restored to these.
        check: gets the meta of a sound checkpoint and refuses it, by raising ValueError, where it belongs to another
            run.

    Returns:
        The checkpoint; None where there is none.

    Raises:
        Damaged: there are steps but none is sound; a run never starts over silently.
        ValueError: the newest readable step holds another model, or `check` refused it.
    """
    folder = paths.absolute(workdir) / FOLDER
    rejected: dict[int, str] = {}
    for step in reversed(steps(folder)):
        try:
            data, meta = read_json(folder, step)
            check(meta)
            expected = _split(shapes)
            _check_structure(meta, expected, f"{folder / str(step)}")
            loaded = sealed.load(folder, step, expected, meta)
        except Damaged as error:
            rejected[step] = str(error)
            print(f"checkpoint {step} rejected: {error}", file=sys.stderr)
            continue
        _set_aside(paths.absolute(workdir), rejected)
        counters = loaded["counters"]
        restored = {name: loaded.get(name, {}) for name in TREES}
        return Restored(TrainState(step=counters["step"], skipped=counters["skipped"], **restored), data, meta, step)
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
    if paths.is_remote(aside):  # a folder exists as long as an object in it does
        (aside / "README.txt").write_text("Damaged checkpoints, each with its reason\n")
    else:
        aside.mkdir(parents=True, exist_ok=True)
    for step, reason in rejected.items():
        earlier = [path for path in aside.iterdir() if path.name.startswith(f"{step}-")]
        target = aside / f"{step}-{len(earlier)}"
        (workdir / FOLDER / str(step)).rename(target)
        (target / "REASON.txt").write_text(reason + "\n")


def find(path: pathlib.Path | str, step: int | None = None) -> tuple[epath.Path, list[int]]:
    """Finds the checkpoints under a path.

    Args:
        path: a workdir, a folder of checkpoints, or one step's folder.
        step: the only step to consider; None: all.

    Returns:
        (folder of checkpoints, candidate steps, newest first).

    Raises:
        FileNotFoundError: there is none.
    """
    location = paths.absolute(path)
    if location.name.isdigit() and (location / "meta").exists():
        return location.parent, [int(location.name)]
    folder = location / FOLDER if (location / FOLDER).exists() else location
    candidates = steps(folder)[::-1]
    if step is not None:
        candidates = [n for n in candidates if n == step]
    if not candidates:
        raise FileNotFoundError(f"no checkpoint{'' if step is None else f' of step {step}'} in {location}")
    return folder, candidates


def load_meta(path: pathlib.Path | str, step: int | None = None) -> dict[str, Any]:
    """What the newest readable checkpoint says about itself.

    Args:
        path: as :func:`find`.
        step: as :func:`find`.

    Returns:
        Its meta: "config", "contract", "step", ...

    Raises:
        FileNotFoundError: there is none.
        Damaged: none can be trusted.
    """
    folder, candidates = find(path, step)
    return _newest(candidates, lambda n: read_json(folder, n)[1], folder)


def load_tree(path: pathlib.Path | str, name: str, step: int | None = None) -> trees.Tree:
    """Reads one tree of a checkpoint alone, whatever mesh it was trained on.

    Args:
        path: a workdir, its folder of checkpoints, or one step's folder.
        name: "params", "teacher", ...
        step: the step to read; None: the newest sound one.

    Returns:
        The tree as numpy arrays.

    Raises:
        FileNotFoundError: there is no checkpoint.
        Damaged: with the reasons, none is sound.
        ValueError: the checkpoint has no tree of this name.
    """
    folder, candidates = find(path, step)

    def read(n: int) -> trees.Tree:
        _, meta = read_json(folder, n)
        if name not in meta["digests"]:
            raise ValueError(f"checkpoint {folder / str(n)} has no {name!r}; it has {', '.join(meta['digests'])}")
        return sealed.load(folder, n, {name: sealed.empty_tree(meta["digests"][name])}, meta)[name]

    return _newest(candidates, read, folder)


def _newest(candidates: list[int], read: Callable[[int], Any], folder: epath.Path) -> Any:
    """read(step) of the first candidate that is not damaged; Damaged with all reasons where every candidate is."""
    reasons = []
    for n in candidates:
        try:
            return read(n)
        except Damaged as error:
            reasons.append(f"{n}: {error}")
            print(f"checkpoint {n} rejected: {error}", file=sys.stderr)
    raise Damaged(f"{folder}: no checkpoint can be trusted ({'; '.join(reasons)})")
