"""A profiler window: the steps FIRST..LAST of a run, traced into the run's folder for TensorBoard's profile page."""

from __future__ import annotations

import pathlib
import re
import shutil
import tempfile

import jax
from etils import epath

from skysense_jax.core import paths
from skysense_jax.run.state import TrainState

FOLDER = "profile"


class Window:
    """Traces the steps after FIRST steps are done until LAST are; traces nothing for the empty window ''.

    A window that lies before the step a run resumes from is over; a window that the end of the run cuts is written as
    far as it goes.
    """

    def __init__(self, text: str, workdir: epath.Path, total: int) -> None:
        """Reads the window.

        Args:
            text: "FIRST:LAST" with 0 <= FIRST < LAST, counted as in the metrics, or "".
            workdir: folder of the run.
            total: steps of the run.

        Raises:
            ValueError: the text is no window, or the window lies behind the steps of the run.
        """
        window = re.fullmatch(r"(\d+):(\d+)", text)
        if text and not (window and int(window.group(1)) < int(window.group(2))):
            raise ValueError(f"--profile={text!r}: FIRST:LAST steps with FIRST < LAST, as 100:105")
        self._first, self._last = (int(window.group(1)), int(window.group(2))) if window else (-1, -1)
        if self._first >= total:
            raise ValueError(f"--profile={text!r}: the run has {total} steps, none of them in that window")
        self._folder, self._running = workdir / FOLDER, False

    def before_step(self, done: int, state: TrainState) -> None:
        """To be called before every step.

        The device runs behind the host, and the window ends when the device has caught up.

        Args:
            done: number of steps done.
            state: what they led to.
        """
        if self._running and done >= self._last:
            jax.block_until_ready(state)
            self.close()
        elif not self._running and self._first <= done < self._last:
            self._local = tempfile.mkdtemp() if paths.is_remote(self._folder) else str(self._folder)
            jax.profiler.start_trace(self._local)
            self._running = True

    def close(self) -> None:
        """Ends a running trace."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            if paths.is_remote(self._folder):  # the profiler itself writes to disks only
                for file in pathlib.Path(self._local).rglob("*"):
                    if file.is_file():
                        (self._folder / file.relative_to(self._local)).write_bytes(file.read_bytes())
                shutil.rmtree(self._local)
