"""What geo-context costs per training step: time and memory at smoke size, with and without the bank.

    python -m benchmarks.geo_cost DATASET [--config configs/skysense_smoke.py] [--rounds 12]

Both steps are compiled first and then take turns on the same batches, so that other work on the machine meets both
alike. Times are seconds of this process's CPU (all threads) and of the wall clock, the median over rounds; memory is
what XLA plans for the step.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time

import jax

from skysense_jax.core import mesh as meshes
from skysense_jax.core.config import read_config
from skysense_jax.data.batches import views
from skysense_jax.run import init_from, state
from skysense_jax.run import plan as plans

BANKS = ("none", "on")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="dataset of places")
    parser.add_argument("--config", default=str(pathlib.Path(__file__).parents[1] / "configs" / "skysense_smoke.py"))
    parser.add_argument("--rounds", type=int, default=12, help="steps of each, after one that is not counted")
    args = parser.parse_args()
    mesh = meshes.make_mesh({"data": 1, "fsdp": -1})
    steps, states, by_bank, report = {}, {}, {}, {}
    with jax.set_mesh(mesh):
        for bank in BANKS:
            cfg = read_config(args.config)
            cfg.data.dir, cfg.model.geo_context.bank = args.data, bank
            contract = plans.make_contract(cfg)
            plan = by_bank[bank] = plans.make_plan(cfg, contract, mesh)
            steps[bank] = plans.compile_step(plan, mesh)
            states[bank] = state.create(plan.objective, plan.batch, cfg.seed, plan.state)
            if bank == "on" and cfg.model.geo_context.table == "places":
                states[bank] = init_from.with_regions(cfg, states[bank])
            memory = steps[bank].memory_analysis()
            report[bank] = {
                "flops": plan.flops,
                "arguments": memory.argument_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
                "wall": [],
                "cpu": [],
            }
        batches = views.make_train_iterator(cfg, contract, cfg.seed, 0, 0, 1)
        for turn in range(args.rounds + 1):
            places = next(batches)
            for bank in BANKS:
                batch = state.put_batch(places, by_bank[bank].batch)
                wall, cpu = time.monotonic(), time.process_time()
                states[bank], measured = steps[bank](states[bank], batch)
                jax.block_until_ready((states[bank], measured))
                if turn:
                    report[bank]["wall"].append(time.monotonic() - wall)
                    report[bank]["cpu"].append(time.process_time() - cpu)
        batches.close()
    for one in report.values():
        one |= {name: round(statistics.median(one[name]), 3) for name in ("wall", "cpu")}
    print(json.dumps({"rounds": args.rounds, "device": jax.devices()[0].device_kind, **report}, indent=1))


if __name__ == "__main__":
    main()
