"""Runs one rank of plan.py: makes the plan of `grace-ext plan --measure` in this job, then exchanges with each spec.  rank.py JOB.json"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from grace_ext.exchange.perform import perform
from grace_ext.frameworks.torch import engine
from grace_ext.frameworks.torch.devices import ops_for
from grace_ext.planning import candidates, plan
from grace_ext.planning.measure import probed, rows_of
from grace_ext.planning.probe import Probe

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import timing
from benchmarks.exchange.base import DistWorld, HorovodWorld
from benchmarks.exchange.rank import Ours


def planned(job: dict[str, Any]) -> dict[str, Any]:
    """Makes the plan as the command does, on the transport that the optimizer will use."""
    engine.api.init()
    transport = engine.transport(ops_for(torch.device("cpu")), engine.api.global_process_set)
    chosen = candidates.candidates(job["specs"], transport.size)
    shapes = {name: tuple(dims) for name, dims in job["shapes"].items()}
    found = perform(probed(Probe(transport), chosen, shapes, compute=0.0, exchanges=job["exchanges"]), transport, {})
    advice = plan.advise(rows_of(found))
    rows = [
        {"spec": r.spec, "predicted_ms": r.exchange_ms, "uncalibrated_ms": r.uncalibrated_ms, "exchanged": r.measured_ms is not None}
        for r in advice.rows
    ]
    return {"rows": rows, "recommended": advice.spec, "reason": advice.reason, "collectives": found[1].points}


def chosen(job: dict[str, Any], world: Any) -> dict[str, Any]:
    """Returns the spec that 'auto' picks from the same specs after two dense steps, and the times of its steps from then on."""
    system = Ours({**job, "argument": f"auto(steps=2, candidates={job['specs'][1:]})"}, world)
    system.warmups, system.least_warmups = 3, 2
    system.fresh()
    system.make()
    times = timing.run(world, system, before=None, budget=job["budget"])["times"]
    driver = system.optimizer._exchange.session.driver
    (number,) = {int(state["policy:choice"][0]) for state in driver.state.values()}
    return {"spec": str(driver.grace.leaves[number]), "times": times}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    world = HorovodWorld() if engine.ENGINE == "horovod" else DistWorld()
    seen = {"plan": planned(job), "times": {}}
    specs = [row["spec"] for row in seen["plan"]["rows"]]
    for spec in (*specs, *reversed(specs)):
        system = Ours({**job, "argument": spec}, world)
        system.fresh()
        system.make()
        seen["times"].setdefault(spec, []).append(timing.run(world, system, before=None, budget=job["budget"])["times"])
    seen["auto"] = chosen(job, world)
    (Path(job["out"]) / f"rank{world.rank}.json").write_text(json.dumps(seen))
    world.barrier()
    world.close()


if __name__ == "__main__":
    main()
