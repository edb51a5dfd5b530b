"""Which module a model's training batches come from; each has check, stages, train_dataset and make_train_iterator."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from skysense_jax.data import pipeline, samples


def of(cfg: Any) -> ModuleType:
    """For msGFM images of one sensor (`data.samples`), for others views of whole places (`data.pipeline`)."""
    return samples if cfg.model.name == "msgfm" else pipeline
