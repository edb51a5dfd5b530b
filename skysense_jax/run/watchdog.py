"""A run that no longer moves is ended: all stacks are written, and the process exits with 70.

A scheduler then restarts it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time

from etils import epath

from skysense_jax.core import exits

WRITE_S = 30.0  # what hangs may be the file system


class Watchdog:
    """Ends the process when `beat` was not called for some seconds. Use it as a context manager around the loop."""

    def __init__(self, seconds: float, stacks: epath.Path) -> None:
        """Does not start to count yet.

        Args:
            seconds: without a beat that end the process; a save or an evaluation counts as a step: give it the time.
            stacks: file that gets every thread's stack; stderr gets them too.

        Raises:
            ValueError: `seconds` is not positive.
        """
        if seconds <= 0:
            raise ValueError(f"config.run.watchdog_s={seconds}: a positive number of seconds")
        self._seconds, self._stacks = float(seconds), stacks
        self._last, self._done = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def beat(self) -> None:
        """Says that something moved."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                sys.stderr.write(
                    f"\nwatchdog: no step for {silent:.0f} s (config.run.watchdog_s={self._seconds:g}); "
                    f"stacks in {self._stacks}\n"
                )
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                sys.stderr.flush()
                writing = threading.Thread(target=self._write, name="stacks", daemon=True)
                writing.start()
                writing.join(WRITE_S)
                os._exit(exits.HUNG)  # a hung step cannot be unwound; the last complete checkpoint stands

    def _write(self) -> None:
        with tempfile.TemporaryFile() as out:
            faulthandler.dump_traceback(out, all_threads=True)
            out.seek(0)
            self._stacks.write_bytes(out.read())
