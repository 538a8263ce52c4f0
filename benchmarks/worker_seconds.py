"""
How long an overdub's wait holds a worker, with and without ``end_from_trigger``.

    python benchmarks/worker_seconds.py [--overdubs N]

A real Airflow (that of ``tests/stack``: LocalExecutor, on PostgreSQL if there is one) waits for twice N
overdubs of the emulator with deferred sensors; once all of them wait, the overdubs complete. Each start of a
task holds a worker for as long as the executor says; two run at a time, so that they do not slow each other.
Given are medians per overdub. Exits with an error unless ending from the trigger saves the second start.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from itertools import chain
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from stack.airflow import Stack, why_no_postgres  # noqa: E402
from stack.rest import Run, wait_for  # noqa: E402

ENDS = ("on_a_worker", "from_the_trigger")


def measure(count: int) -> dict[str, list[list[float]]]:
    """Give for each way to end, for each overdub, the seconds of each start of its task."""
    settings = {
        "AIRFLOW__CORE__DAGS_FOLDER": str(Path(__file__).resolve().parent / "dags"),
        "AIRFLOW__CORE__PARALLELISM": "2",
    }
    with Stack(postgres=not why_no_postgres(), settings=settings) as stack:
        heygen = stack.heygen(running_seconds=3600)
        overdubs = {end: [heygen.create(end) for _ in range(count)] for end in ENDS}
        for end, ids in overdubs.items():
            stack.env[end.upper()] = ",".join(ids)
        stack.connect("heygen_default", heygen.connection())
        stack.start("waiting")
        run = Run(stack.rest, "waiting")
        wait_for("all to wait", lambda: list(run.states().values()) == ["deferred"] * 2 * count)
        for overdub in chain(*overdubs.values()):
            heygen.force(overdub, "completed")
        tasks = run.wait().values()
        if any(task["state"] != "success" for task in tasks):
            sys.exit(f"The DAG did not succeed: {run.states()}")
        time.sleep(3)  # a task has ended a moment before its worker is free
        held = defaultdict(list)
        for task_instance, seconds in stack.workloads():
            held[task_instance].append(seconds)
    return {end: [held[task["id"]] for task in tasks if task["task_id"] == end] for end in ENDS}


def main() -> None:
    """Measure, print what the option saves."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--overdubs", type=int, default=8, metavar="N", help="default: %(default)s")
    found = measure(parser.parse_args().overdubs)

    print(f"\n{'the wait ends':18} {'starts per overdub':>18} {'worker-seconds per overdub':>28}")
    starts = {end: mean(map(len, held)) for end, held in found.items()}
    seconds = {end: median(map(sum, held)) for end, held in found.items()}
    for end in ENDS:
        print(f"{end.replace('_', ' '):18} {starts[end]:18.2f} {seconds[end]:28.2f}")
    worker, trigger = ENDS
    print(f"\nratio: {seconds[trigger] / seconds[worker]:.2f}")
    if starts[trigger] > 1:
        sys.exit("MISSED: a wait that ends from the trigger is to start one worker")


if __name__ == "__main__":
    main()
