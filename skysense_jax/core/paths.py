"""Paths as people give them: a local one, or gs://BUCKET/NAME, which etils.epath reads and writes through gcsfs.

An object store has no folders to make; nothing can be appended to, and nothing can be renamed in one step. An object is
written whole or not at all, and the next reader sees it.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib

import fsspec
from etils import epath

SCHEME = "gs://"


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether the path is an object's on Cloud Storage."""
    return os.fspath(path).startswith(SCHEME)


def path(location: str | os.PathLike[str]) -> epath.Path:
    """A local or gs:// path, as it is written.

    Raises:
        ValueError: another scheme, no bucket, or no gcsfs to reach it with.
    """
    text = os.fspath(location)
    if not is_remote(text):
        if "://" in text:
            raise ValueError(f"{text}: only local paths and {SCHEME}BUCKET/NAME are known here")
        return epath.Path(text)
    if not text.removeprefix(SCHEME).partition("/")[0]:
        raise ValueError(f"{text}: names no bucket; write {SCHEME}BUCKET/NAME")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"{text}: {SCHEME} paths need gcsfs, which is not installed: pip install 'skysense_jax[gcs]' "
            "(part of the extra tpu), or give a local path"
        )
    # A listing kept from before would hide what Orbax and the other processes wrote since.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return epath.Path(text)


def absolute(location: str | os.PathLike[str]) -> epath.Path:
    """As :func:`path`; a local path becomes absolute and its links are followed."""
    return path(location) if is_remote(location) else epath.Path(pathlib.Path(path(location)).resolve())


def make_folder(folder: epath.Path) -> None:
    """Makes the folder and those above it; does nothing on an object store, where a mistyped bucket would be made."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_local(location: str | os.PathLike[str], why: str) -> None:
    """Refuses a gs:// path where a folder on a disk is needed.

    Args:
        location: the path.
        why: the reason, said in the error.

    Raises:
        ValueError: the path is on an object store.
    """
    if is_remote(path(location)):
        raise ValueError(f"{location}: {why}")
