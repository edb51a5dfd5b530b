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
from typing import Any

import jax
import numpy as np
from etils import epath

from skysense_jax.core import chips
from skysense_jax.run import digest, records
from skysense_jax.run.board import tensorboardX

FILE = "metrics.jsonl"


class Timers:
    """Seconds by purpose (compile, restore, data, step, save, eval), summed over all starts of a run: the goodput
    split.
    """

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(earlier or {})

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.add(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` to `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def peak_memory() -> int:
    """Peak bytes of device 0 where the backend tells (TPU, GPU), else of this process's resident memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Device metrics as JSON values: integers, floats (exactly float32), a digest pair as hex; NaN and infinities as
    text.
    """
    values = {}
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
    """The writers of one process; only process 0 writes files. A record's "step" counts the steps done, its own
    included.
    """

    def __init__(
        self,
        workdir: epath.Path,
        start: int,
        total: int,
        every: int,
        places: int,
        images: int,
        flops: float,
        timers: Timers,
    ) -> None:
        """places, images: of a global batch; an image is one date of one sensor of a place, however many views are cut
        from it. flops: model FLOPs of one step, all devices together (what is counted: core.flops).
        """
        if every < 1:
            raise ValueError(f"config.run.log_every={every}: at least 1")
        self._total, self._every, self._flops, self._timers = total, every, flops, timers
        self._places, self._images = places, images
        self._writes = jax.process_index() == 0
        devices = jax.devices()
        chip = chips.CHIPS.get(devices[0].device_kind)  # no MFU is printed for a device that is not there
        self._peak = chip and chip.flops * len(devices) / chips.devices_per_chip(devices)
        self._pending: tuple[int, Any] | None = None
        self._skipped = 0
        self._mark, self._mark_step, self._mark_data = time.monotonic(), start, timers.seconds.get("data", 0.0)
        if self._writes:
            self._records = records.open_records(workdir / FILE, start)
            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def put(self, step: int, metrics: Mapping[str, Any]) -> int:
        """Hand over the metrics of `step` (device arrays) and write those of the step before; returns updates skipped
        so far.
        """
        skipped = self.flush()
        self._pending = (step, metrics)
        return skipped

    def flush(self) -> int:
        """Write what is pending, to the disk; returns the number of skipped updates known so far (a save may have
        flushed the record that tells it).
        """
        if self._pending is None:
            return self._skipped
        (step, metrics), self._pending = self._pending, None
        values = plain(metrics)
        unsound = values["finite"] == 0
        if step % self._every == 0 or step in (1, self._total) or unsound:
            self._write(step, values)
        self._skipped = int(values["skipped"])
        return self._skipped

    def _write(self, step: int, values: dict[str, Any]) -> None:
        now, data = time.monotonic(), self._timers.seconds.get("data", 0.0)
        wall, steps = max(now - self._mark, 1e-9), max(step - self._mark_step, 1)
        rate = steps * self._places / wall
        spent = max(sum(self._timers.seconds.values()), 1e-9)
        shares = {name: seconds / spent for name, seconds in self._timers.seconds.items()}
        speed = {
            "places_per_s": rate,
            "imgs_per_s": rate * self._images / self._places,
            "goodput": shares.get("step", 0.0),
            "step_s": wall / steps,
            "input_wait": (data - self._mark_data) / wall,
            "peak_bytes": peak_memory(),
        }
        if self._peak is not None:
            speed["mfu"] = self._flops * steps / wall / self._peak
        self._mark, self._mark_step, self._mark_data = now, step, data
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
        left = (self._total - step) * wall / steps
        mfu = f" | MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        rest = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name != "step" and share >= 0.005)
        loss = values["loss"] if isinstance(values["loss"], str) else f"{values['loss']:.4f}"
        skips = f" | skipped {values['skipped']}" if values["skipped"] else ""
        print(
            f"step {step}/{self._total} | loss {loss}{skips} | {rate:.1f} places/s, "
            f"{speed['imgs_per_s']:.0f} imgs/s{mfu} | input wait {speed['input_wait']:.0%} | "
            f"{speed['peak_bytes'] / 2**30:.1f} GiB | goodput {speed['goodput']:.0%}{rest and f' ({rest})'} | "
            f"ETA {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}",
            file=sys.stderr,
            flush=True,
        )

    def sync(self) -> int:
        """As flush, and everything written so far is in the files when it returns: called before a checkpoint is
        saved.
        """
        skipped = self.flush()
        if self._writes:
            self._records.sync()
            self._board.flush()
        return skipped

    def close(self) -> None:
        """Write what is pending and close the files."""
        self.sync()
        if self._writes:
            self._records.close()
            self._board.close()
