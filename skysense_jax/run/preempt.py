"""SIGTERM: the scheduler wants the machine back.

Inside the loop the run saves and leaves; before it the process leaves at once, because there is nothing to save.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

from skysense_jax.core import exits


class Preemption:
    """Listens for SIGTERM from the moment it is made.

    Until :meth:`enter_loop` the process exits with 75 as soon as the signal comes, even inside a compilation (a wake-up
    pipe is read by a thread, because Python runs no handler while it waits in C++). From then on :meth:`requested`
    tells, at the same step on every process, that the run should save and stop.
    """

    def __init__(self) -> None:
        self._received = threading.Event()
        self._in_loop = False
        self._pipe: int | None = None
        if jax.process_count() > 1:
            return  # jax.distributed listens itself and agrees with the other processes on a step
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._before = signal.signal(signal.SIGTERM, lambda *_: self._received.set())
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), name="sigterm", daemon=True).start()

    def _listen(self, pipe: int) -> None:
        while received := os.read(pipe, 64):
            if signal.SIGTERM in received:
                self._received.set()
                if not self._in_loop:
                    sys.stderr.write("SIGTERM before the first step: nothing to save\n")
                    sys.stderr.flush()
                    os._exit(exits.PREEMPTED)
        os.close(pipe)

    def enter_loop(self) -> None:
        """From here on the signal is answered by the loop, with a checkpoint."""
        self._in_loop = True

    def requested(self, step: int) -> bool:
        """Whether to save and stop before `step`; every process gets the same answer at the same step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received.is_set()

    def close(self) -> None:
        """Gives the signal back to the handler that it had before."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, self._before)
            os.close(self._pipe)
            self._pipe = None
