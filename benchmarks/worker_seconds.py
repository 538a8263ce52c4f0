"""
How long an overdub's wait holds a worker, with and without ``end_from_trigger``.

    python benchmarks/worker_seconds.py [--overdubs N]

A real Airflow (that of ``tests/stack``: LocalExecutor, on PostgreSQL if there is one) runs a mapped, deferred
:class:`~airflow_provider_heygen.sensors.overdub.HeyGenOverdubSensor` over N overdubs of the emulator, which
complete when all of them wait. Each start of a task holds a worker for as long as Airflow's executor says;
two run at a time, so that they do not slow each other. Exits with an error unless ending from the trigger
saves the second start.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stack.heygen import HeyGen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from stack.airflow import Stack, why_no_postgres  # noqa: E402
from stack.rest import Run, wait_for  # noqa: E402

DAGS = ("on_a_worker", "from_the_trigger")


def measure(stack: Stack, heygen: HeyGen, dag_id: str, overdubs: list[str]) -> list[float]:
    """Run one of the DAGs; give the seconds of each start of a task."""
    begin = len(stack.output("scheduler"))
    run = Run(stack.rest, dag_id)
    wait_for("all to wait", lambda: list(run.states().values()) == ["deferred"] * len(overdubs))
    for overdub in overdubs:
        heygen.force(overdub, "completed")
    states = {name: task["state"] for name, task in run.wait().items()}
    if set(states.values()) != {"success"}:
        sys.exit(f"{dag_id} did not succeed: {states}")
    return stack.workloads(begin)


def main() -> None:
    """Measure both, print what the option saves."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--overdubs", type=int, default=8, metavar="N", help="default: %(default)s")
    count = parser.parse_args().overdubs

    settings = {
        "AIRFLOW__CORE__DAGS_FOLDER": str(Path(__file__).resolve().parent / "dags"),
        "AIRFLOW__CORE__PARALLELISM": "2",
    }
    with Stack(postgres=not why_no_postgres(), settings=settings) as stack:
        heygen = stack.heygen(running_seconds=3600)
        overdubs = {dag_id: [heygen.create(dag_id) for _ in range(count)] for dag_id in DAGS}
        for dag_id, ids in overdubs.items():
            stack.env[f"OVERDUBS_{dag_id.upper()}"] = ",".join(ids)
        stack.connect("heygen_default", heygen.connection())
        stack.start(*DAGS)
        found = {dag_id: measure(stack, heygen, dag_id, ids) for dag_id, ids in overdubs.items()}

    print(f"\n{'the wait ends':20} {'starts per overdub':>20} {'worker-seconds per overdub':>28}")
    for dag_id, durations in found.items():
        words = dag_id.replace("_", " ")
        print(f"{words:20} {len(durations) / count:20.2f} {sum(durations) / count:28.2f}")
    worker, trigger = (found[dag_id] for dag_id in DAGS)
    print(f"\nratio: {sum(trigger) / sum(worker):.2f}")
    if len(trigger) > count:
        sys.exit(f"MISSED: {len(trigger)} starts for {count} overdubs that end from the trigger")


if __name__ == "__main__":
    main()
