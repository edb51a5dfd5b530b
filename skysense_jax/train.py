"""Training, the one loop for every recipe.

    python -m skysense_jax.train --config FILE --workdir DIR [--init_from RUN] [--config.field=value ...]

A workdir that has begun is continued from its newest sound checkpoint; a finished one says so. The run is a function of
the configuration, the seed and the data: kill it anywhere, start it again, and it ends in the same state.

Exit codes: 0 done. 75 preempted (SIGTERM) and saved. 70 no step within config.run.watchdog_s. 65 more than
config.run.max_skipped updates were not finite. 74 a checkpoint or the metrics could not be written (full disk).
78 bad configuration or data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import flags
from etils import epath
from ml_collections import config_dict

from skysense_jax import recipes
from skysense_jax.core import config, exits, paths
from skysense_jax.core import mesh as meshes
from skysense_jax.core.hardware import xla_flags
from skysense_jax.draw import reconstructions
from skysense_jax.run import checkpoint, folder, state, watchdog
from skysense_jax.run import plan as plans
from skysense_jax.run import start as starts
from skysense_jax.run.folder import say
from skysense_jax.run.log import metrics, profiler
from skysense_jax.run.preempt import Preemption


class Options(NamedTuple):
    """What the command line says.

    Attributes:
        config: the whole configuration.
        workdir: folder of the run.
        profile: "FIRST:LAST", steps to trace, or "".
        init_from: whose weights a new run starts from.
    """

    config: config_dict.ConfigDict
    workdir: epath.Path
    profile: str = ""
    init_from: epath.Path | None = None


def parse(argv: Sequence[str]) -> Options:
    """Reads the command line.

    Args:
        argv: the words behind the program's name.

    Returns:
        The options.

    Raises:
        ValueError: as `core.config.read_flags`; no configuration or no workdir.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "folder of this run; continued where it has begun", flag_values=values)
        flags.DEFINE_string(
            "init_from", None, "workdir or checkpoint whose weights a new run starts from", flag_values=values
        )
        flags.DEFINE_string("profile", "", "trace these steps, as 100:105, into WORKDIR/profile", flag_values=values)

    values = config.read_flags("train", argv, define, __doc__)
    if values.config is None or values.workdir is None:
        raise ValueError("both --config FILE and --workdir DIR are needed")
    init_from = None if values.init_from is None else paths.absolute(values.init_from)
    return Options(values.config, paths.absolute(values.workdir), values.profile, init_from)


def train(options: Options) -> int:
    """Starts the processes of the job and runs; returns the exit code. From here on the process listens to SIGTERM."""
    xla_flags.apply(os.environ)  # before the first device is touched
    process, processes = meshes.start_processes()
    preemption = Preemption()
    try:
        return run(options, process, processes, preemption)
    finally:
        preemption.close()


def run(options: Options, process: int, processes: int, preemption: Preemption) -> int:
    """The run, from the data to TRAIN_COMPLETE.

    Args:
        options: of the command line.
        process: index of this process.
        processes: how many processes the job has.
        preemption: listens to SIGTERM.

    Returns:
        The exit code.

    Raises:
        ValueError: bad configuration or data.
        OSError: a checkpoint or the metrics could not be written.
    """
    cfg, workdir = options.config, options.workdir

    # 1. A folder, and what is to be learnt from: the dataset and the input contract.
    recipes.check_config(cfg)
    recipe = recipes.recipe_of(cfg)
    trace = profiler.Window(options.profile, workdir, cfg.steps)
    paths.make_folder(workdir)
    contract = plans.make_contract(cfg)
    dataset_id = recipe.batches.check(cfg, contract)
    meta = folder.run_meta(cfg, contract, dataset_id)

    # 2. Mesh, objective, shapes, shardings.
    mesh = meshes.make_mesh(cfg.mesh.to_dict())
    plan = plans.make_plan(cfg, contract, mesh)
    if (workdir / folder.COMPLETE).exists():
        folder.check_same_run(cfg, contract, dataset_id, checkpoint.load_meta(workdir))
        say(f"{workdir} is done ({cfg.steps} steps); nothing to do")
        return exits.DONE
    folder.write_reports(workdir, plan, mesh, meta)

    with jax.set_mesh(mesh):
        # 3. Compile before anything runs: out of memory and unmatched shapes show here.
        timers = metrics.Timers()
        with timers("compile"):
            train_step = plans.compile_step(plan, mesh)

        # 4. Where do we start from?
        with timers("restore"):
            start = starts.where_to_start(cfg, workdir, plan, meta, options.init_from)
        for name, seconds in start.seconds.items():
            timers.add(name, seconds)
        current, step = start.state, start.step
        saver = checkpoint.Saver(workdir, cfg.run.keep)
        # an image is one date of one sensor; a batch of one sensor (msGFM) has one per place
        images = cfg.data.batch * (sum(cfg.data.dates.values()) if "dates" in cfg.data else 1)
        work = metrics.Work(cfg.steps, cfg.run.log_every, cfg.data.batch, images, plan.flops)
        log = metrics.Log(workdir, step, work, timers)
        batches = recipe.batches.make_train_iterator(cfg, contract, cfg.seed, step, process, processes)
        draw = reconstructions.in_training(cfg, contract, workdir, meshes.replicated(mesh), process == 0)

        def save() -> None:
            with timers("save"):
                log.sync()  # the records of every step a checkpoint contains are on disk before it is
                saver.save(current, starts.data_position(cfg, step), {**meta, "seconds": timers.seconds})

        def not_finite(skipped: int) -> int:
            log.close()
            say(
                f"{skipped} updates were not finite, config.run.max_skipped is {cfg.run.max_skipped}; "
                f"the metrics are in {workdir / metrics.FILE}"
            )
            return exits.NOT_FINITE

        # 5. The loop. Order matters: save -> next batch -> step -> log; a checkpoint describes one instant of state,
        # data and clocks.
        preemption.enter_loop()
        try:
            with watchdog.Watchdog(cfg.run.watchdog_s, workdir / f"stacks-{process}.txt") as dog:
                while step < cfg.steps:
                    stop = preemption.requested(step)
                    if stop or (step % cfg.run.save_every == 0 and step > start.step):
                        save()
                    if stop:
                        saver.wait()
                        log.close()
                        say(f"preempted: saved at step {step}")
                        return exits.PREEMPTED
                    with timers("eval"):  # pictures of reconstructions; "eval" is their clock's name in the metrics
                        draw(current.params, step)
                    with timers("data"):
                        batch = state.put_batch(next(batches), plan.batch)
                    trace.before_step(step, current)
                    with timers("step"):
                        current, measured = train_step(current, batch)
                        step += 1
                        skipped = log.put(step, measured)  # updates skipped so far, known one step late
                    dog.beat()
                    if skipped > cfg.run.max_skipped:
                        return not_finite(skipped)

                # 6. Finish: the last records, the last checkpoint, the mark.
                skipped = log.flush()
                if skipped > cfg.run.max_skipped:
                    return not_finite(skipped)
                with timers("eval"):
                    draw(current.params, step)
                save()
                saver.wait()
                log.close()
        finally:
            trace.close()
            batches.close()
            saver.close()
        if process == 0:
            (workdir / folder.COMPLETE).write_text(f"{cfg.steps} steps\n")
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in timers.seconds.items())
        say(f"done: {cfg.steps} steps in {workdir} ({spent})")
        return exits.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` (without the program's name) and trains; returns the exit code.

    Bad configuration or data becomes exit code 78 and one line on stderr.
    """
    try:
        return train(parse(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        print(f"skysense-jax train: {error}", file=sys.stderr)
        return exits.BAD_INPUT
    except OSError as error:
        print(f"skysense-jax train: {error}", file=sys.stderr)
        return exits.NOT_WRITTEN


if __name__ == "__main__":
    sys.exit(main())
