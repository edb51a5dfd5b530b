"""What a run says while it runs: JSON lines, TensorBoard, one status line; and where its time goes.

Metrics are read back one step late, so that the device never waits for the host. `metrics.jsonl` holds each logged step
exactly once: a resumed run first drops the records past the step it resumes from, and a record is on disk before the
checkpoint that follows it (run.records).
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from skysense_jax.core.hardware import chips
from skysense_jax.run.log import records
from skysense_jax.run.log.board import tensorboardX
from skysense_jax.run.stored import digest

FILE = "metrics.jsonl"


class Work(NamedTuple):
    """How long a run is, and what one of its steps works on.

    Attributes:
        steps: of the whole run.
        log_every: a record is written every so many steps.
        places: of a global batch.
        images: of a global batch; an image is one date of one sensor of a place, however many views are cut from it.
        flops: model FLOPs of one step, all devices together (what is counted: core.flops).
    """

    steps: int
    log_every: int
    places: int
    images: int
    flops: float


class Timers:
    """Seconds by purpose, summed over all starts of a run: the goodput split.

    Purposes: compile, restore, data, step, save, eval.
    """

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(earlier or {})

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the time inside a `with` block to `name`."""
        start = time.monotonic()
        yield
        self.add(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Counts seconds to a purpose.

        Args:
            name: of the purpose.
            seconds: to add.
        """
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def peak_memory() -> int:
    """Peak bytes of device 0 where the backend tells (TPU, GPU), else of this process's resident memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plain(metrics: Mapping[str, jax.Array]) -> dict[str, int | float | str]:
    """Device metrics as JSON values.

    They are integers, floats (exactly float32), a digest pair as hex digits; NaN and infinities are text.
    """
    values: dict[str, int | float | str] = {}
    for name, value in jax.device_get(dict(metrics)).items():
        value = np.asarray(value)
        if value.dtype == np.uint32 and value.shape == (2,):
            values[name] = digest.hexadecimal(value)
        elif np.issubdtype(value.dtype, np.integer):
            values[name] = int(value)
        else:
            number = float(value)
            values[name] = number if math.isfinite(number) else str(number)
    return values


class Log:
    """The writers of one process; only process 0 writes files.

    The "step" of a record counts the steps done, the recorded step included.
    """

    def __init__(self, workdir: epath.Path, start: int, work: Work, timers: Timers) -> None:
        """Opens the files.

        Args:
            workdir: folder of the run.
            start: step that the run continues from, 0 for a new run.
            work: how long the run is, and what one of its steps works on.
            timers: the clocks of the run.

        Raises:
            ValueError: `work.log_every` is below 1.
        """
        if work.log_every < 1:
            raise ValueError(f"config.run.log_every={work.log_every}: at least 1")
        self._work, self._timers = work, timers
        self._writes = jax.process_index() == 0
        devices = jax.devices()
        chip = chips.CHIPS.get(devices[0].device_kind)  # no MFU is printed for a device without a data sheet
        self._peak = chip and chip.flops * len(devices) / chips.devices_per_chip(devices)
        self._pending: tuple[int, Any] | None = None
        self._skipped = 0
        self._mark, self._mark_step, self._mark_data = time.monotonic(), start, timers.seconds.get("data", 0.0)
        if self._writes:
            self._records = records.open_records(workdir / FILE, start)
            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def put(self, step: int, metrics: Mapping[str, jax.Array]) -> int:
        """Hands over the metrics of a step and writes those of the step before.

        Args:
            step: steps done, this step included.
            metrics: its metrics, device arrays.

        Returns:
            Updates skipped so far, as far as they are known.
        """
        skipped = self.flush()
        self._pending = (step, metrics)
        return skipped

    def flush(self) -> int:
        """Writes what is pending to the disk; returns the number of skipped updates known so far.

        A save may already have flushed the record that tells it.
        """
        if self._pending is None:
            return self._skipped
        (step, metrics), self._pending = self._pending, None
        values = plain(metrics)
        unsound = values["finite"] == 0
        if step % self._work.log_every == 0 or step in (1, self._work.steps) or unsound:
            self._write(step, values)
        self._skipped = int(values["skipped"])
        return self._skipped

    def _write(self, step: int, values: dict[str, Any]) -> None:
        clock, data = time.monotonic(), self._timers.seconds.get("data", 0.0)
        wall, steps = max(clock - self._mark, 1e-9), max(step - self._mark_step, 1)
        rate = steps * self._work.places / wall
        spent = max(sum(self._timers.seconds.values()), 1e-9)
        shares = {name: seconds / spent for name, seconds in self._timers.seconds.items()}
        speed = {
            "places_per_s": rate,
            "imgs_per_s": rate * self._work.images / self._work.places,
            "goodput": shares.get("step", 0.0),
            "step_s": wall / steps,
            "input_wait": (data - self._mark_data) / wall,
            "peak_bytes": peak_memory(),
        }
        if self._peak is not None:
            speed["mfu"] = self._work.flops * steps / wall / self._peak
        self._mark, self._mark_step, self._mark_data = clock, step, data
        if not self._writes:
            return
        record = {"step": step, **values, "time": {**speed, "unix": time.time(), "seconds": dict(self._timers.seconds)}}
        self._records.add(json.dumps(record) + "\n")
        curves = {
            **values,
            **{f"time/{name}": value for name, value in speed.items()},
            **{f"time/share_{name}": share for name, share in shares.items()},
        }
        for name, value in curves.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)
        left = (self._work.steps - step) * wall / steps
        mfu = f" | MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        rest = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name != "step" and share >= 0.005)
        loss = values["loss"] if isinstance(values["loss"], str) else f"{values['loss']:.4f}"
        skips = f" | skipped {values['skipped']}" if values["skipped"] else ""
        print(
            f"step {step}/{self._work.steps} | loss {loss}{skips} | {rate:.1f} places/s, "
            f"{speed['imgs_per_s']:.0f} imgs/s{mfu} | input wait {speed['input_wait']:.0%} | "
            f"{speed['peak_bytes'] / 2**30:.1f} GiB | goodput {speed['goodput']:.0%}{rest and f' ({rest})'} | "
            f"ETA {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}",
            file=sys.stderr,
            flush=True,
        )

    def sync(self) -> int:
        """As flush, and everything written so far is in the files when it returns.

        It is called before a checkpoint is saved.
        """
        skipped = self.flush()
        if self._writes:
            self._records.sync()
            self._board.flush()
        return skipped

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        self.sync()
        if self._writes:
            self._records.close()
            self._board.close()
