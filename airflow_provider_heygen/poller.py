"""
One poller for all triggers of an event loop that wait on the same Airflow connection.

Each tick it looks at the overdubs that are due, by what costs the fewest requests: pages of the list, which
tell of 100 overdubs each; the bulk status call of ``lipsyncs``; or a GET for each. Which pages hold what it
learns as it goes, so no order of the list is relied on. A GET has the last word: what is not in the list may
be there all the same, and a list that lags behind is found out by a GET now and then.

The rules of a single wait are not here but in :class:`~airflow_provider_heygen.waiting.Watch`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_heygen import api, metrics
from airflow_provider_heygen.exceptions import (
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenPermanentError,
    HeyGenTransientError,
    retry_delay,
)
from airflow_provider_heygen.hooks.heygen import MAX_LISTED_PAGES, HeyGenHook
from airflow_provider_heygen.waiting import seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_provider_heygen.connection import HeyGenConnection
    from airflow_provider_heygen.waiting import WaitEvent, Watch

T = TypeVar("T")

log = logging.getLogger(__name__)

DEBOUNCE_SECONDS = 0.2
"""How long a new wait waits for its first look, at most: those that join together share it."""

GRACE_SECONDS = 5.0
"""How long after its deadline, or its start if that is later, a wait may still be decided by a look."""

REFRESH_SECONDS = 60.0
"""How often the Airflow connection is read again, for a key that was rotated."""

LONGEST_PAUSE = 15.0
"""Seconds without any request after failures in a row, at most (unless HeyGen asks for more)."""

DOWN = 3
"""Failed requests in a row in one tick, after which the tick is given up."""

SLOW_FACTOR = 20
"""How many times as long as an answer took that is far too slow what gave it is left alone."""

SLOW_SECONDS = 60.0
"""How long it counts that pages of the list were slow when they were last read."""

LISTING_SECONDS = 20.0
"""How long one reading of the whole list serves all overdubs that may be gone."""

VERIFY_SECONDS = 5.0
"""How often a GET checks one of the overdubs that the list or the bulk call tell of."""

STALE_SECONDS = 10.0
"""How far the list or the bulk call may lag behind a GET."""

DISTRUST_SECONDS = 600.0
"""How long a list or bulk call that lags further behind, or is refused, is left alone."""

EXPLORE_SECONDS = 30.0
"""How long after a fruitless search through the list the next one comes; doubles up to an hour."""

PAGE_COST = 2
"""A page of the list in GETs: it is one request, but takes twice the CPU of a GET (measured)."""

MAX_WITNESSES = 100
"""Overdubs that a GET saw ended, kept until a source says so too, at most."""

TICK_SECONDS = 5.0
"""How long a tick sends GETs and waits for their answers, at most."""

CONCURRENT_LOOKS = 10
"""GETs under way at the same time, at most."""

_DETAILS = {"title", "duration", "callback_id", "created_at", "failure_message"}


@dataclass(slots=True, eq=False)
class _Waiter:
    """One trigger: its rules, its context (where its log goes) and its end."""

    watch: Watch
    context: contextvars.Context
    ended: asyncio.Future[WaitEvent]
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """
    One awaited overdub.

    :param due: when its next look is due, in seconds of the loop.
    :param interval: what its most eager wait asked for.
    :param page: the page of the list it was on last; ``None`` if it was not found there.
    :param sought: whether it was looked for in pages that are not known to be worth it.
    :param word: its status in the list or the bulk call, as it came.
    :param urgent: whether a GET is needed in any case: to complete what these say, or to check it.
    :param asked_at: when a GET was sent for it.
    """

    overdub_id: str
    due: float
    interval: float = math.inf
    waiters: list[_Waiter] = field(default_factory=list)
    page: int | None = None
    sought: bool = False
    word: Any = None
    urgent: bool = False
    asked_at: float = -math.inf


@dataclass
class _Source:
    """What tells of many at once, the list or the bulk call; it may be left alone for a while."""

    name: str
    usable_from: float = -math.inf
    pause: float = 0.0

    def leave(
        self, now: float, reason: str, *, lasting: bool = False, took: float = 0.0, asked: float = 0.0
    ) -> None:
        longer = max(5.0, self.pause * 2, SLOW_FACTOR * took)
        self.pause = max(asked, DISTRUST_SECONDS if lasting else min(longer, DISTRUST_SECONDS))
        self.usable_from = now + self.pause
        log.info("Doing without %s for %.0f s: %s", self.name, self.pause, api.redact_links(reason))


# A poller without work stays, as a few bytes that know when the next request may be sent. An id leads all
# triggers of a process to the same settings, since Airflow gives them their connections from one place. When
# these change, the poller goes over to the new ones, and answers to the old ones count no more.
_pollers: dict[tuple[asyncio.AbstractEventLoop, str], _Poller] = {}


async def wait(heygen_conn_id: str, watch: Watch) -> WaitEvent:
    """
    Wait until an overdub is final or gone, or its deadline has passed.

    The first to wait on a connection starts its poller; the last to leave stops it and closes its session.

    :param heygen_conn_id: the Airflow connection; its ``max_requests_per_second`` is kept to.
    :param watch: the rules of this wait.
    """
    try:
        watch.overdub_id = api.check_id(watch.overdub_id)  # a template may have made it a number
        watch.poke_interval = seconds(watch.poke_interval, "poke_interval")
    except HeyGenError as error:
        return watch.give_up(error)
    key = loop, _ = asyncio.get_running_loop(), heygen_conn_id
    if key not in _pollers:
        for gone in [other for other in _pollers if other[0].is_closed()]:
            del _pollers[gone]
        _pollers[key] = _Poller(heygen_conn_id, loop)
    poller = _pollers[key]
    waiter = poller.join(watch)
    try:
        return await waiter.ended
    finally:
        await poller.leave(waiter)


class _Poller:
    def __init__(self, heygen_conn_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.conn_id = heygen_conn_id
        self._loop = loop
        self.jobs: dict[str, _Job] = {}
        self._task: asyncio.Task[None] | None = None
        self._phase = random.random()  # noqa: S311 - not all triggerers at the same moment
        self._hook: HeyGenHook | None = None
        self._settings: HeyGenConnection | None = None
        self._resolved_at = -math.inf
        self._wake = asyncio.Event()
        self._alarm = math.inf
        self._turn = asyncio.Lock()
        self._trouble_at = self._rate_until = -math.inf
        self._trouble_in_tick = 0
        self._took = 0.0
        self._tick_at = -math.inf
        self._late = False
        self._open: dict[str, _Job] = {}
        self._looks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(CONCURRENT_LOOKS)
        self._forget()

    def _forget(self) -> None:
        """Forget what was learned of the server: a new connection may lead to another one."""
        self._list = _Source("the list of overdubs")
        self._bulk = _Source("the bulk status call")
        self._page_seconds, self._paged_at = 0.0, -math.inf
        self._explore_at = self._verify_at = -math.inf
        self._explore_pause = EXPLORE_SECONDS
        self._witnesses: dict[str, float] = {}
        self._next_turn, self._gets_from = self._rate_until, -math.inf
        self._trouble = 0
        self._listing: tuple[float, set[str] | None] = (-math.inf, None)
        for job in self.jobs.values():
            job.page, job.sought, job.word = None, False, None
            # What an earlier connection was asked to wait for is over.
            job.due = min(job.due, self._loop.time())

    # --- Coming and going -----------------------------------------------------------------------------

    def join(self, watch: Watch) -> _Waiter:
        waiter = _Waiter(watch, contextvars.copy_context(), self._loop.create_future())
        soon = (self._loop.time() // DEBOUNCE_SECONDS + 1) * DEBOUNCE_SECONDS
        job = self.jobs.setdefault(watch.overdub_id, _Job(watch.overdub_id, soon))
        job.due = min(job.due, soon)
        job.interval = min(job.interval, watch.poke_interval)
        job.word = None  # whoever comes anew has not heard it
        job.waiters.append(waiter)
        if soon < self._alarm:
            self._alarm = soon
            self._wake.set()
        if watch.deadline is not None:
            # A deadline that passed while the triggerer was away leaves one look: the overdub may have ended.
            left = max(0.0, watch.left)
            waiter.timer = self._loop.call_later(left + GRACE_SECONDS, self._give_up, waiter)
        if self._task is None:
            # Not in the context of the first trigger, whose log would get all lines.
            self._task = self._loop.create_task(self._run(), context=contextvars.Context())
            self._task.add_done_callback(self._died)
        return waiter

    async def leave(self, waiter: _Waiter) -> None:
        if waiter.timer:
            waiter.timer.cancel()
        job = self.jobs[waiter.watch.overdub_id]
        job.waiters.remove(waiter)
        job.interval = min((other.watch.poke_interval for other in job.waiters), default=math.inf)
        if not job.waiters:
            del self.jobs[job.overdub_id]
            self._open.pop(job.overdub_id, None)
        if not self.jobs and self._task:
            task, self._task = self._task, None
            # A look-up may swallow the cancellation (asgiref does); it also sees by itself that it is over.
            self._wake.set()
            task.cancel()
            await asyncio.wait([task], timeout=GRACE_SECONDS)

    def _died(self, task: asyncio.Task[None]) -> None:
        if task is not self._task:
            return
        self._task = None
        for job in self.jobs.values():
            for waiter in job.waiters:
                if not waiter.ended.done():  # better a failed task than one that waits for ever
                    waiter.ended.set_exception(RuntimeError(f"The poller of '{self.conn_id}' died: {task!r}"))

    # --- The rhythm -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._hook, self._looks = None, set()
        async with AsyncExitStack() as session, asyncio.TaskGroup() as looks:
            while True:
                await self._until_due()
                if self._task is not asyncio.current_task():
                    raise asyncio.CancelledError  # which also ends looks that are under way
                try:
                    await self._tick(session, looks)
                except Exception as error:
                    await self._fail(self._open, error)

    async def _until_due(self) -> None:
        self._alarm = min((job.due for job in self.jobs.values()), default=math.inf)
        while self.jobs and (now := self._loop.time()) < self._alarm:
            self._wake.clear()
            timer = self._loop.call_at(min(self._alarm, now + 3600), self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()

    async def _tick(self, session: AsyncExitStack, looks: asyncio.TaskGroup) -> None:
        """Look at all that is due, once; what is not reached remains due for the next tick."""
        self._tick_at = now = self._loop.time()
        self._trouble_in_tick = 0
        due = [job for job in self.jobs.values() if job.due <= now]
        self._late = any(now - job.due > 0.05 * job.interval for job in due)
        due.sort(key=lambda job: job.due + job.interval)  # the eager do not stand behind many that are not
        self._open = {job.overdub_id: job for job in due}
        settings = await self._connect(session)
        eager = min((job.interval for job in self.jobs.values()), default=0.0)
        interval = max(eager, 1 / settings.max_requests_per_second)
        bulk = settings.resource == "lipsyncs" and len(due) > 2 and self._bulk.usable_from <= now
        source = self._bulk if bulk else self._list
        seen: list[_Job] = []
        if source.usable_from <= now:
            self._took = 0.0
            try:
                seen = await (self._ask_bulk() if bulk else self._sweep(settings, interval))
                if self._took > max(interval, TICK_SECONDS):
                    source.leave(self._loop.time(), f"it took {self._took:.0f} s", took=self._took)
                else:
                    source.pause = 0.0
            except Exception as error:
                # A refusal of the credential is met by the GETs as well, and may be over sooner.
                lasting = isinstance(error, HeyGenPermanentError) and error.status_code != 401
                asked = getattr(error, "retry_after", None)
                delay = retry_delay(1, error) if asked else 0.0
                source.leave(self._loop.time(), str(error), lasting=lasting, took=self._took, asked=delay)
        if seen and self._verify_at <= now:
            self._verify_at = now + VERIFY_SECONDS
            told = [job for job in seen if job.due < math.inf and job.overdub_id not in self._open]
            if told:
                job = min(told, key=lambda job: job.asked_at)
                job.urgent = True
                self._open[job.overdub_id] = job
        # No more than one interval's worth, or a quarter of it: then the others are due again, some may have
        # joined, and there may be a better way than a GET for each.
        worth = settings.max_requests_per_second * min(interval, TICK_SECONDS)
        spent = (self._loop.time() - now) * settings.max_requests_per_second
        budget = max(1, math.ceil(max(worth - spent, worth / 4)))
        room = max(0, budget - len(self._looks))
        for job in sorted(self._open.values(), key=lambda job: not job.urgent)[:room]:
            del self._open[job.overdub_id]
            job.due = math.inf
            look = looks.create_task(self._look(job, settings))
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)
        if self._looks:  # but one that hangs holds up nobody else
            await asyncio.wait(self._looks, timeout=TICK_SECONDS)
        if self._trouble_in_tick >= DOWN:
            await self._fail(self._open, self._last_trouble)
        now = self._loop.time()
        if self._gets_from > now:  # until then GETs are not asked for; the connection may change meanwhile
            for job in self._open.values():
                job.due = max(job.due, min(self._gets_from, now + REFRESH_SECONDS))

    def _next(self, watch: Watch, step: float) -> float:
        """Give the moment of the next look: on a grid, so that waits that began apart meet in one tick."""
        now, interval = self._loop.time(), watch.poke_interval
        if step != interval:
            # GETs may have to wait for longer; until then the list may tell, or the connection may be
            # another one.
            return now + (min(step, REFRESH_SECONDS) if self._gets_from > now else step)
        phase = self._phase * interval
        if self._late:  # there is more to do than time; waiting for the grid would be idling
            return min(max(now, self._tick_at + interval), now + watch.left)
        slot = math.ceil((self._tick_at + interval / 10 - phase) / interval)
        return min(max(now, slot * interval + phase), now + watch.left)

    # --- What a look means for those who wait ---------------------------------------------------------

    def _tell(self, job: _Job, take: Callable[[Watch], float | WaitEvent]) -> None:
        """Feed a look to the rules of each wait for this overdub."""
        self._open.pop(job.overdub_id, None)
        job.due, job.urgent = math.inf, False
        for waiter in job.waiters:
            if waiter.ended.done():
                continue
            try:
                step = waiter.context.run(take, waiter.watch)  # its log lines go where its trigger logs
                if isinstance(step, dict):
                    waiter.ended.set_result(step)
                else:
                    job.due = min(job.due, self._next(waiter.watch, step))
            except Exception as error:  # it could not log, say; the others can
                waiter.ended.set_exception(error)

    def _give_up(self, waiter: _Waiter) -> None:
        if not waiter.ended.done():
            waiter.ended.set_result(waiter.watch.timed_out())

    async def _fail(self, jobs: dict[str, _Job], error: Exception) -> None:
        for number, job in enumerate(list(jobs.values()), start=1):
            self._tell(job, lambda watch: watch.failed(error))
            if number % 20 == 0:
                await asyncio.sleep(0)  # each writes a line to its log; the loop has others to serve

    # --- Ways to look ---------------------------------------------------------------------------------

    async def _look(self, job: _Job, settings: HeyGenConnection) -> None:
        """GET one overdub; it may take longer than the tick that began it."""
        async with self._slots:
            if job.waiters and not await self._learn(job, settings):
                # It remains due: for the next tick, with a fresh connection, or for failing with the others.
                job.due = self._loop.time()
                self._open[job.overdub_id] = job
        if job.due < self._alarm:
            self._alarm = job.due
            self._wake.set()

    async def _learn(self, job: _Job, settings: HeyGenConnection) -> bool:
        """GET one overdub, if that makes sense; tell whether those who wait for it have been told."""
        if self._trouble_in_tick >= DOWN or self._gets_from > self._loop.time():
            return False
        hook = self._hook
        job.asked_at = self._loop.time()
        try:
            overdub = await self._ask(api.get_overdub(settings.resource, job.overdub_id))
        except Exception as error:
            failure = error
            if hook is not self._hook or self._trouble_in_tick >= DOWN:
                return all(waiter.ended.done() for waiter in job.waiters)
            if getattr(error, "retry_after", None):
                self._gets_from = self._loop.time() + retry_delay(1, error)
            self._tell(job, lambda watch: watch.failed(failure))
            await self._settle(job, settings)
            return True
        if hook is not self._hook:  # an answer to an outdated connection, perhaps of another account
            return False
        self._saw(job, overdub)
        return True

    async def _settle(self, job: _Job, settings: HeyGenConnection) -> None:
        """Have the list decide on an overdub for which HeyGen has returned 404 for some time."""
        doubtful = [w for w in job.waiters if w.watch.may_be_gone and not w.ended.done()]
        if not doubtful:
            return
        read_at, listing = self._listing
        if self._loop.time() - read_at >= LISTING_SECONDS:
            listing = await self._whole_list(settings)
            self._listing = self._loop.time(), listing
        for waiter in doubtful:
            end = waiter.watch.absent(None if listing is None else job.overdub_id in listing)
            if end is not None and not waiter.ended.done():
                waiter.ended.set_result(end)

    async def _whole_list(self, settings: HeyGenConnection) -> set[str] | None:
        """Return the ids of all overdubs in the list; ``None`` if it cannot be read to its end."""
        hook, ids, token = self._hook, set[str](), None
        for _ in range(MAX_LISTED_PAGES):
            try:
                call = api.skim_overdubs(settings.resource, api.MAX_PAGE_SIZE, token)
                page = await self._ask(call, again=True)
            except Exception as error:
                log.warning("%s", api.redact_links(str(error)))
                return None
            ids |= set(page.rows)
            if page.next_token is None:
                return ids if hook is self._hook else None
            if page.next_token == token:  # it goes in circles, so there may be more
                return None
            token = page.next_token
        return None

    def _saw(self, job: _Job, overdub: api.Overdub) -> None:
        """Take what a GET says."""
        if overdub.is_final:
            self._witnesses[job.overdub_id] = self._loop.time()
            if len(self._witnesses) > MAX_WITNESSES:
                del self._witnesses[next(iter(self._witnesses))]
        self._tell(job, lambda watch: watch.saw(overdub))

    def _undecided(self) -> list[_Job]:
        """Give the open overdubs of which the list or the bulk call may tell all that is needed."""
        return [job for job in self._open.values() if not job.urgent]

    async def _ask_bulk(self) -> list[_Job]:
        """Ask for the status of all that are open, and give them."""
        jobs = self._undecided()
        witnesses = list(self._witnesses)[:10]
        at_once = api.MAX_PAGE_SIZE - len(witnesses)
        for first in range(0, len(jobs), at_once):
            asked_at = self._loop.time()
            ids = [job.overdub_id for job in jobs[first : first + at_once]]
            answer = await self._ask(api.list_statuses(dict.fromkeys(ids + witnesses)), again=True)
            for overdub_id, row in answer.rows.items():
                self._read(overdub_id, row, asked_at, self._bulk)
        return jobs

    async def _sweep(self, settings: HeyGenConnection, interval: float) -> list[_Job]:
        """Read pages of the list while they are worth it, and give the awaited overdubs that were in them."""
        now = self._loop.time()
        spacing = 1 / settings.max_requests_per_second
        if now - self._paged_at > SLOW_SECONDS:
            self._page_seconds = 0.0
        depth = self._depth(interval, spacing)
        unknown = [job for job in self._undecided() if job.page is None]
        hopes = unknown if self._explore_at <= now else [job for job in unknown if not job.sought]
        sought = {job.overdub_id for job in self._undecided() if (job.page or math.inf) <= depth}
        # Beyond the pages that were worth it last time, as many GETs may turn out to be a loss.
        allowance, loss = max(1, len(hopes)), 0
        explore = len(hopes) > PAGE_COST
        if not explore:  # where pages are read anyway, one more is worth a try
            hopes = unknown if depth and len(unknown) > PAGE_COST else []
        sought |= {job.overdub_id for job in hopes}
        seen: list[_Job] = []
        token, tokens, page, beyond = None, set[str](), 0, None
        while sought:
            end = self._loop.time() + self._page_seconds
            if page < depth:
                pages_take = (depth - page) * self._page_seconds
            else:
                beyond = beyond or self._loop.time()
                pages_take = end - beyond
                if loss >= allowance or len(sought) <= PAGE_COST:
                    break
            if end - now > interval and pages_take > len(sought) * spacing:
                break
            page += 1
            asked_at = self._loop.time()
            answer = await self._ask(
                api.skim_overdubs(settings.resource, api.MAX_PAGE_SIZE, token), again=True
            )
            self._paged_at = self._loop.time()
            self._page_seconds += (self._took - self._page_seconds) / min(page, 5)
            before = len(sought)
            for overdub_id, row in answer.rows.items():
                job = self.jobs.get(overdub_id)
                if job:
                    job.page = page
                    seen.append(job)
                if job or overdub_id in self._witnesses:
                    self._read(overdub_id, row, asked_at, self._list)
                sought.discard(overdub_id)
            if page > depth:
                loss += PAGE_COST - (before - len(sought))
            token = answer.next_token
            if token is None or token in tokens or self._list.usable_from > now:
                break
            tokens.add(token)
        for overdub_id in sought:
            job = self.jobs.get(overdub_id)
            if job and (job.page or math.inf) <= page:
                job.page = None
        if explore:
            for job in hopes:
                job.sought = True
            worth_it = loss < 0 and self._loop.time() - now < interval
            self._explore_pause = EXPLORE_SECONDS if worth_it else min(self._explore_pause * 2, 3600)
            self._explore_at = self._loop.time() + self._explore_pause
        return seen

    def _depth(self, interval: float, spacing: float) -> int:
        """
        Give the number of pages to read before the rest gets a GET each, from where the overdubs were last.

        What fits into the interval is judged by its requests, what does not by its seconds. Pages come one
        after another, because cursors are opaque; GETs do not. Never more than a GET for each would cost.
        """
        jobs = self._undecided()
        by_page = Counter(job.page for job in jobs if job.page is not None)
        rest = len(jobs)
        best, depth = (max(interval, rest * spacing), rest), 0
        for page in sorted(by_page):
            rest -= by_page[page]
            seconds = page * max(spacing, self._page_seconds) + rest * spacing
            cost = (max(interval, seconds), page * PAGE_COST + rest + 1)  # one for verifying
            if cost < best:
                best, depth = cost, page
        return depth

    def _read(self, overdub_id: str, row: dict[str, Any], asked_at: float, source: _Source) -> None:
        """Take one row of the list or of the bulk call."""
        job = self.jobs.get(overdub_id)
        word = row.get("status")
        if not isinstance(word, str):
            return  # half a row, which tells nothing
        if job and word == job.word:
            self._tell(job, lambda watch: watch.unchanged())
            return
        try:
            overdub = api.overdub_of(overdub_id, row)
        except ValueError:
            return
        if overdub_id in self._witnesses:
            self._hear(overdub, asked_at, source)
        if job is None or word == api.NOT_FOUND:
            return
        if overdub.is_final and not overdub.model_fields_set >= _DETAILS:
            job.urgent = True  # a GET has what is missing
            self._open[overdub_id] = job
            return
        job.word = word
        self._tell(job, lambda watch: watch.saw(overdub))

    def _hear(self, overdub: api.Overdub, asked_at: float, source: _Source) -> None:
        """Compare what a source says with what a GET said before."""
        late = asked_at - self._witnesses[overdub.overdub_id]
        if overdub.is_final or overdub.status == api.NOT_FOUND:
            del self._witnesses[overdub.overdub_id]
        elif late > STALE_SECONDS:
            self._witnesses.clear()
            reason = f"{late:.0f} s after a GET said that overdub {overdub.overdub_id} has ended, it does not"
            source.leave(self._loop.time(), reason, lasting=True)

    # --- Requests -------------------------------------------------------------------------------------

    async def _connect(self, session: AsyncExitStack) -> HeyGenConnection:
        """Read the Airflow connection when it is time to, and keep an HTTP session for it."""
        now = self._loop.time()
        if self._hook is None or self._trouble or now - self._resolved_at >= REFRESH_SECONDS:
            hook = HeyGenHook(self.conn_id, max_attempts=1)
            try:
                settings = await hook.asettings()
            except Exception as error:
                if self._hook is None:
                    raise
                settings = self._hook.settings  # Airflow's API server may be away for a while
                what = type(error).__name__  # its text may be a secrets backend's
                log.warning("Going on with connection '%s' as it was: %s.", self.conn_id, what)
            if self._task is not asyncio.current_task():  # cancelled, which asgiref swallowed
                raise asyncio.CancelledError
            self._resolved_at = now
            if self._hook is None or settings != self._hook.settings:
                self._hook = None
                await session.aclose()
                if settings != self._settings:
                    self._forget()
                self._settings = settings
                await session.enter_async_context(hook)
                self._hook = hook
        return self._hook.settings

    async def _ask(self, call: api.Call[T], *, again: bool = False) -> T:
        """
        Send one call at its turn.

        :param again: send it once more after a transient failure, unless that took long or HeyGen asked to
            wait.
        """
        if self._hook is None:
            raise AssertionError
        spacing = 1 / self._hook.settings.max_requests_per_second
        for attempt in (1, 2):
            async with self._turn:
                # A failure elsewhere may put the turn off meanwhile.
                while (pause := self._next_turn - self._loop.time()) > 0:  # noqa: ASYNC110
                    await asyncio.sleep(pause)
                started_at = self._loop.time()
                self._next_turn = self._rate_until = started_at + spacing
            metrics.polled(self.conn_id)
            try:
                answer = await self._hook.asend(call)
            except HeyGenError as error:
                if not isinstance(error, HeyGenNotFoundError) and not error.retry_after:
                    self._pause(error, started_at)
                self._took = self._loop.time() - started_at
                quick = self._took < TICK_SECONDS and not error.retry_after
                if attempt == 2 or not (again and quick and isinstance(error, HeyGenTransientError)):
                    raise
            else:
                self._trouble = self._trouble_in_tick = 0
                self._took = self._loop.time() - started_at
                return answer
        raise AssertionError

    def _pause(self, error: HeyGenError, started_at: float) -> None:
        """Keep everybody from asking for a while: longer after each failure in a row."""
        now = self._loop.time()
        self._last_trouble = error
        self._trouble_in_tick += 1
        if started_at >= self._trouble_at:  # of several that failed together, one counts
            self._trouble += 1
            self._trouble_at = now
        pause = retry_delay(self._trouble, first=0.5, longest=LONGEST_PAUSE)
        self._next_turn = max(self._next_turn, now + pause)
