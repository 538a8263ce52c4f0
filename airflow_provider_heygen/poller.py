"""
One poller for all triggers of an event loop that wait on the same Airflow connection.

On each tick it polls the overdubs that are due: first by pages of up to 100 statuses each (the list endpoint
or the bulk status endpoint of ``lipsyncs``) while these cost less than GETs, then the rest by GET. A GET is
authoritative: the list may lack an overdub, and an occasional GET detects a list that lags behind.
:class:`.waiting.OverdubWait` decides what a poll means, :mod:`.slots` which rejected create task goes next.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_provider_heygen import api, metrics
from airflow_provider_heygen.exceptions import HeyGenNotFoundError, HeyGenPermanentError, retry_delay
from airflow_provider_heygen.hooks.heygen import MAX_LISTED_PAGES, HeyGenHook
from airflow_provider_heygen.slots import COUNT_SECONDS, Place, Slots
from airflow_provider_heygen.waiting import parse_seconds

if TYPE_CHECKING:
    from airflow_provider_heygen.connection import HeyGenConnection
    from airflow_provider_heygen.waiting import OverdubWait, WaitEvent

log = logging.getLogger(__name__)

DEBOUNCE_SECONDS = 0.2  # from a new wait to its first poll, which waits that begin together share
GRACE_SECONDS = 5.0  # after its deadline, or its start if later, a poll may still end a wait
REFRESH_SECONDS = 60.0  # how often the Airflow connection is read again, for a rotated key
# Airflow may fail a deferral that ends before its worker has reported it (observed on Airflow 3.3.2).
SHORTEST_DEFERRAL = 15.0
TICK_SECONDS = 5.0  # how long GETs and pages wait for each other; how often a GET verifies the pages
MAX_CONCURRENT_GETS = 10
MAX_FAILURES_PER_TICK = 3  # consecutive failed GETs after which all that are due have failed
MAX_BACKOFF_SECONDS = 15.0  # between GETs after consecutive failures, unless HeyGen asks for more
SUSPEND_SECONDS = 600.0  # longest suspension of pages; at once if they are rejected or lag behind
STALE_SECONDS = 10.0  # how far pages may lag behind a GET
BLIND_SECONDS = 120.0  # if the list is suspended for longer, the queue does without it
PAGE_COST = 2  # in GETs: a page is one request, but takes twice the CPU (measured)
SEARCH_SECONDS = 10.0  # until pages that cost more than GETs are read again; doubles

_FINAL = ("completed", "failed", api.NOT_FOUND)
_DETAILS = {"title", "duration", "callback_id", "created_at", "failure_message"}
_AT_ONCE = -math.inf  # when a GET is due that no page can replace

_Pages = AsyncGenerator[api.Statuses, None]


class _Waiter(NamedTuple):
    """One trigger: its rules, its context (where its log goes) and its end."""

    watch: OverdubWait
    context: contextvars.Context
    ended: asyncio.Future[WaitEvent]


@dataclass(slots=True, eq=False)
class _AwaitedOverdub:
    overdub_id: str
    due: float = math.inf  # when its next poll is due, in seconds of the loop; not while a GET is under way
    interval: float = math.inf  # shortest poke_interval of its waiters
    waiters: list[_Waiter] = field(default_factory=list)
    status: str | None = None  # as in the last page


@dataclass(eq=False)
class _Endpoint:
    """One kind of request, which is suspended for a while when it fails."""

    name: str
    failures: int = 0
    usable_from: float = -math.inf
    lags: bool = False  # it is suspended only because its statuses are old

    def suspend(self, error: Exception, began: float, now: float, first: float, longest: float) -> None:
        if began >= self.usable_from and not getattr(error, "retry_after", None):
            self.failures += 1  # of several that failed together, one counts
        delay = retry_delay(self.failures, error, first=first, longest=longest)
        self.lags = isinstance(error, HeyGenPermanentError) and error.status_code is None
        self.usable_from = max(self.usable_from, now + delay)


# A poller without work stays, as a few bytes that know when the next request may be sent.
_pollers: dict[tuple[asyncio.AbstractEventLoop, str], _Poller] = {}


def _poller(heygen_conn_id: str) -> _Poller:
    key = asyncio.get_running_loop(), heygen_conn_id
    if key not in _pollers:
        for closed in [other for other in _pollers if other[0].is_closed()]:
            del _pollers[closed]
        _pollers[key] = _Poller(heygen_conn_id, key[0])
    return _pollers[key]


async def wait(heygen_conn_id: str, watch: OverdubWait, resource: str | None = None) -> WaitEvent:
    """
    Wait until an overdub is final or gone, or its deadline has passed.

    The first to wait on a connection starts its poller; the last to leave stops it and closes its session.

    :param resource: HeyGen's name for the resource, if the worker has found it out.
    """
    try:
        watch.overdub_id = api.check_id(watch.overdub_id)  # a template may have made it a number
        watch.poke_interval = parse_seconds(watch.poke_interval, "poke_interval")
    except HeyGenPermanentError as error:
        return watch.give_up(error)
    poller = _poller(heygen_conn_id)
    poller.resource = resource or poller.resource
    waiter = poller.join(watch)
    # After a deadline that passed while no triggerer ran, one poll remains: the overdub may be final.
    left = None if watch.deadline is None else max(0.0, watch.seconds_left) + GRACE_SECONDS
    try:
        async with asyncio.timeout(left):
            return await waiter.ended
    except TimeoutError:
        return watch.timed_out()
    finally:
        await poller.leave(waiter)


async def queue(heygen_conn_id: str, since: float, delay: float, *, resumed: bool, log: Any) -> None:
    """
    Wait until a create task that HeyGen had no slot for may send its request again.

    The arguments are those of :class:`.HeyGenSlotTrigger`; a delay below 0 is one from before a restart,
    or by a clock that is ahead of the worker's.
    """
    poller = _poller(heygen_conn_id)
    not_before = poller.now() + max(SHORTEST_DEFERRAL, delay)
    place = Place(since, not_before, poller.loop.create_future())
    ahead = poller.slots.join(place, rejected_now=delay > 0, resumed=resumed)
    poller.survey_at = min(poller.survey_at, poller.now())
    poller.start()
    log.info("HeyGen has no free slot. At least %d tasks wait before this one.", ahead)
    try:
        await place.task
    finally:
        with suppress(ValueError):  # it was released
            poller.slots.places.remove(place)
        await poller.stop_if_idle()


class _Poller:
    def __init__(self, heygen_conn_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.conn_id, self.loop, self.now = heygen_conn_id, loop, loop.time
        self.jobs: dict[str, _AwaitedOverdub] = {}
        self.slots = Slots()
        self.resource: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._hook: HeyGenHook | None = None
        self._settings: HeyGenConnection | None = None
        self._resolved_at = self._next_request_at = self._tick_at = -math.inf
        self._wake, self._alarm = asyncio.Event(), math.inf
        self._forget()

    def _forget(self) -> None:
        """Forget what was learned of the server: changed settings may lead to another one."""
        self.slots = Slots(self._settings.max_concurrent_jobs if self._settings else None, self.slots.places)
        self._list, self._bulk = _Endpoint("the list endpoint"), _Endpoint("the bulk status endpoint")
        self._gets = _Endpoint("GETs")
        self.survey_at = self._verify_at = self._search_at = self._gone_at = self._known_final_at = -math.inf
        self._known_final = ""  # final in a GET, and not so in a page before
        self._searches = self._missed = 0  # consecutive readings of pages that cost more than GETs
        for job in self.jobs.values():
            job.status, job.due = None, min(job.due, self.now())

    # --- Coming and going -----------------------------------------------------------------------------

    def join(self, watch: OverdubWait) -> _Waiter:
        waiter = _Waiter(watch, contextvars.copy_context(), self.loop.create_future())
        job = self.jobs.setdefault(watch.overdub_id, _AwaitedOverdub(watch.overdub_id))
        job.due = min(job.due, self.now())
        job.interval = min(job.interval, watch.poke_interval)
        job.status = None  # the new waiter does not know it
        job.waiters.append(waiter)
        self.start()
        return waiter

    def start(self) -> None:
        self._ring(self.now())
        if self._task is None:
            # Not in the context of the first trigger, whose log would get all lines.
            self._task = self.loop.create_task(self._run(), context=contextvars.Context())

    async def leave(self, waiter: _Waiter) -> None:
        job = self.jobs[waiter.watch.overdub_id]
        job.waiters.remove(waiter)
        job.interval = min((other.watch.poke_interval for other in job.waiters), default=math.inf)
        if not job.waiters:
            del self.jobs[job.overdub_id]
        await self.stop_if_idle()

    async def stop_if_idle(self) -> None:
        if self._task and not self.jobs and not self.slots.places:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait([task], timeout=GRACE_SECONDS)

    # --- Ticks ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._hook, self._under_way = None, set[asyncio.Task[None]]()
        self._finding_gone: asyncio.Future[None] = self.loop.create_future()
        self._finding_gone.set_result(None)
        try:
            async with AsyncExitStack() as session, asyncio.TaskGroup() as gets:
                while True:
                    await self._until_due()
                    self._tick_at = self.now()
                    try:
                        await self._tick(session, gets)
                    except Exception as error:
                        self.survey_at = self._tick_at + MAX_BACKOFF_SECONDS
                        await self._all_failed(error)
        finally:
            if self._task is asyncio.current_task():  # the task was not stopped, it died
                self._task = None
                ends: list[asyncio.Future[Any]] = [place.task for place in self.slots.places]
                for ended in ends + [waiter.ended for job in self.jobs.values() for waiter in job.waiters]:
                    if not ended.done():  # a failed task is better than one that waits for ever
                        ended.set_exception(RuntimeError(f"The poller of '{self.conn_id}' died."))

    async def _until_due(self) -> None:
        dues = [self.now() + REFRESH_SECONDS, *(job.due for job in self.jobs.values())]
        dues += [self.survey_at] if self.slots.places else []
        # While GETs are suspended, pages may still have the statuses.
        self._alarm = max(min(dues), min(self._gets.usable_from, self._tick_at + TICK_SECONDS))
        self._wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._alarm - self.now()):
                await self._wake.wait()
        await asyncio.sleep(DEBOUNCE_SECONDS)

    def _ring(self, moment: float) -> None:
        if moment < self._alarm:
            self._wake.set()

    async def _tick(self, session: AsyncExitStack, gets: asyncio.TaskGroup) -> None:
        """Poll all that is due, once; what is not reached remains due for the next tick."""
        hook = await self._connect(session)
        self._spacing = 1 / hook.settings.max_requests_per_second
        interval = max(min((job.interval for job in self.jobs.values()), default=0.0), self._spacing)
        await self._read_pages(hook, max(interval, TICK_SECONDS))
        jobs = self.jobs.values()
        doubtful = {job.overdub_id for job in jobs if any(waiter.watch.may_be_gone for waiter in job.waiters)}
        if doubtful and self._gone_at <= self._tick_at and self._finding_gone.done():
            self._gone_at = self._tick_at + COUNT_SECONDS
            self._finding_gone = gets.create_task(self._find_gone(hook, doubtful))
        with suppress(TimeoutError):
            async with asyncio.timeout(min(interval, TICK_SECONDS) / 2):
                await self._get_each(hook, gets)

    def _due(self) -> list[_AwaitedOverdub]:
        due = [job for job in self.jobs.values() if job.due <= self._tick_at]
        return sorted(
            due, key=lambda job: job.due + job.interval
        )  # short intervals do not wait for long ones

    def _next(self, watch: OverdubWait, delay: float) -> float:
        """Return when the next poll is due: on a grid, so that waits that began apart meet in one tick."""
        if delay != watch.poke_interval:
            return self.now() + delay
        number = math.ceil(self._tick_at / delay + 0.1)
        return min(max(self.now(), number * delay), self.now() + watch.seconds_left)

    def _dispatch(
        self, job: _AwaitedOverdub, step: Callable[[OverdubWait], float | WaitEvent | None]
    ) -> None:
        """Apply a poll to the rules of each wait for this overdub."""
        job.due = math.inf
        finished = False
        for waiter in [waiter for waiter in job.waiters if not waiter.ended.done()]:
            try:
                result = waiter.context.run(step, waiter.watch)  # it logs where its trigger logs
                if isinstance(result, dict):
                    waiter.ended.set_result(result)
                    finished = finished or result["status"] != "timeout"  # then its slot is free
                else:
                    due = self.now() if result is None else self._next(waiter.watch, result)
                    job.due = min(job.due, due)
            except Exception as error:  # such as a log that cannot be written; the other waits continue
                waiter.ended.set_exception(error)
        if finished:
            self.slots.ended += 1
            self.survey_at = min(self.survey_at, self.now())

    async def _all_failed(self, error: Exception) -> None:
        for number, job in enumerate(self._due(), start=1):
            self._dispatch(job, lambda watch: watch.on_error(error))
            if number % 20 == 0:
                await asyncio.sleep(0)  # each writes a log line; the loop has others to serve

    # --- Many at once: pages of the list or of the bulk status endpoint -----------------------------------

    async def _read_pages(self, hook: HeyGenHook, patience: float) -> None:
        """Read pages while they cost less than GETs, the queue counts jobs, or overdubs may be gone."""
        wanted = {job.overdub_id for job in self._due() if job.due > _AT_ONCE}
        span = max(patience, len(wanted) * self._spacing)  # GETs would take as long
        if hook.resource == "lipsyncs" and len(wanted) > PAGE_COST:
            pages = self._bulk_pages(hook, list(filter(None, [self._known_final, *wanted])))
            if await self._read(self._bulk, pages, lambda page: self._take(page) is not None, span):
                wanted = set()
        if self.survey_at <= self._tick_at and self.slots.places:
            self._release(await self._search(hook, wanted, max(span, COUNT_SECONDS), count=True))
        else:
            await self._search(hook, wanted, span)

    async def _search(
        self, hook: HeyGenHook, wanted: set[str], span: float | None, *, count: bool = False
    ) -> set[str] | None:
        """
        Read the list while that costs less than GETs, or to count the running jobs.

        :returns: the ids of running jobs in the pages, or ``None`` if the list was not read.
        """
        number, gain, best, running = len(wanted), 0, 0, set[str]()
        worth = number > PAGE_COST and (self._search_at <= self._tick_at or number > 2 * self._missed)

        def more(page: api.Statuses) -> bool:
            nonlocal gain, best
            unfinished = page.running() if count else set()
            running.update(unfinished)
            found = wanted & self._take(page)
            wanted.difference_update(found)
            gain += len(found) - PAGE_COST
            best = max(best, gain)
            # The search for the rest may cost an eighth of GETs for the rest.
            pays = worth and len(wanted) > PAGE_COST and best - gain < len(wanted) / 8
            return pays or (count and bool(unfinished))

        if not (worth or count) or not await self._read(self._list, self._list_pages(hook), more, span):
            return None
        if worth:
            self._searches, self._missed = (0, 0) if gain > 0 else (self._searches + 1, number)
            delay = SEARCH_SECONDS * 2**self._searches
            self._search_at = self._tick_at + (delay if self._searches else 0)
        return running

    async def _find_gone(self, hook: HeyGenHook, doubtful: set[str]) -> None:
        """Read the list to its end, even if it lags, beside the ticks: overdubs may be gone."""
        listed = set[str]()

        def more(page: api.Statuses) -> bool:
            listed.update(page.rows)
            if hook is self._hook and not page.has_more:
                for job in [self.jobs[name] for name in doubtful & self.jobs.keys()]:
                    self._dispatch(job, lambda watch: watch.absent(watch.overdub_id in listed))
            return hook is self._hook

        await self._read(self._list, self._list_pages(hook), more, None, statuses=False)

    def _release(self, running: set[str] | None) -> None:
        """Release the create tasks for which there are slots."""
        now = self.now()
        self.survey_at = now + COUNT_SECONDS
        if self.slots.places and (running is not None or self._list.usable_from > now + BLIND_SECONDS):
            # An awaited overdub runs, even if the list lacks it.
            awaited = {n for n, job in self.jobs.items() if not all(one.ended.done() for one in job.waiters)}
            for place in self.slots.count((running or set()) | awaited, now):
                if not place.task.done():
                    place.task.set_result(None)
            self.survey_at = min(self.survey_at, self.slots.go_at)

    async def _read(
        self,
        endpoint: _Endpoint,
        pages: _Pages,
        more: Callable[[api.Statuses], bool],
        span: float | None,
        *,
        statuses: bool = True,
    ) -> bool:
        """
        Read pages while more are needed, unless they are suspended; return whether that succeeded.

        :param statuses: whether the statuses are needed, or only which overdubs there are.
        """
        began = self.now()
        if endpoint.usable_from > began and (statuses or not endpoint.lags):
            return False
        try:
            async with asyncio.timeout(span), aclosing(pages):
                async for page in pages:
                    if not more(page):
                        break
        except Exception as error:
            # GETs meet a rejected credential, too, and it may be replaced sooner.
            rejected = isinstance(error, HeyGenPermanentError) and error.status_code != 401
            first = SUSPEND_SECONDS if rejected else TICK_SECONDS
            endpoint.suspend(error, began, self.now(), first, SUSPEND_SECONDS)
            delay, reason = endpoint.usable_from - self.now(), str(error) or "it takes too long"
            log.info("Doing without %s for %.0f s: %s", endpoint.name, delay, api.redact_urls(reason))
            return False
        endpoint.failures = 0
        polled = [job for job in self.jobs.values() if job.status and self._tick_at < job.due < math.inf]
        if polled and self._verify_at <= self._tick_at:
            self._verify_at = self._tick_at + TICK_SECONDS
            random.choice(polled).due = _AT_ONCE  # noqa: S311 - no secret
        return True

    async def _bulk_pages(self, hook: HeyGenHook, ids: list[str]) -> _Pages:
        for first in range(0, len(ids), api.MAX_PAGE_SIZE):
            yield await self._ask(hook, api.list_statuses(ids[first : first + api.MAX_PAGE_SIZE]))

    async def _list_pages(self, hook: HeyGenHook) -> _Pages:
        token, tokens = None, set[str | None]()
        while token not in tokens and len(tokens) < MAX_LISTED_PAGES:  # cursors may go in circles
            tokens.add(token)
            page = await self._ask(hook, api.list_raw_overdubs(api.MAX_PAGE_SIZE, token))
            yield page
            if (token := page.next_token) is None:
                return

    def _take(self, page: api.Statuses) -> set[str]:
        """Apply the rows of a page; return the ids of the awaited overdubs whose status it contains."""
        stale = self._tick_at - self._known_final_at
        row = page.rows.get(self._known_final)
        if row and row.get("status") not in _FINAL and stale > STALE_SECONDS:
            reason = f"overdub {self._known_final} is not final there, {stale:.0f} s after its end"
            raise HeyGenPermanentError(reason)  # for the poller's own log
        return {
            name
            for name in page.rows.keys() & self.jobs.keys()
            if self._take_row(self.jobs[name], page.rows[name])
        }

    def _take_row(self, job: _AwaitedOverdub, row: dict[str, Any]) -> bool:
        status = row.get("status")
        if not isinstance(status, str) or status == api.NOT_FOUND:
            return False
        if status == job.status:
            self._dispatch(job, lambda watch: watch.on_unchanged())
            return True
        try:
            overdub = api.parse_overdub(job.overdub_id, row)
        except ValueError:
            return False
        if overdub.is_final and not overdub.model_fields_set >= _DETAILS:
            job.due = _AT_ONCE if job.due < math.inf else job.due  # a GET returns the details
        else:
            job.status = status
            self._dispatch(job, lambda watch: watch.on_poll(overdub))
        return True

    # --- One by one -----------------------------------------------------------------------------------

    async def _get_each(self, hook: HeyGenHook, gets: asyncio.TaskGroup) -> None:
        for job in self._due():
            while len(self._under_way) >= MAX_CONCURRENT_GETS:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
            await self._my_turn()
            if self._gets.usable_from > self.now():
                return
            if job.due <= self._tick_at:  # otherwise it has failed together with others
                job.due = math.inf
                get = gets.create_task(self._get(hook, job))
                self._under_way.add(get)
                get.add_done_callback(self._under_way.discard)

    async def _get(self, hook: HeyGenHook, job: _AwaitedOverdub) -> None:
        began = self.now()
        metrics.polled(self.conn_id)
        result: api.Overdub | Exception
        try:
            result = await hook.asend(api.get_overdub(job.overdub_id))
        except Exception as error:
            result = error
        if hook is not self._hook:
            job.due = self.now()  # the response may be of another account, or to an old key
        elif isinstance(result, api.Overdub):
            overdub, self._gets.failures = result, 0
            if overdub.is_final and job.status and self.now() - self._known_final_at > REFRESH_SECONDS:
                self._known_final, self._known_final_at = job.overdub_id, self.now()
            self._dispatch(job, lambda watch: watch.on_poll(overdub))
        else:
            failure = result
            self._dispatch(job, lambda watch: watch.on_error(failure))
            if not isinstance(failure, HeyGenNotFoundError):
                self._gets.suspend(failure, began, self.now(), 0.5, MAX_BACKOFF_SECONDS)
                if self._gets.failures >= MAX_FAILURES_PER_TICK:
                    await self._all_failed(failure)
        self._ring(job.due)

    # --- Requests -------------------------------------------------------------------------------------

    async def _connect(self, session: AsyncExitStack) -> HeyGenHook:
        """Read the Airflow connection again when it is time, and keep an HTTP session for it."""
        now = self.now()
        if self._hook and not self._gets.failures and now - self._resolved_at < REFRESH_SECONDS:
            return self._hook
        hook = HeyGenHook(self.conn_id, max_attempts=1)
        try:
            settings = await hook.asettings()
        except Exception as error:
            if self._hook is None:
                raise
            settings = self._hook.settings  # Airflow's API server may be unreachable for a while
            log.warning(
                "Could not read Airflow connection '%s' again (%s). Using the settings read before.",
                self.conn_id,
                type(error).__name__,  # its text may be a secrets backend's
            )
        if self._task is not asyncio.current_task():  # cancelled, which asgiref swallowed
            raise asyncio.CancelledError
        self._resolved_at = now
        if self._hook is None or settings != self._settings:
            self._hook = None
            await session.aclose()
            if settings != self._settings:
                if self._settings:  # perhaps it is another account
                    self.resource = None
                    for waiter in [waiter for job in self.jobs.values() for waiter in job.waiters]:
                        waiter.watch.account_changed = True
                self._settings = settings
                self._forget()
            await session.enter_async_context(hook)
            hook.assume_resource(self.resource)
            self._hook = hook
        return self._hook

    async def _ask(self, hook: HeyGenHook, call: api.Call[api.Statuses]) -> api.Statuses:
        await self._my_turn()
        metrics.polled(self.conn_id)
        return await hook.asend(call)

    async def _my_turn(self) -> None:
        """Keep to the connection's rate."""
        turn = max(self._next_request_at, self.now())
        self._next_request_at = turn + self._spacing
        await asyncio.sleep(turn - self.now())
