"""Paths as people give them: a local one, or gs://BUCKET/NAME, which etils.epath reads and writes through gcsfs.

On an object store there are no folders to make, nothing can be appended to and nothing renamed in one step; an object
is written whole or not at all, and who reads next sees it.
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


def path(given: str | os.PathLike[str]) -> epath.Path:
    """A local or gs:// path, as given. ValueError: another scheme, no bucket, or no gcsfs to reach it with."""
    text = os.fspath(given)
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


def absolute(given: str | os.PathLike[str]) -> epath.Path:
    """As :func:`path`; a local one absolute, its links followed."""
    return path(given) if is_remote(given) else epath.Path(pathlib.Path(path(given)).resolve())


def make_folder(folder: epath.Path) -> None:
    """The folder and those above it; nothing on an object store, where a mistyped bucket would be created."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_local(given: str | os.PathLike[str], why: str) -> None:
    """ValueError with the reason where a gs:// path is given for what is written to a disk only."""
    if is_remote(path(given)):
        raise ValueError(f"{given}: {why}")
