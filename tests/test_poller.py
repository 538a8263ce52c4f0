"""The poller that all waiting triggers share: on a simulated clock and server, and against the emulator."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import json
import logging
import math
import random
import re
import selectors
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from airflow.exceptions import AirflowNotFoundException
from airflow.models import Connection
from airflow.providers.common.compat import connection as compat
from conftest import forward
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from airflow_provider_heygen import api, poller, transport, waiting
from airflow_provider_heygen.connection import HeyGenConnection
from airflow_provider_heygen.exceptions import HeyGenTransientError
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger
from airflow_provider_heygen.waiting import OverdubWait

EPOCH = 1_800_000_000.0
REFUSED = {"error": {"code": "refused", "message": "HeyGen itself says so."}}

# --- A clock and a server to turn by hand ---------------------------------------------------------------


class Deadlock(AssertionError):
    """Everybody waits and nothing will ever happen."""


class _Jump(selectors.SelectSelector):
    def select(self, timeout=None):
        if timeout is None:
            raise Deadlock
        self.loop.now += max(0.0, timeout)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop that does not sleep: its clock jumps to the next moment at which something happens."""

    def __init__(self):
        self.now = 0.0
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)

    def time(self):
        return self.now


@dataclass
class Server:
    """What HeyGen could be like. Times are seconds of the clock, ``ends`` when and how jobs end."""

    ends: dict[str, tuple[float, str]] = field(default_factory=dict)  # "gone": deleted then
    order: str = "desc"
    latency: float = 0.02
    page_latency: float | None = None
    page_lag: float = 0.0
    lacking: tuple[str, ...] = ()  # what rows of the list do not have
    list_status: int = 200
    bulk_status: int = 404
    resource: str = "overdubs"
    rate: float = 5.0
    key: str = "key-1"
    connection_key: str | None = None  # the same, unless given
    look_up_seconds: float = 0.0
    look_up_fails: tuple[float, float] = (math.inf, math.inf)  # from, until
    clock_is_off: float = 0.0
    hangs: str = ""  # what never responds: "list", "bulk" or "get"
    faults: list[tuple[float, float, str, float]] = field(default_factory=list)  # from, until, kind, share
    poison: set[str] = field(default_factory=set)
    seed: int = 0
    loop: Any = None
    requests: list[tuple[float, str]] = field(default_factory=list)
    open_sessions: int = 0
    refused: int = 0

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.ids = list(self.ends)
        self.some_go = any(word == "gone" for _, word in self.ends.values())
        self.shuffled = {}

    def status(self, overdub_id, at):
        moment, word = self.ends[overdub_id]
        return word if at >= moment else "running"

    def row(self, overdub_id, at, lacking=()):
        status = self.status(overdub_id, at)
        row = {
            "id": overdub_id,
            "status": status,
            "title": f"Title of {overdub_id}",
            "duration": 1.0,
            "video_url": None,
            "callback_id": f"cb-{overdub_id}",
            "created_at": int(EPOCH),
            "failure_message": "no face" if status == "failed" else None,
        }
        return {name: value for name, value in row.items() if name not in lacking}

    def answer(self, call, key):
        now, path = self.loop.now, call.path
        kind = "bulk" if path.endswith("/statuses") else "list" if path.count("/") == 2 else "get"
        for begin, end, fault, share in self.faults:
            if begin <= now < end and self.random.random() < share:
                if fault == "dropped":
                    raise HeyGenTransientError("ServerDisconnectedError")
                status, _, after = fault.partition("/")
                return int(status), {"Retry-After": after} if after else {}, {"error": {"code": "fault"}}
        if key != self.key:
            self.refused += 1
            return 401, {}, {"error": {"code": "unauthorized"}}
        if kind == "list":
            if self.list_status != 200:
                return self.list_status, {}, REFUSED
            return 200, {}, self.page(call.params.get("token", ""), now)
        if kind == "bulk":
            if self.bulk_status != 200:
                return self.bulk_status, {}, REFUSED
            ids = call.params["lipsync_ids"].split(",")
            assert len(ids) <= 100
            words = {"running": "processing", "gone": "not_found"}
            said = {i: self.status(i, now - self.page_lag) for i in ids}
            return 200, {}, {"data": [{"video_id": i, "status": words.get(w, w)} for i, w in said.items()]}
        overdub_id = unquote(path.rpartition("/")[2])
        if overdub_id in self.poison:
            return 500, {}, {}
        if overdub_id not in self.ends or self.status(overdub_id, now) == "gone":
            return 404, {}, {"error": {"code": "not_found"}}
        return 200, {}, {"data": self.row(overdub_id, now)}

    def page(self, token, now):
        """One page; the order is that of the whole listing, however many orders there are."""
        seed, _, first = token.partition(":")
        seed, first = seed or str(self.random.random()), int(first or 0)
        if self.order == "shuffle" and seed not in self.shuffled:
            self.shuffled = {seed: random.Random(seed).sample(self.ids, len(self.ids))}
        ids = self.shuffled[seed] if self.order == "shuffle" else self.ids
        ids = [i for i in ids if self.status(i, now) != "gone"] if self.some_go else ids
        end = len(ids) - first
        some = ids[max(0, end - 100) : end][::-1] if self.order == "desc" else ids[first : first + 100]
        rows = [self.row(i, now - self.page_lag, self.lacking) for i in some]
        more = first + 100 < len(ids)
        return {"data": rows, "has_more": more, "next_token": f"{seed}:{first + 100}" if more else None}

    @property
    def kinds(self):
        return Counter(kind for _, kind in self.requests)

    def check_rate(self):
        times = sorted(moment for moment, _ in self.requests)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert min(gaps, default=math.inf) >= 1 / self.rate - 1e-6


class Hook:
    """Stands in for HeyGenHook: the real calls and the real parsing of responses, without a network."""

    def __init__(self, server, conn_id, max_attempts):
        self.server = server
        self.resource = server.resource
        self.settings = HeyGenConnection(
            conn_id=conn_id,
            base_url="https://x.y",
            credential=server.connection_key or server.key,
            resource=server.resource,
            max_requests_per_second=server.rate,
        )

    async def asettings(self):
        await asyncio.sleep(self.server.look_up_seconds)
        begin, end = self.server.look_up_fails
        if begin <= self.server.loop.now < end:
            raise AirflowNotFoundException("the API server is away, which Airflow puts like this")
        return self.settings

    def assume_resource(self, name):
        pass

    async def __aenter__(self):
        self.server.open_sessions += 1

    async def __aexit__(self, *_):
        self.server.open_sessions -= 1

    async def asend(self, call):
        server, call = self.server, call.under(self.resource)
        listing = call.path.count("/") == 2
        kind = "bulk" if call.path.endswith("/statuses") else "list" if listing else "get"
        server.requests.append((server.loop.now, kind))
        if kind == server.hangs:
            await asyncio.sleep(self.settings.connect_timeout + self.settings.read_timeout)
            raise HeyGenTransientError("TimeoutError")
        latency = server.page_latency if listing and server.page_latency is not None else server.latency
        await asyncio.sleep(latency / 2)
        status, headers, body = server.answer(call, self.settings.credential.get_secret_value())
        await asyncio.sleep(latency / 2)
        return call.parse(status, headers, json.dumps(body).encode(), self.settings)


class Log:
    def __init__(self):
        self.lines = []

    def info(self, text, *values):
        self.lines.append(text % values)

    warning = info


def watch(overdub_id, poke_interval=5.0, deadline=None, **changes):
    return OverdubWait(
        overdub_id,
        poke_interval=poke_interval,
        deadline=None if deadline is None else EPOCH + deadline,
        not_found_until=0.0,
        log=Log(),
        **changes,
    )


@contextmanager
def simulation(server):
    """Have the poller talk to a simulated server on a simulated clock."""
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        server.loop = runner.get_loop()
        patch.setattr(poller, "HeyGenHook", lambda conn_id, max_attempts: Hook(server, conn_id, max_attempts))
        times = {
            "time": lambda: EPOCH + server.loop.now + server.clock_is_off,
            "monotonic": server.loop.time,
        }
        patch.setattr(waiting, "time", SimpleNamespace(**times))
        yield runner
        assert server.open_sessions == 0


def poller_of(server):
    return poller._pollers[server.loop, "heygen_default"]


@dataclass
class Ending:
    at: float
    event: dict[str, Any]
    watch: OverdubWait


def run(server, watches, joins=None, leaves=None, meanwhile=None):
    """Wait for all of them; return how each ended. ``joins`` and ``leaves`` are moments by number."""

    async def one(number, rules):
        await asyncio.sleep((joins or {}).get(number, 0.0))
        waits = asyncio.ensure_future(poller.wait("heygen_default", rules))
        left = (leaves or {}).get(number)
        if left is not None:
            await asyncio.wait([waits], timeout=left)
            if not waits.done():
                waits.cancel()
                await asyncio.wait([waits])
                return None
        event = await waits
        return Ending(server.loop.now, event, rules)

    async def main():
        tasks = [asyncio.create_task(one(number, rules)) for number, rules in enumerate(watches)]
        if meanwhile:
            tasks.append(asyncio.create_task(meanwhile()))
        async with asyncio.timeout(20_000):  # a wait that never ends must fail the test, not hang it
            ends = await asyncio.gather(*tasks)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return ends[: len(watches)]

    with simulation(server) as runner:
        ends = runner.run(main())
    server.check_rate()
    return ends


def late(server, ends):
    """How late each end was noticed, sorted."""
    return sorted(end.at - server.ends[end.event["overdub_id"]][0] for end in ends)


def jobs(count, first_end=60.0, spread=60.0, word="completed", prefix="od", seed=1):
    dice = random.Random(seed)
    return {f"{prefix}_{n}": (first_end + dice.random() * spread, word) for n in range(count)}


def mixed(ours, foreign_per_job, seed=2):
    """Awaited jobs among foreign ones, which have ended long ago."""
    others = [(f"other_{n}", (-1.0, "completed")) for n in range(len(ours) * foreign_per_job)]
    every = list(ours.items()) + others
    random.Random(seed).shuffle(every)
    return dict(every)


# --- Any server, any course of events -------------------------------------------------------------------

moments = st.floats(0, 120)


LEAN = ("callback_id", "failure_message")  # as in the vendor's sample of the list


@st.composite
def worlds(draw):
    count = draw(st.integers(1, 40) | st.just(110))  # more than a page
    seed = draw(st.integers(0, 2**16))
    dice = random.Random(seed)
    longest = draw(st.sampled_from([10, 60, 300]))
    words = draw(st.sampled_from([["completed"], ["completed", "completed", "failed", "gone"]]))
    # Only the list can tell that an overdub is gone.
    list_status = 200 if "gone" in words else draw(st.sampled_from([200, 200, 404, 500]))
    ours = {f"od_{n}": (dice.random() * longest, dice.choice(words)) for n in range(count)}
    server = Server(
        mixed(ours, draw(st.sampled_from([0, 0, 1, 9]))),
        order=draw(st.sampled_from(["desc", "asc", "shuffle"])),
        latency=draw(st.sampled_from([0.0, 0.02, 1.5])),
        page_latency=draw(st.sampled_from([None, None, 4.0])),
        page_lag=draw(st.sampled_from([0, 0, 3, 1e9])),
        lacking=draw(st.sampled_from([(), LEAN])),
        list_status=list_status,
        bulk_status=draw(st.sampled_from([200, 404, 503])),
        resource=draw(st.sampled_from(["overdubs", "lipsyncs"])),
        rate=draw(st.sampled_from([5.0, 20.0, 100.0])),
        faults=draw(
            st.lists(
                st.tuples(
                    moments,
                    st.floats(0, 30),
                    st.sampled_from(["503", "429/2", "429", "dropped"]),
                    st.sampled_from([0.3, 1.0]),
                ).map(lambda fault: (fault[0], fault[0] + fault[1], *fault[2:])),
                max_size=3,
            )
        ),
        seed=seed,
    )
    names = [dice.choice(list(ours)) for _ in range(3)] + list(ours)  # some overdubs are awaited twice
    watches = [watch(name, dice.choice([1.0, 5.0, 5.0, 30.0])) for name in names]
    joins = {n: dice.random() * 40 for n in range(len(names)) if draw_share(dice, 0.5)}
    leaves = {n: dice.random() * 40 for n in range(len(names)) if draw_share(dice, 0.1)}
    return server, watches, joins, leaves


def draw_share(dice, share):
    return dice.random() < share


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds())
def test_every_wait_ends_as_its_overdub_did(world):
    """On any server, a wait ends as its overdub did, and not before it."""
    server, watches, joins, leaves = world
    ends = run(server, watches, joins, leaves)
    for number, end in enumerate(ends):
        if end is None:
            assert number in leaves
            continue
        moment, word = server.ends[end.event["overdub_id"]]
        assert end.event["status"] == word
        assert end.at >= moment
        if word == "completed":
            assert end.event["overdub"]["callback_id"] == f"cb-{end.event['overdub_id']}"
        if word == "failed":
            assert "no face" in end.event["message"]


# --- What it costs, and how soon it notices -------------------------------------------------------------


def asked(server, begin, end):
    """Count the requests of a stretch of time, by kind."""
    return Counter(kind for moment, kind in server.requests if begin <= moment < end)


@pytest.mark.parametrize("order", ["desc", "asc", "shuffle"])
def test_a_thousand_waits_cost_ten_pages(order):
    server = Server(jobs(1000), order=order)
    ends = run(server, [watch(name) for name in server.ends])
    steady = asked(server, 10, 60)
    assert 100 <= steady["list"] <= 110  # ten times ten pages
    assert steady["get"] <= 11  # one each 5 s, to see that the list is right
    assert late(server, ends)[989] < 7.5


def test_a_frequent_poller():
    server = Server(jobs(1000), rate=20.0)
    ends = run(server, [watch(name, 1.0) for name in server.ends])
    assert asked(server, 10, 60).total() <= 520
    assert late(server, ends)[989] < 1.6


def test_three_thousand_waits_at_the_cap():
    server = Server(jobs(3_000), rate=6.0)  # a sweep of 30 pages takes 5 s; benchmarks/polling.py has 10,000
    ends = run(server, [watch(name) for name in server.ends])
    assert late(server, ends)[2969] <= 1.3 * 30 / 6.0


def test_a_thousand_waits_that_stop_and_start_again():
    """As when a triggerer is restarted; that the rate is kept to is seen in ``run``."""
    server = Server(jobs(1000, first_end=20.0))
    names = list(server.ends)
    stopped = dict.fromkeys(range(1000), 30.0)
    anew = dict.fromkeys(range(1000, 2000), 31.0)
    ends = run(server, [watch(name) for name in names * 2], joins=anew, leaves=stopped)
    before, after = ends[:1000], ends[1000:]
    assert 0 < sum(end is not None for end in before) < 1000
    assert [(end.event["overdub_id"], end.event["status"]) for end in after] == [
        (name, "completed") for name in names
    ]
    assert all(end.at - max(31.0, server.ends[name][0]) < 7.5 for name, end in zip(names, after, strict=True))


def test_the_bulk_endpoint_of_lipsyncs():
    server = Server(jobs(1000, spread=300), resource="lipsyncs", bulk_status=200, order="shuffle")
    ends = run(server, [watch(name) for name in server.ends])
    steady = asked(server, 10, 60)
    assert steady["list"] == 0
    assert 100 <= steady["bulk"] <= 120
    assert steady["get"] <= 11
    assert {end.event["status"] for end in ends} == {"completed"}


@pytest.mark.parametrize("waits", [1, 2])
def test_few_waits_get_a_get_each(waits):
    server = Server(mixed(jobs(waits), 50))
    ends = run(server, [watch(f"od_{n}") for n in range(waits)])
    assert server.kinds["list"] == 0
    assert asked(server, 0, 60)["get"] <= 13 * waits
    assert late(server, ends)[-1] < 6


@pytest.mark.parametrize(
    ("foreign", "order"), [(1, "desc"), (9, "desc"), (9, "asc"), (9, "shuffle"), (99, "shuffle")]
)
def test_foreign_jobs_never_cost_more_than_a_get_each(foreign, order):
    """The poller reads the list among other overdubs only as far as that is cheaper than GETs."""
    waits = 200
    server = Server(mixed(jobs(waits, first_end=200, spread=1), foreign), order=order, rate=100.0)
    run(server, [watch(f"od_{n}") for n in range(waits)])
    per_round = asked(server, 100, 200).total() / 20
    assert per_round <= min(waits * 1.01, (foreign + 1) * waits / 100 + 2)
    if foreign == 99:
        assert asked(server, 100, 200)["list"] <= 120  # a page takes the CPU of several GETs


def test_one_slow_page_does_not_suspend_the_list():
    server = Server(jobs(20, first_end=600))

    async def hiccup():
        await asyncio.sleep(30)
        server.page_latency = 9.0
        await asyncio.sleep(10)
        server.page_latency = None

    run(server, [watch(name) for name in server.ends], meanwhile=hiccup)
    assert asked(server, 300, 600)["get"] <= 61


def test_slow_pages_are_replaced_by_concurrent_gets():
    """20 pages of 3 s each would take a minute."""
    server = Server(mixed(jobs(200, first_end=120), 9), page_latency=3.0, rate=100.0)
    ends = run(server, [watch(f"od_{n}") for n in range(200)])
    assert asked(server, 20, 120)["list"] <= 2 * 20
    assert late(server, ends)[-1] < 12


def test_the_slower_its_pages_the_less_a_list_is_tried():
    server = Server(jobs(200, spread=400), page_latency=25.0, rate=100.0)
    ends = run(server, [watch(name) for name in server.ends])
    assert late(server, ends)[180] < 6


@pytest.mark.parametrize("order", ["desc", "asc", "shuffle"])
def test_an_old_account(order):
    waits = 200
    old = {f"old_{n}": (-1.0, "completed") for n in range(20_000)}
    server = Server(old | jobs(waits), order=order)
    ends = run(server, [watch(f"od_{n}") for n in range(waits)])
    assert len(ends) == waits
    assert {end.event["status"] for end in ends} == {"completed"}
    if order == "desc":
        assert asked(server, 20, 60).total() <= 9 * 3
        assert late(server, ends)[197] < 6
    else:
        assert late(server, ends)[-1] < 2 * waits / 5 + 10  # a GET each, at the cap


def test_waits_that_join_one_by_one_meet_in_one_tick():
    server = Server(jobs(100, first_end=200))
    run(server, [watch(f"od_{n}") for n in range(100)], joins={n: n * 0.3 for n in range(100)})
    assert asked(server, 60, 200).total() <= 29 * 2


def test_a_new_wait_is_polled_soon():
    server = Server({"od_0": (-1.0, "completed"), "od_1": (90.0, "completed")})
    ends = run(server, [watch("od_0", 60.0), watch("od_1", 60.0)], joins={0: 20.0})
    assert ends[0].at < 20.5


@pytest.mark.parametrize("begins", [1, 7, 13, 19, 25])
def test_no_poll_is_later_than_its_interval(begins):
    server = Server({"od_0": (9e9, "completed")})
    run(server, [watch("od_0", 30.0)], joins={0: begins}, leaves={0: 200.0})
    gaps = [later - before for (before, _), (later, _) in itertools.pairwise(server.requests)]
    assert max(gaps) < 1.15 * 30
    assert len(gaps) <= 7


def test_the_shortest_interval_for_an_overdub_serves_all():
    server = Server({"od_0": (31.0, "completed")})
    ends = run(server, [watch("od_0", 300.0), watch("od_0", 1.0)])
    assert all(end.at < 33 for end in ends)


def test_a_frequent_wait_that_has_left_speeds_up_no_other():
    server = Server({"od_0": (60.0, "completed")})
    intervals = []

    async def look():
        for moment in (5, 15):
            await asyncio.sleep(moment - server.loop.now)
            (job,) = [
                job
                for key, found in poller._pollers.items()
                if key[0] is server.loop
                for job in found.jobs.values()
            ]
            intervals.append(job.interval)

    run(server, [watch("od_0", 1.0), watch("od_0", 30.0)], leaves={0: 10.0}, meanwhile=look)
    assert intervals == [1.0, 30.0]
    assert len([1 for moment, _ in server.requests if moment > 12]) <= 6


def test_slow_waits_are_not_polled_because_of_a_frequent_one():
    server = Server(jobs(50, first_end=300, spread=1))
    run(server, [watch(f"od_{n}", 1.0 if n == 0 else 100.0) for n in range(50)])
    assert asked(server, 10, 300)["list"] <= 4
    assert asked(server, 10, 300)["get"] <= 300


@pytest.mark.parametrize("joins", [10.0, 50.0])
def test_a_frequent_wait_is_not_queued_behind_many_slow_ones(joins):
    server = Server(jobs(500, first_end=9e9) | {"eager": (80.0, "completed")}, list_status=404)
    watches = [watch(name, 5.0 if name == "eager" else 3600.0) for name in server.ends]
    ends = run(server, watches, joins={500: joins}, leaves=dict.fromkeys(range(500), 100.0))
    assert late(server, ends[500:])[-1] < 12


def test_a_frequent_wait_is_not_queued_behind_what_429_delayed():
    server = Server(jobs(500, first_end=9e9) | {"eager": (60.0, "completed")}, list_status=404)
    server.faults = [(12.0, 14.0, "429/60", 1.0)]
    watches = [watch(name, 5.0 if name == "eager" else 3600.0) for name in server.ends]
    ends = run(server, watches, joins={500: 40.0}, leaves=dict.fromkeys(range(500), 200.0))
    resumed = next(moment for moment, _ in server.requests if moment > 50)
    assert ends[500].at < resumed + 12


def test_a_slow_wait_is_not_forgotten_among_many_frequent_ones():
    server = Server(jobs(300, first_end=9e9) | {"slow": (80.0, "completed")}, list_status=404)
    watches = [watch(name, 100.0 if name == "slow" else 1.0) for name in server.ends]
    ends = run(server, watches, leaves=dict.fromkeys(range(300), 300.0))
    assert ends[300].at < 250


# --- What the list does not tell ------------------------------------------------------------------------


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
@pytest.mark.parametrize("lag", [3.0, 60.0, 1e9], ids=["a little", "a minute", "for ever"])
def test_a_list_that_lags_behind(lag, resource):
    server = Server(jobs(20, spread=20), page_lag=lag, resource=resource, bulk_status=200)
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    # One GET each 5 s finds the first, ten seconds later the list is out, and the others get a GET each.
    assert late(server, ends)[-1] < {3.0: 10, 60.0: 60, 1e9: 60}[lag]


def test_a_list_that_lags_behind_is_found_out_however_scarce_gets_are():
    server = Server(jobs(60, 30, 30, prefix="listed") | jobs(600, 400, prefix="hidden"), page_lag=1e9)
    server.ids = [name for name in server.ends if name.startswith("listed")]
    ends = run(server, [watch(name) for name in server.ends])
    assert late(server, ends[:60])[-1] < 200


def test_an_overdub_deleted_after_its_end_does_not_suspend_the_bulk_endpoint(caplog):
    class Deleting(Server):
        def status(self, overdub_id, at):
            word = super().status(overdub_id, at)
            return "gone" if overdub_id in deleted and at >= deleted[overdub_id] else word

    deleted = {}
    server = Deleting(jobs(60, 20, 200), resource="lipsyncs", bulk_status=200)

    async def one(name):
        await poller.wait("heygen_default", watch(name, 30.0))
        deleted[name] = server.loop.now + 2

    with simulation(server) as runner, caplog.at_level(logging.INFO, poller.__name__):
        runner.run(gather(one, server.ends))
    assert "Doing without" not in caplog.text


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
def test_status_words_in_capitals_suspend_nothing(resource, caplog):
    class Shouting(Server):
        def answer(self, call, key):
            status, headers, body = super().answer(call, key)
            text = re.sub('(?<="status": )".*?"', lambda word: word[0].upper(), json.dumps(body))
            return status, headers, json.loads(text)

    server = Shouting(jobs(60, 20, 200), resource=resource, bulk_status=200)
    with caplog.at_level(logging.INFO, poller.__name__):
        ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert "Doing without" not in caplog.text
    assert "unknown status" not in caplog.text


@pytest.mark.parametrize("name", ["title", "duration", "callback_id", "created_at", "failure_message"])
def test_rows_that_lack_something_are_completed_by_a_get(name):
    ends = {f"od_{n}": (20.0 + n, "failed" if n % 2 else "completed") for n in range(10)}
    server = Server(ends, lacking=(name,))
    for end in run(server, [watch(i) for i in server.ends]):
        if end.event["status"] == "completed":
            assert end.event["overdub"][name] == server.row(end.event["overdub_id"], end.at)[name]
        else:
            assert "no face" in end.event["message"]


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
def test_a_final_overdub_is_not_polled_again_before_its_get(resource):
    server = Server(jobs(300, spread=1), resource=resource, bulk_status=200, lacking=LEAN)
    ends = run(server, [watch(name) for name in server.ends])
    assert asked(server, 65, 200)["list"] + asked(server, 65, 200)["bulk"] <= 10
    assert late(server, ends)[-1] < 300 / 5 + 8


def test_a_deleted_overdub_ends_its_own_wait_only():
    server = Server(jobs(30) | {"gone": (20.0, "gone")})
    ends = run(server, [watch(name) for name in server.ends])
    by_id = {end.event["overdub_id"]: end for end in ends}
    assert by_id["gone"].event["status"] == "gone"
    assert "404" in by_id["gone"].event["message"]
    assert 20 + waiting.GONE_SECONDS <= by_id["gone"].at < 20 + 2 * waiting.GONE_SECONDS
    assert Counter(end.event["status"] for end in ends) == {"completed": 30, "gone": 1}


def test_what_is_gone_is_found_although_the_list_lags():
    others = jobs(20) | jobs(20, first_end=2000.0, prefix="late")
    server = Server(others | {"gone": (200.0, "gone")}, page_lag=1e9, rate=100.0)
    *ends, gone = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert (gone.event["status"], gone.at < 300) == ("gone", True)


@pytest.mark.parametrize("list_status", [200, 403, 503])
def test_404_on_an_overdub_that_the_list_may_contain(list_status):
    """A gateway or a replica of HeyGen may return it, too; it applies only together with the list."""
    server = Server({"od_0": (300.0, "completed")}, list_status=list_status)
    answer = server.answer

    def missing(call, key):
        if call.path.endswith("/od_0") and server.loop.now < 200:
            return 404, {}, {"error": {"code": "not_found"}}
        return answer(call, key)

    server.answer = missing
    (end,) = run(server, [watch("od_0")])
    assert end.event["status"] == "completed"


def test_a_list_with_circular_cursors_proves_nothing():
    server = Server({"od_0": (300.0, "completed")})
    answer = server.answer

    def circles(call, key):
        if server.loop.now < 200 and call.path.count("/") == 2:
            return 200, {}, {"data": [], "has_more": True, "next_token": "x"}
        if server.loop.now < 200:
            return 404, {}, {"error": {"code": "not_found"}}
        return answer(call, key)

    server.answer = circles
    (end,) = run(server, [watch("od_0")])
    assert end.event["status"] == "completed"


def test_many_that_are_gone_share_the_reading_of_the_list():
    server = Server(jobs(100, 20, 1, word="gone") | jobs(300, first_end=200, prefix="other"), rate=20.0)
    ends = run(server, [watch(name) for name in list(server.ends)[:100]])
    assert {end.event["status"] for end in ends} == {"gone"}
    assert server.kinds["list"] <= 3 * 100 / 5


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
@pytest.mark.parametrize("status", [None, 4, ["completed"]], ids=str)
def test_rows_without_a_status_prove_nothing(resource, status, monkeypatch):
    server = Server(jobs(20), resource=resource, bulk_status=200)
    answer = server.answer

    def half(call, key):
        code, headers, body = answer(call, key)
        for row in body["data"] if isinstance(body.get("data"), list) else ():
            row["status"] = status
        return code, headers, body

    monkeypatch.setattr(server, "answer", half)
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert late(server, ends)[-1] < 10


@pytest.mark.parametrize("tokens", ["the same", "new ones"])
def test_a_list_without_end(tokens, monkeypatch):
    """Its first page comes again and again."""
    server = Server(jobs(200))
    page = server.page
    numbers = itertools.count()

    def endless(_, now):
        token = "x" if tokens == "the same" else f"x{next(numbers)}"
        return {**page("", now), "has_more": True, "next_token": token}

    monkeypatch.setattr(server, "page", endless)
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    # A hundred are in no page and get a GET each, after a search that costs no more than a GET for all.
    searched = 12 if tokens == "the same" else 200 / 2
    assert asked(server, 0, 30)["list"] <= searched + 10
    assert late(server, ends)[-1] < (100 + searched) / 5 + 10


@pytest.mark.parametrize("order", ["desc", "asc"])
def test_pages_that_shift_while_they_are_read(order):
    """Two others' jobs arrive each second, and two are deleted, at both ends and between."""

    class Busy(Server):
        def page(self, token, now):
            while len(arrived) < 2 * now:
                arrived.append(f"new_{len(arrived)}")
                self.ends[arrived[-1]] = (9e9, "completed")
                self.ids.append(arrived[-1])
                self.ids.remove(self.random.choice([i for i in self.ids if i.startswith("other")]))
            return super().page(token, now)

    arrived = []
    server = Busy(mixed(jobs(300), 3), order=order, rate=10.0)
    ends = run(server, [watch(f"od_{n}") for n in range(300)])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert late(server, ends)[-1] < 15
    assert asked(server, 10, 60).total() <= 10 * (15 + 5)


def test_ids_that_look_alike():
    names = ["od_1", "OD_1", "od-1", "od.1", "od:1", "od~1", "\u00f6d", "o\u0308d", "1", "01", "od_1,od-1"]
    for resource in ("overdubs", "lipsyncs"):
        words = itertools.cycle(["completed", "failed"])
        server = Server({name: (20.0, next(words)) for name in names}, resource=resource, bulk_status=200)
        ends = run(server, [watch(name) for name in names])
        assert [end.event["overdub_id"] for end in ends] == names
        assert [end.event["status"] for end in ends] == [server.ends[name][1] for name in names]


@pytest.mark.parametrize("list_status", [200, 404])
def test_an_id_that_a_template_made_a_number(list_status):
    server = Server({str(n): (20.0, "completed") for n in range(5)}, list_status=list_status)
    ends = run(server, [watch(n) for n in range(5)])
    assert [end.event["overdub_id"] for end in ends] == list(server.ends)
    assert {end.event["status"] for end in ends} == {"completed"}
    assert server.kinds["list"] >= 1


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
def test_pages_may_hang(resource):
    server = Server(
        jobs(100, spread=1000),
        resource=resource,
        bulk_status=200,
        hangs="list" if resource == "overdubs" else "bulk",
        rate=50.0,
    )
    ends = run(server, [watch(name) for name in server.ends])
    assert late(server, ends)[90] < 6  # a GET each, nearly all the time


def test_a_list_whose_error_cannot_be_formatted(monkeypatch):
    server = Server(jobs(20))
    monkeypatch.setattr(server, "page", lambda *_: 1 / 0)  # an unforeseen fault
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert late(server, ends)[-1] < 15


@pytest.mark.parametrize("status", [404, 403, 500, 503])
def test_a_list_that_cannot_be_used(status):
    server = Server(jobs(20), list_status=status)
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert late(server, ends)[-1] < 15
    assert server.kinds["list"] <= (2 if status < 500 else 14)


def test_a_server_without_the_bulk_endpoint():
    server = Server(jobs(100), resource="lipsyncs")
    run(server, [watch(name) for name in server.ends])
    assert server.kinds["bulk"] <= 2
    assert server.kinds["list"] >= 12


# --- Trouble ----------------------------------------------------------------------------------------------


def test_429_delays_all_waits():
    server = Server(jobs(300, first_end=20), faults=[(30, 36, "429/40", 1.0)])
    ends = run(server, [watch(name) for name in server.ends])
    begin = min(moment for moment, _ in server.requests if moment >= 30)
    # The list and the GETs get their 429 one after the other, and some GETs may be under way.
    waited = [kind for moment, kind in server.requests if begin < moment < begin + 40]
    assert len(waited) <= 1 + poller.MAX_CONCURRENT_GETS
    assert {end.event["status"] for end in ends} == {"completed"}


def test_a_retry_after_of_the_list_holds_for_the_list_only():
    server = Server(jobs(20, first_end=60))
    answer = server.answer

    def busy(call, key):
        if call.path.count("/") == 2:
            return 429, {"Retry-After": "999999999"}, REFUSED
        return answer(call, key)

    server.answer = busy
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert late(server, ends)[-1] < 15
    assert server.kinds["list"] == 1
    (first, _), (second, _) = server.requests[:2]
    assert second - first < 0.3, "the GETs go on at the connection's rate"


def test_an_absurd_retry_after_of_the_list_is_capped():
    server = Server(jobs(20, first_end=1500))
    answer, lists = server.answer, []

    def busy_once(call, key):
        if call.path.count("/") == 2:
            lists.append(server.loop.now)
            if len(lists) == 1:
                return 429, {"Retry-After": "999999999"}, REFUSED
        return answer(call, key)

    server.answer = busy_once
    run(server, [watch(name) for name in server.ends])
    assert 900 <= lists[1] - lists[0] < 900 + 20


def test_an_absurd_retry_after_is_capped_and_forgotten_with_another_connection():
    server = Server(jobs(5, first_end=20, spread=1), faults=[(10, 16, "429/999999999", 1.0)])
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert ends[-1].at <= 16 + 900 + 60
    server = Server(jobs(5, first_end=20, spread=1), faults=[(10, 16, "429/999999999", 1.0)])

    async def exchange():
        await asyncio.sleep(100)
        server.key = server.connection_key = "key-2"

    ends = run(server, [watch(name) for name in server.ends], meanwhile=exchange)
    assert ends[-1].at <= 100 + poller.REFRESH_SECONDS + 10


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_retry_after_outlives_all_waits_but_not_their_connection(exchanged):
    server = Server({"od_0": (0.0, "running"), "od_1": (40.0, "completed")}, faults=[(5, 20, "429/800", 1.0)])

    async def exchange():
        await asyncio.sleep(30)
        if exchanged:
            server.key = server.connection_key = "key-2"

    _, end = run(server, [watch("od_0"), watch("od_1")], {1: 60.0}, {0: 25.0}, exchange)
    assert end.event["status"] == "completed"
    assert (end.at < 70) == exchanged
    assert not asked(server, 20, 60)


def test_a_backoff_is_over_with_another_connection():
    server = Server({"od_0": (50.0, "completed"), "od_1": (150.0, "completed")})
    server.connection_key, server.key = "key-1", "key-2"

    async def exchange():
        await asyncio.sleep(100)
        server.connection_key = "key-2"

    ends = run(server, [watch("od_0", 600.0), watch("od_1")], meanwhile=exchange)
    assert [end.event["status"] for end in ends] == ["completed"] * 2
    assert ends[0].at < 100 + 2 * waiting.MAX_BACKOFF_SECONDS  # by itself it would have asked at 600


@pytest.mark.parametrize("seed", range(3))
def test_failures_that_came_together_count_once(seed, monkeypatch):
    monkeypatch.setattr(poller, "random", random.Random(seed))
    server = Server(jobs(10), list_status=404, latency=1.5, rate=100.0, faults=[(20, 24, "503", 1.0)])
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert asked(server, 24, 33), "no pause as after ten failures in a row"


def test_a_success_ends_the_backoff_of_the_list():
    server = Server(jobs(100, first_end=400))
    answer, lists = server.answer, []

    def sometimes(call, key):
        now = server.loop.now
        if call.path.count("/") == 2:
            lists.append(now)
            if 10 < now < 100 or 220 < now < 222:
                return 503, {}, REFUSED
        return answer(call, key)

    server.answer = sometimes
    run(server, [watch(name, 1.0) for name in server.ends])
    assert any(180 < moment < 220 for moment in lists)
    assert any(222 < moment < 240 for moment in lists)


def test_a_get_that_succeeds_ends_the_backoff():
    faults = [(60.0 * minute, 60.0 * minute + 4, "503", 1.0) for minute in range(1, 12)]
    server = Server({"od_0": (700.0, "completed")}, faults=faults)
    run(server, [watch("od_0")])
    gaps = [later - before for (before, _), (later, _) in itertools.pairwise(server.requests)]
    assert max(gaps) < 8


def test_many_429_fail_no_wait():
    server = Server(jobs(1000, first_end=100, spread=200), faults=[(10, 400, "429/1", 0.5)])
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}


@pytest.mark.parametrize("fault", ["503", "dropped", "429"])
def test_an_outage_of_30_seconds(fault):
    server = Server(jobs(1000, first_end=0, spread=120), faults=[(40, 70, fault, 1.0)])
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert asked(server, 42, 70).total() <= 10  # patience
    assert late(server, ends)[-1] < 30 + 40
    assert asked(server, 110, 120).total() >= 10  # and it recovers


def test_an_outage_without_end_lasts_until_the_deadline():
    server = Server(jobs(50), faults=[(10, 1e9, "503", 1.0)])
    ends = run(server, [watch(name, deadline=3600.0) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"timeout"}
    assert all("503" in end.event["message"] for end in ends)
    assert len(server.requests) < 3600 / 15 * 5


def test_an_overdub_that_cannot_be_read_affects_no_other():
    server = Server(jobs(20), list_status=404, poison={"od_7"})
    ends = run(server, [watch(name, deadline=300.0) for name in server.ends])
    assert Counter(end.event["status"] for end in ends) == {"completed": 19, "timeout": 1}
    assert late(server, [end for end in ends if end.event["status"] == "completed"])[-1] < 20


PAGES = ["403", "404", "502", "429/999999999", "429/999", "429/7", "301", "200"]


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1))
def test_an_hour_of_trouble(seed):
    """A proxy responds to half of all requests with pages of its own; each wait ends as its overdub did."""
    note(f"seed {seed}")
    dice = random.Random(seed)
    ends = {f"od_{n}": (dice.random() * 3600, dice.choice(["completed", "failed"])) for n in range(200)}
    server = Server(ends, seed=seed)
    answer = server.answer

    def through_a_proxy(call, key):
        if server.loop.now < 3600 and dice.random() < 0.5:
            status, _, after = dice.choice(PAGES).partition("/")
            return int(status), {"Retry-After": after} if after else {}, None
        return answer(call, key)

    server.answer = through_a_proxy
    for end in run(server, [watch(name, 30.0, deadline=4 * 3600) for name in ends]):
        moment, word = ends[end.event["overdub_id"]]
        assert end.event["status"] == word
        assert end.at >= moment


def test_the_deadline_holds_when_nothing_can_be_asked():
    server = Server({"od_0": (500.0, "completed")}, faults=[(5, 400, "429/3000", 1.0)])
    (end,) = run(server, [watch("od_0", deadline=60.0)])
    assert end.event["status"] == "timeout"
    assert 60 <= end.at <= 60 + poller.GRACE_SECONDS + 0.1


def test_the_last_poll_is_at_the_deadline():
    server = Server({"od_0": (98.0, "completed"), "od_1": (102.0, "completed")})
    ends = run(server, [watch(name, 60.0, deadline=100.0) for name in server.ends])
    assert [end.event["status"] for end in ends] == ["completed", "timeout"]
    assert all(98 <= end.at < 101 for end in ends)


def test_a_deadline_that_passed_without_a_triggerer_leaves_one_poll():
    """The triggerer was away; what has ended meanwhile is no timeout."""
    server = Server({"od_0": (-1.0, "completed"), "od_1": (-1.0, "failed"), "od_2": (9.0, "completed")})
    ends = run(server, [watch(name, deadline=-60.0) for name in server.ends])
    assert [end.event["status"] for end in ends] == ["completed", "failed", "timeout"]
    assert all(end.at < 2 for end in ends)


def test_only_an_overdub_that_has_ended_leaves_its_slot_to_the_queue():
    ends = {"od_0": (20.0, "completed"), "od_1": (20.0, "gone"), "od_2": (9e9, "completed")}
    server = Server(ends)
    run(server, [watch(name, deadline=120.0) for name in ["od_0", *ends]])
    assert poller_of(server).slots.ended == 2  # not for each of two waits, and not at a deadline


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_is_set_postpones_no_deadline(jump):
    server = Server({"od_0": (9e9, "completed"), "od_1": (30.0, "completed")})

    async def jumps():
        await asyncio.sleep(20)
        server.clock_is_off = jump

    watches = [watch("od_0", deadline=60.0), watch("od_1")]
    ends = run(server, watches, meanwhile=jumps)
    assert [end.event["status"] for end in ends] == ["timeout", "completed"]
    assert ends[0].at <= 60 + poller.GRACE_SECONDS + 0.1


# --- Waits that come, go and break at bad moments -----------------------------------------------------------


def test_a_wait_that_cannot_log_fails_alone():
    server = Server(jobs(20))
    watches = [watch(name) for name in server.ends]
    watches[3].log = None

    async def main():
        waits = [poller.wait("heygen_default", rules) for rules in watches]
        return await asyncio.gather(*waits, return_exceptions=True)

    with simulation(server) as runner:
        ends = runner.run(main())
    assert isinstance(ends.pop(3), AttributeError)
    assert {end["status"] for end in ends} == {"completed"}


@pytest.mark.parametrize("poke_interval", [0, -1.0, math.nan, math.inf, "soon"])
def test_an_impossible_interval_affects_no_other_wait(poke_interval):
    server = Server(jobs(5))
    ends = run(server, [watch("od_0", poke_interval)] + [watch(name) for name in server.ends])
    assert [end.event["status"] for end in ends] == ["error"] + ["completed"] * 5
    assert "poke_interval" in ends[0].event["message"]


@pytest.mark.parametrize("phase", [0.0, 0.999])
@pytest.mark.parametrize("poke_interval", [5e-324, 1e-9, 1e300])
def test_an_absurd_interval_affects_no_other_wait(poke_interval, phase, monkeypatch):
    monkeypatch.setattr(poller.random, "random", lambda: phase)
    server = Server(jobs(20))
    watches = [watch(i, poke_interval if i == "od_0" else 5.0, 200.0) for i in server.ends]

    async def main():
        waits = [poller.wait("heygen_default", rules) for rules in watches]
        return await asyncio.gather(*waits, return_exceptions=True)

    with simulation(server) as runner:
        odd, *ends = runner.run(main())
    assert isinstance(odd, OverflowError) or odd["status"] in ("completed", "timeout", "error")
    assert {end["status"] for end in ends} == {"completed"}


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
def test_all_may_leave_at_any_moment(resource):
    """While the connection is read, during a page, a GET or a delay: ``run`` checks that nothing is left."""
    for step in range(75):
        server = Server(
            mixed(jobs(12, first_end=3, spread=6), 9),
            resource=resource,
            bulk_status=200,
            latency=0.5,
            look_up_seconds=0.7,
            lacking=LEAN,
            faults=[(4.0, 6.0, "503", 0.5), (8.0, 9.0, "401", 0.5), (9.0, 12.0, "429/1", 0.5)],
            seed=step,
        )
        watches = [watch(f"od_{n}", 1.0) for n in range(12)]
        run(server, watches, leaves=dict.fromkeys(range(12), 0.2 * step + 0.01))


def test_pollers_of_closed_loops_are_forgotten():
    for _ in range(3):
        run(Server(jobs(1)), [watch("od_0")])
    assert len([loop for loop, _ in poller._pollers if loop.is_closed()]) <= 1


def test_a_wait_that_begins_while_the_poller_dies():
    server = Server(jobs(2))
    second = []

    async def main():
        first = asyncio.create_task(poller.wait("heygen_default", watch("od_0")))
        await asyncio.sleep(1)
        task = poller_of(server)._task
        task.add_done_callback(lambda _: second.append(poller_of(server).join(watch("od_1"))))
        task.cancel()
        with pytest.raises(RuntimeError, match="died"):
            await first
        assert (await second[0].ended)["status"] == "completed"
        await poller_of(server).leave(second[0])

    with simulation(server) as runner:
        runner.run(main())


def test_waits_that_begin_while_others_for_the_same_overdubs_end():
    server = Server(jobs(5, first_end=20, spread=0))
    others = []

    def join(_):
        others.extend(poller_of(server).join(watch(name)) for name in (() if others else server.ends))

    async def main():
        waits = asyncio.create_task(gather(lambda i: poller.wait("heygen_default", watch(i)), server.ends))
        await asyncio.sleep(1)
        for job in poller_of(server).jobs.values():
            job.waiters[0].ended.add_done_callback(join)
        await waits
        noticed = server.loop.now
        for other in others:
            assert (await other.ended)["status"] == "completed"
            await poller_of(server).leave(other)
        assert len(others) == 5
        assert server.loop.now < noticed + 1

    with simulation(server) as runner:
        runner.run(main())


def test_a_later_wait_for_the_same_overdub_logs_its_status():
    server = Server(jobs(20, first_end=100))
    watches = [watch(name, deadline=60.0) for name in [*server.ends, *server.ends]]
    ends = run(server, watches, joins=dict.fromkeys(range(20, 40), 50.0))
    assert all("(status: running)" in end.event["message"] for end in ends)


def test_a_wait_that_ends_while_the_connection_is_read():
    server = Server(jobs(5, first_end=20), look_up_seconds=2.0)
    ends = run(server, [watch(name) for name in server.ends], leaves={0: 1.0})
    assert not [line for end in ends[1:] for line in end.watch.log.lines if "failure" in line]


# --- The connection ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [1, 50])
def test_a_rotated_key_is_picked_up(waits):
    server = Server(jobs(waits, first_end=40, spread=10))

    async def rotate():
        await asyncio.sleep(20)
        server.key = "key-2"

    ends = run(server, [watch(name) for name in server.ends], meanwhile=rotate)
    assert {end.event["status"] for end in ends} == {"completed"}
    assert late(server, ends)[-1] < 15


def test_a_connection_that_cannot_be_read_for_a_while_is_used_as_it_was(caplog):
    server = Server(jobs(20, spread=200), look_up_fails=(50, 290))
    ends = run(server, [watch(name) for name in server.ends])
    assert "AirflowNotFoundException" in caplog.text
    assert {end.event["status"] for end in ends} == {"completed"}
    assert late(server, ends)[-1] < 8
    assert not [line for end in ends for line in end.watch.log.lines if "failure" in line]


def test_a_connection_that_cannot_be_read_at_first():
    server = Server(jobs(20), look_up_fails=(0, 30))
    ends = run(server, [watch(name) for name in server.ends])
    assert {end.event["status"] for end in ends} == {"completed"}
    assert server.requests[0][0] >= 30
    assert late(server, ends)[-1] < 40


def test_a_key_rotated_while_the_connection_cannot_be_read():
    server = Server(jobs(20, spread=100), look_up_fails=(50, 120))

    async def rotate():
        await asyncio.sleep(60)
        server.key = "key-2"

    ends = run(server, [watch(name) for name in server.ends], meanwhile=rotate)
    assert {end.event["status"] for end in ends} == {"completed"}
    assert asked(server, 70, 119).total() <= 20  # a refused key is not tried again and again
    assert late(server, ends)[-1] < 60 + 120


@pytest.mark.parametrize(
    ("look_up_seconds", "latency"),
    [(0.5, 0.02), (11.0, 0.02), (0.5, 3.0), (4.5, 3.0), (2.0, 8.0), (6.0, 8.0), (11.0, 8.0)],
)
def test_a_key_rotated_while_requests_are_under_way(look_up_seconds, latency):
    server = Server(jobs(30, first_end=100), list_status=404)
    server.look_up_seconds, server.latency = look_up_seconds, latency

    async def rotate():
        await asyncio.sleep(21)
        server.key = "key-2"

    ends = run(server, [watch(name) for name in server.ends], meanwhile=rotate)
    assert {end.event["status"] for end in ends} == {"completed"}
    assert server.refused <= 2 * poller.MAX_CONCURRENT_GETS + 1  # and a page


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_poll_that_hangs_delays_no_other(resource, listed, monkeypatch):
    class Stuck(Hook):
        async def asend(self, call):
            if call.path.endswith("/stuck"):
                asked_at.append(self.server.loop.now)
                await asyncio.sleep(self.settings.connect_timeout + self.settings.read_timeout)
                raise HeyGenTransientError("TimeoutError")
            return await super().asend(call)

    asked_at = []
    monkeypatch.setitem(globals(), "Hook", Stuck)
    server = Server(jobs(50, spread=300) | {"stuck": (9e9, "completed")}, resource=resource)
    server.list_status = server.bulk_status = 200 if listed else 404
    server.ids.remove("stuck")
    watches = [watch(name, deadline=500.0 if name == "stuck" else None) for name in server.ends]
    ends = run(server, watches)
    assert ends.pop().event["status"] == "timeout"
    assert {end.event["status"] for end in ends} == {"completed"}
    assert late(server, ends)[-1] < 15
    assert len(asked_at) >= 4
    assert min(later - before for before, later in itertools.pairwise(asked_at)) > 40


def test_a_response_to_a_replaced_connection_does_not_count(monkeypatch):
    class Outdated(Hook):
        async def asend(self, call):
            overdub = await super().asend(call)
            if poller_of(self.server)._hook is not self:
                outdated.append(overdub)
                overdub = overdub.model_copy(update={"status": "completed"})  # in the other account
            return overdub

    outdated = []
    monkeypatch.setitem(globals(), "Hook", Outdated)
    server = Server(jobs(30, first_end=120), list_status=404, latency=9.0)
    answer = server.answer
    monkeypatch.setattr(server, "answer", lambda call, _: answer(call, server.key))  # both keys are good

    async def rotate():
        await asyncio.sleep(50)
        server.connection_key = "key-2"

    ends = run(server, [watch(name) for name in server.ends], meanwhile=rotate)
    assert outdated
    assert late(server, ends)[0] >= 0


def test_a_changed_connection_is_learned_again():
    """The first one's 'resource' was wrong, so the list was left alone for ten minutes."""
    server = Server(jobs(100, first_end=200), list_status=404)

    async def correct():
        await asyncio.sleep(50)
        server.key = server.connection_key = "key-2"
        server.list_status = 200

    run(server, [watch(name) for name in server.ends], meanwhile=correct)
    assert asked(server, 100, 200)["list"] >= 18


def test_gets_that_hang_leave_the_list_alone():
    server = Server(jobs(300, spread=300), hangs="get")
    ends = run(server, [watch(name, deadline=1000.0) for name in server.ends])
    assert Counter(end.event["status"] for end in ends)["completed"] >= 290  # the last few get a GET each
    assert late(server, ends)[289] < 15


@pytest.mark.parametrize("at", [60.5, 61.5, 62.5, 63.5])
def test_a_key_rotated_just_after_the_connection_was_read(at):
    server = Server(jobs(20, first_end=70))

    async def rotate():
        await asyncio.sleep(at)
        server.key = "key-2"

    ends = run(server, [watch(name) for name in server.ends], meanwhile=rotate)
    assert {end.event["status"] for end in ends} == {"completed"}


@pytest.mark.parametrize("restored", [True, False])
def test_a_rejected_key_ends_no_wait(restored):
    server = Server(jobs(300))
    refused = []

    async def revoke():
        await asyncio.sleep(20)
        server.key = "another"
        refused.append(len(server.requests))
        await asyncio.sleep(600)
        refused.append(len(server.requests))
        if restored:
            server.key = "key-1"

    server.connection_key = "key-1"
    ends = run(server, [watch(name, deadline=1200.0) for name in server.ends], meanwhile=revoke)
    assert {end.event["status"] for end in ends} == {"completed" if restored else "timeout"}
    assert restored or all("401" in end.event["message"] for end in ends)
    assert refused[1] - refused[0] <= 3 * 600 / 15
    assert max(len(end.watch.log.lines) for end in ends) < 30


def test_a_connection_read_that_ignores_its_cancellation_delays_no_wait(monkeypatch):
    async def look_up(hook):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(8)
        return hook.settings

    monkeypatch.setattr(Hook, "asettings", look_up)
    server = Server({"od_0": (500.0, "completed")})
    (end,) = run(server, [watch("od_0", deadline=1.0)])  # run() also sees that no task is left
    assert end.event["status"] == "timeout"
    assert end.at < 12


def test_a_poller_that_ignores_its_cancellation_does_not_affect_the_next(monkeypatch):
    async def look_up(hook):
        begin = hook.server.loop.now
        while (left := begin + 2 - hook.server.loop.now) > 0:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(left)
        return hook.settings

    monkeypatch.setattr(Hook, "asettings", look_up)
    server = Server({"od_0": (50.0, "completed"), "od_1": (50.0, "completed")})
    opened = []

    async def begins_again():
        await asyncio.sleep(2.5)
        opened.append(server.open_sessions)
        await asyncio.sleep(10)
        opened.append(server.open_sessions)

    watches = [watch(name) for name in server.ends]
    ends = run(server, watches, joins={1: 1.01}, leaves={0: 1.0}, meanwhile=begins_again)
    assert ends[1].event["status"] == "completed"
    assert opened == [0, 1]


def test_reading_the_connection_is_never_interrupted(monkeypatch):
    """
    Before Airflow 3.2, an answer that nobody fetches stays in the pipe between triggerer and supervisor.

    There it passes for the answer to the next question, which ends the process that runs all triggers.
    """

    async def leave_midway():
        asked, may_answer, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def look_up(conn_id, hook):
            asked.set()
            await may_answer.wait()
            answered.set()
            return Connection(conn_id, password="sk_key", host="https://example.com")

        monkeypatch.setattr(compat, "get_async_connection", look_up)
        waits = asyncio.create_task(poller.wait("heygen_slow", watch("od_1")))
        await asked.wait()
        waits.cancel()
        await asyncio.wait([waits])  # it does not wait for the response
        may_answer.set()
        await asyncio.wait_for(answered.wait(), 30)

    asyncio.run(leave_midway())


# --- Over HTTP ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_leak(caplog):
    """Nothing is left open, neither tasks nor sessions nor sockets."""
    yield
    gc.collect()
    assert [record.message for record in caplog.records if "Unclosed" in record.message] == []
    assert not any(transport._sessions.values())


def create(count):
    request = {"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"}
    with HeyGenHook() as hook:
        return [hook.create_overdub(request) for _ in range(count)]


def trigger(overdub_id, conn_id="heygen_default", **changes):
    arguments = {"poke_interval": 0.1, "deadline": time.time() + 60} | changes
    return HeyGenOverdubTrigger(heygen_conn_id=conn_id, overdub_id=overdub_id, **arguments)


async def event_of(waiting):
    (event,) = [event.payload async for event in waiting.run()]
    return event


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
def test_triggers_share_a_connection(heygen, resource, connect, listen, no_leak):
    wire = listen(forward(heygen.url))
    connect(wire.url, max_requests_per_second=50, resource=resource, allow_private_hosts=True)
    heygen.behaviour.job_seconds = 3600
    ids = create(150)
    created = len(wire.seen)
    shared = "statuses" if resource == "lipsyncs" else "limit=100"

    async def complete():
        while sum(shared in seen.path for seen in wire.seen[created:]) <= 5:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for overdub_id in ids:
            heygen.force(overdub_id, "completed")

    async def main():
        waits = (event_of(trigger(overdub_id)) for overdub_id in ids)
        events = await asyncio.gather(*waits, complete())
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return events[:-1]

    events = asyncio.run(main())
    assert [event["overdub_id"] for event in events] == ids
    assert {event["status"] for event in events} == {"completed"}
    with HeyGenHook() as hook:
        assert events[0]["overdub"] == hook.get_overdub(ids[0]).details()
    clients = {seen.client for seen in wire.seen[created:]}
    assert len(clients) <= poller.MAX_CONCURRENT_GETS + 1  # over the same connections; and the test's own GET


def test_two_connections_are_never_mixed(heygen, monkeypatch, no_leak):
    ids = create(6)
    heygen.behaviour.job_seconds = 0.5
    ids += create(6)
    other = heygen.connection(auth_type="oauth")
    monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_OTHER", json.dumps(other))
    conn_ids = ["heygen_default", "heygen_other"] * 6

    async def main():
        pairs = zip(ids, conn_ids, strict=True)
        return await asyncio.gather(*(event_of(trigger(*pair)) for pair in pairs))

    before = len(heygen.requests)
    assert {event["status"] for event in asyncio.run(main())} == {"completed"}
    used = {"api_key": set(), "oauth": set()}
    for record in heygen.requests[before:]:
        used[record.credential].add(record.path)
    for overdub_id, conn_id in zip(ids, conn_ids, strict=True):
        wrong = "oauth" if conn_id == "heygen_default" else "api_key"
        assert not [path for path in used[wrong] if overdub_id in path]
    assert all(used.values())


def test_a_rotated_key_is_picked_up_in_a_running_triggerer(heygen, connect, no_leak):
    (overdub_id,) = create(1)
    heygen.force(overdub_id, "running")

    async def main():
        waits = asyncio.create_task(event_of(trigger(overdub_id)))
        await asyncio.sleep(0.5)
        connect(heygen.url, heygen.oauth_token, auth_type="oauth", max_requests_per_second=50)
        heygen.fail_next(method="GET", status=401, code="unauthorized")  # the old key is gone
        await asyncio.sleep(0.5)
        heygen.force(overdub_id, "completed")
        return await waits

    assert asyncio.run(main())["status"] == "completed"
    looks = [record.credential for record in heygen.requests if record.method == "GET"]
    assert looks[0] == "api_key"
    assert looks[-1] == "oauth"


def test_a_restarted_triggerer_continues(heygen, connect, no_leak):
    """Of 300 waits, each but the first 30 is cut off twice: one event each."""
    connect(heygen.url, max_requests_per_second=100, allow_private_hosts=True)
    heygen.behaviour.job_seconds = 0.0
    ids = create(30)
    heygen.behaviour.job_seconds = 600.0
    ids += create(270)
    events = Counter()

    async def one(overdub_id):
        event = await event_of(trigger(overdub_id, poke_interval=1.0))
        events[event["overdub_id"], event["status"]] += 1

    async def main(*, end):
        tasks = [asyncio.create_task(one(i)) for i in ids if (i, "completed") not in events]
        if end:
            await asyncio.gather(*tasks)
            return
        await asyncio.wait(tasks, timeout=1.5)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main(end=False))
    assert 30 <= len(events) < 300
    asyncio.run(main(end=False))
    for overdub_id in ids[30:]:
        heygen.force(overdub_id, "completed")
    asyncio.run(main(end=True))
    assert events == {(overdub_id, "completed"): 1 for overdub_id in ids}


def test_a_restart_does_not_move_the_deadline(heygen, no_leak):
    heygen.behaviour.job_seconds = 600
    (overdub_id,) = create(1)
    deadline = time.time() + 2
    _, stored = trigger(overdub_id, deadline=deadline).serialize()

    async def main():
        with suppress(TimeoutError):
            await asyncio.wait_for(event_of(HeyGenOverdubTrigger(**stored)), 1)
        return await event_of(HeyGenOverdubTrigger(**json.loads(json.dumps(stored))))

    assert asyncio.run(main())["status"] == "timeout"
    assert deadline <= time.time() < deadline + 1


def test_lines_go_to_the_log_of_their_own_trigger(heygen, monkeypatch, no_leak):
    whose = contextvars.ContextVar("whose")
    heard = []

    class Listener(logging.Handler):
        def emit(self, record):
            heard.append((whose.get("nobody"), record.getMessage()))

    heygen.behaviour.job_seconds = 3600
    ids = create(5)
    for overdub_id in ids:
        heygen.force(overdub_id, "running")

    async def one(overdub_id):
        whose.set(overdub_id)
        return await event_of(trigger(overdub_id))

    async def main():
        waits = asyncio.create_task(gather(one, ids))
        while len({owner for owner, _ in heard}) < len(ids) and not waits.done():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for overdub_id in ids:
            heygen.force(overdub_id, "completed")
        await waits

    logger = logging.getLogger("test.trigger")
    logger.setLevel(logging.INFO)
    monkeypatch.setattr(HeyGenOverdubTrigger, "_log", logger)
    logger.addHandler(listener := Listener())
    try:
        asyncio.run(asyncio.wait_for(main(), 60))
    finally:
        logger.removeHandler(listener)
    assert {owner for owner, _ in heard} == set(ids)
    assert all(owner in line for owner, line in heard)


async def gather(function, values):
    return await asyncio.gather(*map(function, values))


def test_what_occupies_a_slot():
    rows = {
        "new": {"status": "pending", "created_at": int(time.time())},
        "capitals": {"status": " Running "},
        "lost by HeyGen": {"status": "running", "created_at": int(time.time()) - 2 * 86400},
        "canceled": {"status": "canceled"},
        "COMPLETED": {"status": "COMPLETED"},
        "none": {"status": None},
        "list": {"status": ["running"]},
        "nothing": {},
    }
    decoded = {"data": [{"id": name, **row} for name, row in rows.items()]}
    page = api.list_raw_overdubs(100, None).read(decoded, {})
    assert page.running() == {"new", "capitals"}


def test_a_key_of_another_account_for_a_while_ends_no_wait():
    """Its account does not have the overdub, but the one that was seen running is not deleted."""
    server = Server({"od_0": (400.0, "completed")})
    answer = server.answer

    async def exchange():
        for key, other in (("key-2", True), ("key-3", False)):
            await asyncio.sleep(100)
            server.key = key
            if other:
                server.answer = lambda call, key: (
                    (404, {}, {"error": {"code": "not_found"}})
                    if call.path.endswith("/od_0")
                    else (200, {}, {"data": [], "has_more": False})
                )
            else:
                server.answer = answer

    (end,) = run(server, [watch("od_0", 10.0)], meanwhile=exchange)
    assert end.event["status"] == "completed"


def test_a_long_search_for_what_may_be_gone_delays_no_poll():
    server = Server(
        {"od_0": (60.0, "completed"), "od_1": (5.0, "gone")}
        | {f"o_{n}": (-1.0, "completed") for n in range(2000)},
        page_latency=2.0,
    )
    ends = run(server, [watch("od_0", 1.0), watch("od_1", 1.0)])
    assert [end.event["status"] for end in ends] == ["completed", "gone"]
    assert ends[0].at < 64


def test_an_overdub_that_was_read_during_the_search_is_not_gone():
    """A replica of HeyGen lags for a minute; the list does not have the overdub, and takes long to read."""
    others = {f"o_{n}": (-1.0, "completed") for n in range(2000)}
    server = Server({"od_0": (400.0, "completed")} | others, page_latency=4.0)
    answer, page = server.answer, server.page

    def lagging(call, key):
        if call.path.endswith("/od_0") and server.loop.now < 60:
            return 404, {}, {"error": {"code": "not_found"}}
        return answer(call, key)

    def lacking(token, now):
        found = page(token, now)
        return found | {"data": [row for row in found["data"] if row["id"] != "od_0"]}

    server.answer, server.page = lagging, lacking
    (end,) = run(server, [watch("od_0", 10.0)])
    assert end.event["status"] == "completed"
