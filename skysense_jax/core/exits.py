"""Every exit code of a command: the interface to schedulers and launch scripts (docs/launch.md)."""

DONE = 0
DIFFERS = 1  # `verify`: an output or a file is not what was exported
WORKER_DIED = 1  # `data build`, `data check`: a worker process died; run the command again
TOO_LARGE = 1  # `compile-check`: the step does not fit the device's memory
ROW_MISSING = 1  # `pods`: a row of the table could not be made
NOT_FINITE = 65  # EX_DATAERR: more updates than config.run.max_skipped were not finite; do not restart
HUNG = 70  # EX_SOFTWARE: no step within config.run.watchdog_s; restart, counted
COMPILER_FAILED = 70  # `compile-check`: the compiler failed for another reason than memory
NOT_WRITTEN = 74  # EX_IOERR: a checkpoint or the metrics could not be written; make room and start again
PREEMPTED = 75  # EX_TEMPFAIL: preempted and saved; restart, not counted
BAD_INPUT = 78  # EX_CONFIG: bad input, configuration or data, or an incomplete pod; do not restart
