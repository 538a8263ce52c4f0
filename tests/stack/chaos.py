"""
What the chaos tests share: work for the DAG ``dubs``, blows, and the emulators' own count of what it cost.

``STACK_SEED`` repeats a run: the same blows in the same order, though not at the same microsecond.
``STACK_OVERDUBS`` is the number of overdubs, 200 by default.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stack.rest import Run, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from stack.airflow import Stack
    from stack.heygen import HeyGen

SEED = int(os.environ.get("STACK_SEED", random.SystemRandom().randrange(10**6)))
OVERDUBS = int(os.environ.get("STACK_OVERDUBS", "200"))
_numbers = itertools.count(1)


@dataclass
class Chaos:
    """A running stack and its emulators, by the name of the connection that leads to each."""

    stack: Stack
    servers: dict[str, HeyGen] = field(default_factory=dict)

    def add_server(self, name: str, **behaviour: Any) -> HeyGen:
        self.servers[name] = self.stack.heygen(**behaviour)
        # Silence is noticed soon.
        self.stack.connect(name, self.servers[name].connection(read_timeout=5, write_timeout=12))
        return self.servers[name]

    def dubs(self, entries: Iterable[dict[str, Any]], dag_id: str = "dubs") -> Dubs:
        return Dubs(self, list(entries), dag_id)

    def reset(self) -> None:
        for server in self.servers.values():
            server.admin("DELETE", "state")


class Dubs:
    """A run of a DAG of ``dubs.py``. Each entry gets a title of its own, by which its jobs are known."""

    def __init__(self, chaos: Chaos, entries: list[dict[str, Any]], dag_id: str) -> None:
        self.chaos = chaos
        self.entries = [{"title": f"dub {next(_numbers)}", **entry} for entry in entries]
        self.run = Run(chaos.stack.rest, dag_id, work=self.entries, defaults={"deferrable": True})
        self.names = [f"dub[{index}]" for index in range(len(self.entries))]

    def jobs(self) -> dict[str, list[dict[str, Any]]]:
        """The jobs that each task has started, by the task's name."""
        created = [job for server in self.chaos.servers.values() for job in server.jobs()]
        return {
            name: [job for job in created if job["title"] == entry["title"]]
            for name, entry in zip(self.names, self.entries, strict=True)
        }

    def all_created(self) -> bool:
        return all(self.jobs().values())

    def wait_until(self, *states: str) -> None:
        """Wait until all tasks are in one of these states."""

        def there() -> bool:
            now = self.run.states()
            return all(now.get(name) in states for name in self.names)

        wait_for(f"all to be {' or '.join(states)}", there)

    def ended(self) -> int:
        """How many tasks have ended."""
        states = self.run.states()
        return sum(states.get(name) in ("success", "failed") for name in self.names)

    def pids(self) -> dict[str, int]:
        """The processes of the tasks that are running."""
        tasks = self.run.tasks().items()
        return {name: task["pid"] for name, task in tasks if task["state"] == "running" and task["pid"]}

    def check(self, patience: float = 420) -> None:
        """Wait for the end: every task succeeded, with one job, whose id it returns."""
        report = self.report(patience)
        assert not report.wrong, report
        assert not report.orphans, report
        assert report.jobs == report.tasks, report

    def report(self, patience: float = 420) -> Report:
        tasks = self.run.wait(patience)
        report = Report(tasks=len(self.names))
        for name, jobs in self.jobs().items():
            report.jobs += len(jobs)
            report.jobs_per_task[len(jobs)] += 1
            if tasks[name]["state"] != "success":
                ended = f"{tasks[name]['state']} (try {tasks[name]['try_number']})"
                report.wrong.append(f"{name} {ended}, raised {dict(self.raised(name))}")
                followed = None
            else:
                followed = self.run.xcoms(name)["return_value"]
            report.orphans += [f"{job['id']} of {name}" for job in jobs if job["id"] != followed]
            report.tries[tasks[name]["try_number"]] += 1
        return report

    def raised(self, *names: str) -> Counter[str]:
        """Count the exceptions in the logs of all tries; a try that was failed by Airflow itself has none."""
        logs = [self.run.log(name, number) for name in names or self.names for number in self.run.tries(name)]
        return Counter(found for log in logs for found in re.findall(r"'exc_type': '(\w+)'", log))


@dataclass
class Report:
    """What a run has cost and given."""

    tasks: int
    jobs: int = 0
    jobs_per_task: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    tries: Counter[int] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{self.tasks} overdubs: {self.jobs / self.tasks:.2f} jobs each"
            f" (tasks by number of jobs: {dict(sorted(self.jobs_per_task.items()))}),"
            f" {len(self.wrong)} ended wrongly {self.wrong[:5]}, {len(self.orphans)} jobs orphaned"
            f" {self.orphans[:5]}, tasks by tries: {dict(sorted(self.tries.items()))}"
        )


def rage(
    dubs: Dubs,
    dice: random.Random,
    blows: Mapping[str, int],
    deal: Callable[[str], bool],
    pause: tuple[float, float],
    limit: float = 80.0 + OVERDUBS,
) -> Counter[str]:
    """
    Deal blows until nearly all tasks have ended, for ``limit`` seconds at most; return how many of each.

    Without a limit, faults of a server may come faster than triggers that back off use them up.

    :param blows: the weight of each.
    :param deal: deals one; ``False`` if there was nobody to hit.
    :param pause: the least and the greatest number of seconds between two.
    """
    dealt: Counter[str] = Counter()
    deck = dice.sample(list(blows), len(blows))  # each once, then by weight
    until = time.monotonic() + limit
    # The last few are left in peace, or it would never end for them.
    while dubs.ended() < 0.95 * len(dubs.names) and time.monotonic() < until:
        time.sleep(dice.uniform(*pause))
        kind = deck.pop() if deck else dice.choices(list(blows), list(blows.values()))[0]
        if deal(kind):
            dealt[kind] += 1
        else:
            deck.insert(0, kind)
    return dealt
