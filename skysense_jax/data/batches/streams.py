"""From an endless stream of elements to the batches of one process, for every training objective."""

from __future__ import annotations

import grain
from ml_collections import config_dict


def shared(
    stream: grain.MapDataset, cfg: config_dict.ConfigDict, process_index: int, process_count: int
) -> grain.MapDataset:
    """Batches a stream and gives one process its consecutive rows of every global batch.

    Args:
        stream: the elements of all batches, one after the other.
        cfg: the whole configuration; `cfg.data.batch` is read.
        process_index: number of this process.
        process_count: number of processes.

    Returns:
        A dataset whose element [step] is the process's part of that step's batch.

    Raises:
        ValueError: the processes cannot share the batch evenly.
    """
    if cfg.data.batch < 1 or cfg.data.batch % process_count:
        raise ValueError(f"config.data.batch={cfg.data.batch} cannot be shared evenly by {process_count} processes")
    return stream.batch(cfg.data.batch // process_count, drop_remainder=True)[process_index::process_count]


def read_ahead(batches: grain.MapDataset, cfg: config_dict.ConfigDict, start_step: int) -> grain.DatasetIterator:
    """Iterates over batches and reads ahead.

    Args:
        batches: a dataset whose element [step] is the batch of the step.
        cfg: the whole configuration; `cfg.data.threads` and `cfg.data.prefetch` are read.
        start_step: step of the first batch.

    Returns:
        The batches from `start_step` on.
    """
    iterator = iter(batches.to_iter_dataset(read_options(cfg)))
    iterator.set_state({"next_index": int(start_step)})
    return iterator


def read_options(cfg: config_dict.ConfigDict) -> grain.ReadOptions:
    """How many batches are read ahead by how many threads: `config.data.prefetch`, `config.data.threads`."""
    return grain.ReadOptions(num_threads=int(cfg.data.threads), prefetch_buffer_size=int(cfg.data.prefetch))
