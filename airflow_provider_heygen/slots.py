"""
A queue for HeyGen's slots, without I/O: which create task may send its request again, and when.

HeyGen runs a few jobs of an account at a time, of all its products together, and returns 429 above that.
Rejected tasks wait here, first come, first served. The list shows how many jobs run, a rejection shows how
many may run, and an occasional probe detects that there is room for more.
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

USUAL_SLOTS = 10  # pay-as-you-go (contract, `x-limits.concurrent_jobs_pay_as_you_go`)
COUNT_SECONDS = 10.0  # how often running jobs are counted while a task waits
SPREAD_SECONDS = 10.0  # a slot that every triggerer sees is used after a random part of this
RELEASE_SECONDS = 120.0  # how long a released task may take until its job is listed or it is rejected again
PROBE_SECONDS, LONGEST_PROBE_SECONDS = 60.0, 600.0  # delay before a probe; doubles


class Place(NamedTuple):
    """One task's place: Unix seconds of its first attempt, when it may go at the soonest, the task."""

    since: float
    not_before: float
    task: Any


class Slots:
    """
    The queue of one Airflow connection in one triggerer.

    :param ceiling: how many jobs may run at a time at most, if the user has said so.
    :ivar ended: awaited overdubs that have ended since the last count: their slots are used at once.
    :ivar go_at: when a free slot that every triggerer sees may be used, if it is still free.
    """

    def __init__(self, ceiling: int | None = None, places: list[Place] | None = None) -> None:
        self.ceiling = ceiling or math.inf
        self.limit = min(USUAL_SLOTS, self.ceiling)
        self.places = places or []
        self._running: set[str] = set()
        self._released: list[float] = []
        self._rejected = self._learned = False
        self.go_at = self._probe_at = math.inf
        self.ended = 0
        self._probe_pause, self._probe_size = PROBE_SECONDS, 1

    def join(self, place: Place, *, rejected_now: bool, resumed: bool) -> int:
        """
        Add a task whose create request was rejected; return how many wait before it.

        :param rejected_now: whether HeyGen rejected it just now, not before a restart of the triggerer.
        :param resumed: whether it had been released before.
        """
        self.places.append(place)
        self.places.sort(key=lambda place: place.since)
        # Later, a first rejection only shows that no slot was free for a moment.
        self._rejected = self._rejected or (rejected_now and (resumed or not self._learned))
        if rejected_now and resumed:
            del self._released[:1]
        return self.places.index(place)

    def count(self, running: set[str], now: float) -> list[Place]:
        """Use the ids of the running jobs; remove and return the tasks that may send their requests now."""
        self._learn(running, now)
        ready = [place for place in self.places if place.not_before <= now]
        room = self.limit - len(running) - len(self._released)
        own, self.ended = max(0, min(room, self.ended)), 0
        go_at, self.go_at = self.go_at, math.inf
        if room > own and ready:
            go_at = min(go_at, now + random.uniform(0, SPREAD_SECONDS))  # noqa: S311 - no secret
            if now < go_at:
                room, self.go_at = own, go_at
        elif room <= 0 and ready and now >= self._probe_at and not self._released:
            room = min(self._probe_size, self.ceiling - len(running))
            self._probe_at = now + self._probe_pause
            self._probe_pause = min(self._probe_pause * 2, LONGEST_PROBE_SECONDS)
        going = ready[: max(0, int(min(room, len(ready))))]
        self.places = [place for place in self.places if place not in going]
        self._released += [now] * len(going)
        return going

    def _learn(self, running: set[str], now: float) -> None:
        # Each new job belongs to a released task, or has taken the slot of one.
        arrived = len(running - self._running)
        self._released = [at for at in self._released[arrived:] if now - at < RELEASE_SECONDS]
        if self._rejected:  # a job may have ended between the rejection and this count
            self.limit = min(self.limit, max(len(running), len(self._running)))
            self._probe_size, self._learned = 1, True
        elif len(running) > self.limit:
            self._probe_at, self._probe_pause, self._probe_size = now, PROBE_SECONDS, self._probe_size * 2
        self.limit = min(max(self.limit, len(running)), self.ceiling)
        self._probe_at = min(self._probe_at, now + self._probe_pause)
        self._running, self._rejected = running, False
