"""The queue for HeyGen's slots, against an account on a virtual clock."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from airflow_provider_heygen import poller, slots
from airflow_provider_heygen.slots import COUNT_SECONDS, SPREAD_SECONDS, Place, Slots
from airflow_provider_heygen.triggers.overdub import HeyGenSlotTrigger

JOB = 120.0
START = 4.0
"""Longest time until a released task sends its request, in seconds."""
REFUSED = 15.0


@dataclass
class World:
    """An account, its tasks, and the queues of some triggerers, second by second."""

    ceiling: int
    hidden: int = 0
    queues: list[Slots[int]] = field(default_factory=lambda: [Slots()])
    seed: int = 0
    now: float = 0.0
    jobs: dict[int, float] = field(default_factory=dict)
    starting: dict[int, float] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    idle: float = 0.0
    longest_idle: float = 0.0

    def __post_init__(self):
        self.dice = random.Random(self.seed)
        self.counts = [math.inf for _ in self.queues]

    @property
    def running(self):
        return {task for task, end in self.jobs.items() if end > self.now}

    def submit(self, task):
        self.attempts[task] = self.attempts.get(task, 0) + 1
        if len(self.running) + self.hidden < self.ceiling:
            assert task not in self.jobs, "it went out twice"
            self.jobs[task] = self.now + JOB
            self.order.append(task)
            return
        self.join(task, rejected_now=True)

    def join(self, task, *, rejected_now, since=None):
        number = self.dice.randrange(len(self.queues))
        place = Place(
            task if since is None else since, self.now + REFUSED if rejected_now else self.now, task
        )
        self.queues[number].join(place, rejected_now=rejected_now, resumed=self.attempts[task] > 1)
        self.counts[number] = min(self.counts[number], self.now + 1)

    def restart(self, number):
        """Another process takes over; what was learned is lost, the places are not."""
        places, self.queues[number] = self.queues[number].places, Slots()
        for place in places:
            self.queues[number].join(place, rejected_now=False, resumed=self.attempts[place.task] > 1)
        self.counts[number] = self.now + 1

    def second(self):
        self.now += 1
        for task in [task for task, at in self.starting.items() if at <= self.now]:
            del self.starting[task]
            self.submit(task)
        for number, queue in enumerate(self.queues):
            if self.counts[number] <= self.now and queue.places:
                for place in queue.count({str(task) for task in self.running}, self.now):
                    assert place.task not in self.starting, "it went out twice"
                    if place.task in self.lost:
                        self.lost.remove(place.task)
                        self.attempts[place.task] = math.inf
                    else:
                        self.starting[place.task] = self.now + self.dice.uniform(1, START)
                self.counts[number] = min(self.now + COUNT_SECONDS, queue.go_at)
        ready = [place for queue in self.queues for place in queue.places if place.not_before <= self.now]
        taken = len(self.running) + self.hidden + len(self.starting)
        self.idle = self.idle + 1 if ready and taken < self.ceiling else 0.0
        self.longest_idle = max(self.longest_idle, self.idle)

    def finish(self, tasks):
        limit = self.now + 20 * slots.LONGEST_PROBE_SECONDS + len(tasks) * (JOB + 30)
        while any(task not in self.jobs and self.attempts[task] != math.inf for task in tasks):
            self.second()
            assert self.now < limit, "somebody starves"


seeds = st.integers(0, 2**16)


@settings(max_examples=60, deadline=None)
@given(ceiling=st.integers(1, 12), tasks=st.integers(1, 60), seed=seeds)
def test_no_slot_is_free_for_long_and_the_order_is_kept(ceiling, tasks, seed):
    world = World(ceiling, seed=seed)
    for task in range(tasks):
        world.submit(task)
    world.finish(range(tasks))
    assert world.longest_idle <= 2 * COUNT_SECONDS + SPREAD_SECONDS
    # A task that is refused twice may be overtaken by two rounds of others.
    assert all(abs(place - task) <= max(10, 2 * ceiling) for place, task in enumerate(world.order))
    assert sum(world.attempts.values()) <= 2.5 * tasks + 5


@settings(max_examples=60, deadline=None)
@given(
    ceiling=st.integers(1, 12),
    triggerers=st.integers(1, 3),
    tasks=st.integers(1, 40),
    blows=st.lists(
        st.tuples(
            st.integers(1, 900),
            st.sampled_from(["restart", "hide", "show", "raise", "lower", "lose", "join"]),
        ),
        max_size=12,
    ),
    seed=seeds,
)
def test_no_task_starves_or_is_released_twice(ceiling, triggerers, tasks, blows, seed):
    note(f"seed {seed}")
    world = World(ceiling, queues=[Slots() for _ in range(triggerers)], seed=seed)
    everybody = list(range(tasks))
    for task in everybody:
        world.submit(task)
    for moment, blow in sorted(blows):
        while world.now < moment:
            world.second()
        if blow == "restart":
            world.restart(world.dice.randrange(triggerers))
        elif blow == "hide":
            world.hidden = min(world.hidden + 2, world.ceiling - 1)
        elif blow == "show":
            world.hidden = 0
        elif blow == "raise":
            world.ceiling += 5
        elif blow == "lower":
            world.ceiling = max(world.hidden + 1, world.ceiling - 3)
        elif blow == "lose":
            world.lost |= {world.dice.choice(everybody)} - set(world.jobs)
        else:
            everybody.append(len(everybody))
            world.submit(everybody[-1])
    world.finish(everybody)


def test_a_ceiling_that_the_user_knows_is_never_exceeded():
    world = World(20, queues=[Slots(ceiling=4)])
    for task in range(4):
        world.submit(task)
    for task in range(4, 30):
        world.attempts[task] = 1
        world.join(task, rejected_now=True)
    most = 0
    while len(world.jobs) < 30:
        world.second()
        most = max(most, len(world.running))
        assert world.now < 3000
    assert most == 4


def test_room_that_others_hide_is_found_by_probes_that_get_rarer():
    world = World(10, hidden=3)
    for task in range(100):
        world.submit(task)
    while world.now < 600:
        world.second()
    assert world.queues[0].limit == 7
    released = sum(world.attempts.values()) - 100
    assert released - (len(world.jobs) - 7) <= 8, "refused again"
    world.hidden = 0
    while world.queues[0].limit < 10:
        world.second()
        assert world.now < 600 + 2 * slots.LONGEST_PROBE_SECONDS


def test_places_are_kept_over_a_restart():
    world = World(2)
    for task in range(20):
        world.submit(task)
    while len(world.jobs) < 6:
        world.second()
    world.restart(0)
    world.finish(range(20))
    assert all(abs(place - task) <= 4 for place, task in enumerate(world.order))


def test_a_task_logs_how_many_wait_before_it():
    queue = Slots()
    assert [
        queue.join(Place(since, 0.0, since), rejected_now=True, resumed=False) for since in (5, 7, 6)
    ] == [
        0,
        1,
        1,
    ]


# --- One rule each ------------------------------------------------------------------------------------------


def jobs(count, first=0):
    return {f"job_{number}" for number in range(first, first + count)}


@pytest.fixture
def queue(monkeypatch):
    """A queue of twenty tasks on an account with ten slots, all taken; other room is used after 5 s."""
    monkeypatch.setattr(slots.random, "uniform", lambda first, last: (first + last) / 2)
    queue = Slots()
    for task in range(20):
        queue.join(Place(task, 0.0, task), rejected_now=task == 0, resumed=False)
    assert queue.count(jobs(10), 0.0) == []
    return queue


def released(queue, running, now):
    return [place.task for place in queue.count(running, now)]


def test_other_room_waits_for_its_moment_and_is_used_once(queue):
    assert released(queue, jobs(8), 10.0) == []
    assert queue.go_at == 15.0
    assert released(queue, jobs(8), 14.9) == []
    assert released(queue, jobs(8), 15.0) == [0, 1]
    assert queue.go_at == math.inf
    assert released(queue, jobs(8), 20.0) == [], "their jobs are not listed yet"
    assert released(queue, jobs(8) | jobs(2, 20), 30.0) == []


def test_room_that_is_gone_at_its_moment_is_forgotten(queue):
    assert released(queue, jobs(8), 10.0) == []
    assert released(queue, jobs(10), 15.0) == []
    assert queue.go_at == math.inf
    assert released(queue, jobs(9), 20.0) == [], "a new moment"
    assert queue.go_at == 25.0


def test_the_slot_of_an_awaited_overdub_is_used_at_once(queue):
    queue.ended = 1
    assert released(queue, jobs(8), 10.0) == [0], "and the other slot later"
    assert released(queue, jobs(8), 15.0) == [1]
    queue.ended = 3
    assert released(queue, jobs(10), 20.0) == [], "others were quicker"
    assert released(queue, jobs(9), 30.0) == [], "an end counts once"


def test_a_released_task_that_never_comes_back_frees_its_slot_after_two_minutes(queue):
    queue.ended = 1
    assert released(queue, jobs(9), 10.0) == [0]
    assert released(queue, jobs(9), 10.0 + slots.RELEASE_SECONDS - 0.1) == []
    assert queue.go_at == math.inf
    released(queue, jobs(9), 10.0 + slots.RELEASE_SECONDS)
    assert queue.go_at < math.inf


def test_each_rejection_takes_back_one_release(queue):
    queue.ended = 2
    assert released(queue, jobs(8), 10.0) == [0, 1]
    queue.join(Place(0, 25.0, 0), rejected_now=True, resumed=True)
    assert queue.count(jobs(8), 20.0) == []
    assert queue.limit == 8
    queue.ended = 1
    assert released(queue, jobs(7), 21.0) == [], "task 1 is still on its way"
    assert released(queue, jobs(7) | {"job of task 1"}, 26.0) == []


def test_a_first_rejection_teaches_the_limit_once_only(queue):
    queue.join(Place(30, 0.0, 30), rejected_now=True, resumed=False)
    queue.count(jobs(4), 10.0)
    assert queue.limit == 10
    queue.join(Place(31, 0.0, 31), rejected_now=False, resumed=True)  # after a restart
    queue.count(jobs(4), 11.0)
    assert queue.limit == 10


def test_a_task_is_ready_at_the_moment_that_heygen_asked_for():
    queue = Slots(1)
    queue.join(Place(1.0, 50.0, "task"), rejected_now=False, resumed=False)
    queue.ended = 1
    assert released(queue, set(), 49.9) == []
    queue.ended = 1
    assert released(queue, set(), 50.0) == ["task"]


def test_probes_double_their_pause_when_they_fail_and_their_size_when_they_succeed(queue):
    probes, now = [], 0.0
    while len(probes) < 6:
        now += 10.0
        for place in queue.count(jobs(10), now):
            probes.append(now)
            queue.join(place, rejected_now=True, resumed=True)
    gaps = [later - before for before, later in itertools.pairwise(probes)]
    assert gaps == [
        60.0,
        120.0,
        240.0,
        480.0,
        600.0,
    ]
    running, sizes = jobs(10), []
    while len(sizes) < 3:
        now += 10.0
        if going := queue.count(running, now):
            sizes.append(len(going))
            running = jobs(len(running) + len(going))
    assert sizes == [1, 2, 4]
    assert queue.limit == 13


def test_no_probe_goes_beyond_the_ceiling():
    queue = Slots(3)
    queue.join(Place(1.0, 0.0, "task"), rejected_now=True, resumed=False)
    assert [queue.count(jobs(3), now) for now in (0.0, 100.0, 1000.0)] == [[], [], []]
    assert queue.limit == 3


def test_the_first_rejection_shows_the_limit_and_later_first_ones_do_not():
    queue = Slots()
    for number, (count, limit) in enumerate([(4, 4), (2, 4), (2, 4)]):
        queue.join(Place(number, 0.0, number), rejected_now=True, resumed=False)
        queue.count(jobs(count), number * 1.0)
        assert queue.limit == limit
    queue.join(Place(9, 0.0, 9), rejected_now=True, resumed=True)
    queue.count(jobs(2), 9.0)
    assert queue.limit == 2, "a released task that is rejected does show it"


def test_a_task_that_joins_after_a_restart_takes_back_no_release(queue):
    queue.ended = 2
    assert released(queue, jobs(8), 10.0) == [0, 1]
    queue.join(Place(40, 0.0, 40), rejected_now=False, resumed=True)
    assert released(queue, jobs(8), 20.0) == []
    assert queue.go_at == math.inf


@pytest.mark.parametrize(("ahead", "least", "most"), [(20, 14, 15), (-100_000, 899, 900)])
def test_a_wrong_clock_makes_no_deferral_too_short_or_endless(heygen, ahead, least, most):
    """The triggerer's clock is ahead of the worker's, or behind it."""

    async def wait():
        then = time.time() - ahead  # when the worker's clock allows a request
        trigger = HeyGenSlotTrigger(heygen_conn_id="heygen_default", since=then, not_before=then)
        ended = asyncio.ensure_future(anext(trigger.run()))
        await asyncio.sleep(0.1)
        (place,) = poller._poller("heygen_default").slots.places
        ended.cancel()
        await asyncio.wait([ended])
        return place.not_before - asyncio.get_running_loop().time()

    assert least < asyncio.run(wait()) <= most


@pytest.mark.parametrize("triggerers", [1, 2])
def test_the_model_of_a_night(monkeypatch, triggerers):
    """The real operator, triggers, poller and queue on a virtual clock; the benchmark has 500 tasks."""
    path = Path(__file__).parent.parent / "benchmarks" / "queueing.py"
    spec = importlib.util.spec_from_file_location("queueing", path)
    model = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "queueing", model)
    spec.loader.exec_module(model)
    monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", '{"conn_type": "heygen", "password": "k"}')
    figures = model.simulate(model.Case(n=60, triggerers=triggerers))
    assert figures["failed"] == 0
    assert figures["creates"] <= 1.5 + triggerers
    assert figures["starts"] <= 2.5 + triggerers
    assert figures["makespan"] <= 1.06
    assert figures["order"] <= 10 * triggerers
