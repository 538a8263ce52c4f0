"""
One poller for all triggers of an event loop that wait on the same Airflow connection.

It polls the overdubs that are due with the fewest requests: by pages of the list, which tell of 100 overdubs
each, or the bulk status call of ``lipsyncs``, and by a GET for each of which these did not tell. A GET has
the last word: the list may lack an overdub, and a GET now and then finds out whether it lags behind.

What a poll means is decided by :class:`~airflow_provider_heygen.waiting.Watch`, how far to read the list by
:mod:`.pages`, and which create task that HeyGen had no slot for goes next by :mod:`.slots`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_heygen import api, metrics
from airflow_provider_heygen.exceptions import (
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenPermanentError,
    retry_delay,
)
from airflow_provider_heygen.hooks.heygen import MAX_LISTED_PAGES, HeyGenHook
from airflow_provider_heygen.pages import PAGE_COST, Pages
from airflow_provider_heygen.slots import COUNT_SECONDS, Place, Slots
from airflow_provider_heygen.waiting import seconds

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from airflow_provider_heygen.connection import HeyGenConnection
    from airflow_provider_heygen.waiting import WaitEvent, Watch

T = TypeVar("T")

log = logging.getLogger(__name__)

DEBOUNCE_SECONDS = 0.2  # from a new wait to its first poll, at most: those that join together share it
GRACE_SECONDS = 5.0  # after its deadline, or its start if later, a wait may still be decided by a poll
REFRESH_SECONDS = 60.0  # how often the Airflow connection is read again, for a key that was rotated
LONGEST_PAUSE = 15.0  # without any request after failures in a row, unless HeyGen asks for more
DOWN = 3  # failed requests in a row after which all that are due have failed
VERIFY_SECONDS = 5.0  # how often a GET checks one of the overdubs that the list or the bulk call tell of
STALE_SECONDS = 10.0  # how far these may lag behind a GET
DISTRUST_SECONDS = 600.0  # how long what lags further behind, or is refused, is left alone
SLOW_FACTOR = 20  # how many times as long as a slow response took it is left alone
MAX_ENDED = 100  # overdubs that a GET found final, kept until the list says so too
TICK_SECONDS = 5.0  # how long a tick sends GETs, at most
SETTLE_SECONDS = 20.0  # how often the list is read to its end, for all that may be gone by then
CONCURRENT_GETS = 10
BLIND_SECONDS = 120.0  # how long the queue stands still while the list cannot be read

_FINAL = ("completed", "failed", api.NOT_FOUND)
_DETAILS = {"title", "duration", "callback_id", "created_at", "failure_message"}


@dataclass(slots=True, eq=False)
class _Waiter:
    """One trigger: its rules, its context (where its log goes) and its end."""

    watch: Watch
    context: contextvars.Context
    ended: asyncio.Future[WaitEvent]


@dataclass(slots=True, eq=False)
class _Job:
    """
    One awaited overdub.

    :param due: when its next poll is due, in seconds of the loop; never while a GET is under way.
    :param interval: what its most eager wait asked for.
    :param word: its status in the list or the bulk call, as it came.
    :param urgent: a GET is needed in any case, to complete what these say or to check it.
    """

    overdub_id: str
    due: float
    interval: float = math.inf
    waiters: list[_Waiter] = field(default_factory=list)
    sought: bool = False
    word: Any = None
    urgent: bool = False
    asked_at: float = -math.inf


@dataclass
class _Source:
    """What tells of many at once; it may be left alone for a while."""

    name: str
    usable_from: float = -math.inf
    pause: float = 0.0

    def leave(self, now: float, reason: str, pause: float) -> None:
        self.pause, self.usable_from = pause, now + pause
        log.info("Doing without %s for %.0f s: %s", self.name, pause, api.redact_links(reason))


# A poller without work stays, as a few bytes that know when the next request may be sent. When the settings
# of its connection change, responses to requests under the old ones do not count.
_pollers: dict[tuple[asyncio.AbstractEventLoop, str], _Poller] = {}


def _poller(heygen_conn_id: str) -> _Poller:
    key = asyncio.get_running_loop(), heygen_conn_id
    if key not in _pollers:
        for gone in [other for other in _pollers if other[0].is_closed()]:
            del _pollers[gone]
        _pollers[key] = _Poller(heygen_conn_id, key[0])
    return _pollers[key]


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
    poller = _poller(heygen_conn_id)
    waiter = poller.join(watch)
    # A deadline that passed while the triggerer was away leaves one poll: the overdub may have ended.
    left = None if watch.deadline is None else max(0.0, watch.left) + GRACE_SECONDS
    try:
        async with asyncio.timeout(left) as limit:
            return await waiter.ended
    except TimeoutError:
        if not limit.expired():
            raise
        return watch.timed_out()
    finally:
        await poller.leave(waiter)


async def queue(heygen_conn_id: str, since: float, pause: float, *, again: bool, log: Any) -> None:
    """
    Wait until a create task that HeyGen had no slot for may send its request again.

    :param since: Unix seconds of the task's first attempt: its place in the queue.
    :param pause: seconds until it may go at the soonest; negative where it was refused before a restart.
    :param again: whether it has waited here before.
    :param log: gets its place.
    """
    poller = _poller(heygen_conn_id)
    place = Place(since, poller.now + max(0.0, pause), poller.loop.create_future())
    ahead = poller.queue(place, refused_now=pause > 0, again=again)
    log.info("HeyGen has no free slot. At least %d tasks wait before this one.", ahead)
    try:
        await place.task
    finally:
        if place in poller.slots.places:
            poller.slots.places.remove(place)
        await poller.stop_if_idle()


class _Poller:
    def __init__(self, heygen_conn_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.conn_id = heygen_conn_id
        self.loop = loop
        self.jobs: dict[str, _Job] = {}
        self.slots: Slots[asyncio.Future[None]] = Slots()
        self._task: asyncio.Task[None] | None = None
        self._gets: set[asyncio.Task[None]] = set()
        self._phase = random.random()  # noqa: S311 - not all triggerers at the same moment
        self._hook: HeyGenHook | None = None
        self._settings: HeyGenConnection | None = None
        self._resolved_at = self._trouble_at = self._rate_until = self._tick_at = -math.inf
        self._wake, self._alarm = asyncio.Event(), math.inf
        self._turn = asyncio.Lock()
        self._forget()

    def _forget(self) -> None:
        """Forget what was learned of the server: a new connection may lead to another one."""
        ceiling = self._settings.max_concurrent_jobs if self._settings else None
        places, self.slots = self.slots.places, Slots(ceiling)
        self.slots.places, self._count_at = places, -math.inf
        self._listed_at = self._settled_at = -math.inf
        self._list, self._bulk = _Source("the list of overdubs"), _Source("the bulk status call")
        self._pages = Pages()
        self._ended: dict[str, float] = {}
        self._verify_at, self._took, self._running = -math.inf, 0.0, set[str]()
        self._next_turn, self._gets_from = self._rate_until, -math.inf
        self._trouble = self._failed = 0  # failures in a row, those at the same time counted once, and all
        for job in self.jobs.values():
            job.sought, job.word = False, None
            job.due = min(job.due, self.now)  # what an earlier connection was asked to wait for is over

    @property
    def now(self) -> float:
        return self.loop.time()

    # --- Coming and going -----------------------------------------------------------------------------

    def join(self, watch: Watch) -> _Waiter:
        waiter = _Waiter(watch, contextvars.copy_context(), self.loop.create_future())
        soon = self._start()
        job = self.jobs.setdefault(watch.overdub_id, _Job(watch.overdub_id, soon))
        job.due = min(job.due, soon)
        job.interval = min(job.interval, watch.poke_interval)
        job.word = None  # whoever comes anew has not heard it
        job.waiters.append(waiter)
        return waiter

    def queue(self, place: Place[asyncio.Future[None]], **how: bool) -> int:
        self._count_at = min(self._start(), self._count_at if self.slots.places else math.inf)
        return self.slots.join(place, **how)

    def _start(self) -> float:
        """Have the poller run, and soon; return when."""
        soon = (self.now // DEBOUNCE_SECONDS + 1) * DEBOUNCE_SECONDS
        self._ring(soon)
        if self._task is None:
            # Not in the context of the first trigger, whose log would get all lines.
            self._task = self.loop.create_task(self._run(), context=contextvars.Context())
            self._task.add_done_callback(self._died)
        return soon

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
            # Reading a connection may swallow the cancellation (asgiref does); it also sees that it is over.
            self._wake.set()
            task.cancel()
            await asyncio.wait([task], timeout=GRACE_SECONDS)

    def _died(self, task: asyncio.Task[None]) -> None:
        if task is not self._task:
            return
        self._task = None
        waits: list[asyncio.Future[Any]] = [w.ended for job in self.jobs.values() for w in job.waiters]
        for ended in waits + [place.task for place in self.slots.places]:
            if not ended.done():  # better a failed task than one that waits for ever
                ended.set_exception(RuntimeError(f"The poller of '{self.conn_id}' died: {task!r}"))

    # --- The rhythm -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._hook, self._gets = None, set()
        async with AsyncExitStack() as session, asyncio.TaskGroup() as gets:
            while True:
                await self._until_due()
                if self._task is not asyncio.current_task():
                    raise asyncio.CancelledError  # which also ends the GETs that are under way
                try:
                    await self._tick(session, gets)
                except Exception as error:
                    await self._all_failed(error)

    async def _until_due(self) -> None:
        self._alarm = min((job.due for job in self.jobs.values()), default=math.inf)
        self._alarm = min(self._alarm, self._count_at if self.slots.places else math.inf)
        while self._task is asyncio.current_task() and (now := self.now) < self._alarm:
            self._wake.clear()
            timer = self.loop.call_at(min(self._alarm, now + 3600), self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()

    def _ring(self, moment: float) -> None:
        if moment < self._alarm:
            self._alarm = moment
            self._wake.set()

    async def _tick(self, session: AsyncExitStack, gets: asyncio.TaskGroup) -> None:
        """Poll all that is due, once; what is not reached remains due for the next tick."""
        self._tick_at = self.now
        hook = await self._connect(session)
        self._spacing = 1 / hook.settings.max_requests_per_second
        interval = max(min((job.interval for job in self.jobs.values()), default=0.0), self._spacing)
        await self._ask_for_many(hook, interval)
        # One interval's worth of GETs, or a quarter of it: then others are due again, and pages may pay.
        span = min(interval, TICK_SECONDS)
        await self._ask_for_each(gets, hook, max(self._tick_at + span, self.now + span / 4))
        if self._failed >= DOWN:
            await self._all_failed(self._last_trouble)
        if self._gets_from > self.now:
            for job in self._due():  # the connection may change until then
                job.due = max(job.due, min(self._gets_from, self.now + REFRESH_SECONDS))

    def _due(self) -> list[_Job]:
        due = [job for job in self.jobs.values() if job.due <= self._tick_at]
        # The eager do not stand behind many that are not.
        return sorted(due, key=lambda job: (not job.urgent, job.due + job.interval))

    def _next(self, watch: Watch, pause: float) -> float:
        """Return when the next poll is due: on a grid, so that waits that began apart meet in one tick."""
        now, interval = self.now, watch.poke_interval
        if pause != interval:
            # GETs may have to wait for longer; until then the list may tell, or the connection change.
            return now + (min(pause, REFRESH_SECONDS) if self._gets_from > now else pause)
        phase = self._phase * interval
        slot = math.ceil((self._tick_at + interval / 10 - phase) / interval)
        return min(max(now, slot * interval + phase), now + watch.left)

    def _tell(self, job: _Job, take: Callable[[Watch], float | WaitEvent | None]) -> None:
        """Feed a poll to the rules of each wait for this overdub."""
        job.due, job.urgent = math.inf, False
        for waiter in job.waiters:
            if waiter.ended.done():
                continue
            try:
                step = waiter.context.run(take, waiter.watch)  # its log lines go where its trigger logs
                if isinstance(step, dict):
                    waiter.ended.set_result(step)
                else:
                    job.due = min(job.due, self.now if step is None else self._next(waiter.watch, step))
            except Exception as error:  # it could not log, say; the others can
                waiter.ended.set_exception(error)

    async def _all_failed(self, error: Exception) -> None:
        self._count_at = max(self._count_at, self._tick_at + LONGEST_PAUSE)
        for number, job in enumerate(self._due(), start=1):
            self._tell(job, lambda watch: watch.failed(error))
            if number % 20 == 0:
                await asyncio.sleep(0)  # each writes a line to its log; the loop has others to serve

    # --- Many at once: the list, the bulk call --------------------------------------------------------

    async def _ask_for_many(self, hook: HeyGenHook, interval: float) -> None:
        """Read the list or the bulk call, for the overdubs that are due and for the queue."""
        due = self._due()
        self._told: list[_Job] = []
        counting = bool(self.slots.places) and self._count_at <= self._tick_at
        bulk = hook.resource == "lipsyncs" and len(due) > PAGE_COST
        if bulk and await self._try(self._bulk, self._read_bulk(hook, due), interval):
            due = []
        if due or counting:
            await self._try(self._list, self._read_list(hook, due, interval, counting), interval)
        if counting:
            self._let_go()
        told = [job for job in self._told if self._tick_at < job.due < math.inf]
        if told and self._verify_at <= self._tick_at:
            self._verify_at = self._tick_at + VERIFY_SECONDS
            job = min(told, key=lambda job: job.asked_at)
            job.due, job.urgent = self._tick_at, True

    async def _try(self, source: _Source, reading: Coroutine[Any, Any, None], interval: float) -> bool:
        """Read a source unless it is left alone; tell whether that went well."""
        if source.usable_from > self._tick_at:
            reading.close()
            return False
        self._took, self._lag = 0.0, ""
        try:
            await reading
            if self._lag:
                raise HeyGenPermanentError(self._lag)
            if self._took > max(interval, TICK_SECONDS):
                raise TimeoutError(f"it took {self._took:.0f} s")
            source.pause = 0.0 if self._took else source.pause  # or no request was made
        except Exception as error:
            pause = min(max(5.0, source.pause * 2, SLOW_FACTOR * self._took), DISTRUST_SECONDS)
            # A refusal of the credential is met by the GETs as well, and may be over sooner.
            if isinstance(error, HeyGenPermanentError) and error.status_code != 401:
                pause = DISTRUST_SECONDS
            source.leave(self.now, str(error), max(pause, retry_delay(1, error) if _asks(error) else 0.0))
            return False
        return True

    async def _read_bulk(self, hook: HeyGenHook, due: list[_Job]) -> None:
        ended = list(self._ended)[:10]
        ids, size = [job.overdub_id for job in due if not job.urgent], api.MAX_PAGE_SIZE - len(ended)
        for first in range(0, len(ids), size):
            asked_at = self.now
            some = dict.fromkeys(ids[first : first + size] + ended)
            for overdub_id, row in (await self._ask(hook, api.list_statuses(some))).rows.items():
                self._take_row(overdub_id, row, asked_at)

    async def _read_list(self, hook: HeyGenHook, due: list[_Job], interval: float, counting: bool) -> None:
        """Read the list as far as it pays; while jobs run, for the queue; to its end if one may be gone."""
        began = self.now
        wanted = {job.overdub_id for job in due if not job.urgent}
        reading = self._pages.begin(began, len(wanted), sum(not job.sought for job in due))
        doubtful = self._may_be_gone() if self._settled_at + SETTLE_SECONDS <= began else []
        if not (reading or counting or doubtful):
            return
        ids, running, complete = set[str](), set[str](), False
        async with aclosing(self._list_pages(hook)) as pages:
            async for asked_at, rows, complete in pages:  # noqa: B007 - complete is used after it
                left = len(wanted)
                for overdub_id, row in rows.items():
                    self._take_row(overdub_id, row, asked_at)
                unfinished = {name for name, row in rows.items() if row.get("status") not in _FINAL}
                ids, running, wanted = ids | rows.keys(), running | unfinished, wanted - rows.keys()
                reading = reading and self._pages.more(left - len(wanted), len(wanted))
                until = began + max(interval, len(wanted) * self._spacing)
                reading = reading and self.now + self._took < until
                counting = counting and bool(unfinished)
                if not (reading or counting or doubtful):
                    break
        self._pages.end()
        self._running, self._listed_at = running, self.now
        for job in due:
            job.sought = True
        if complete:
            self._settle(doubtful, ids)

    async def _list_pages(self, hook: HeyGenHook) -> AsyncGenerator[tuple[float, dict[str, Any], bool]]:
        """Read the list: when a page was asked for, its rows by id, and whether it is the last one."""
        token, tokens = None, set[str]()
        for _ in range(MAX_LISTED_PAGES):
            asked_at = self.now
            page = await self._ask(hook, api.skim_overdubs(api.MAX_PAGE_SIZE, token))
            token = page.next_token
            yield asked_at, page.rows, token is None
            if token is None or token in tokens:  # or it goes in circles: there may be more
                return
            tokens.add(token)

    def _may_be_gone(self) -> list[_Job]:
        return [job for job in self.jobs.values() if any(w.watch.may_be_gone for w in job.waiters)]

    def _settle(self, doubtful: list[_Job], ids: set[str]) -> None:
        for job in doubtful:
            self._settled_at = self.now
            self._tell(job, lambda watch: watch.absent(job.overdub_id in ids))  # noqa: B023 - at once

    def _take_row(self, overdub_id: str, row: dict[str, Any], asked_at: float) -> None:
        """Take one row of the list or of the bulk call."""
        job, word, ended_at = self.jobs.get(overdub_id), row.get("status"), self._ended.get(overdub_id)
        if (job is None and ended_at is None) or not isinstance(word, str):
            return  # of somebody else, or half a row, which tells nothing
        if job and word == job.word:
            self._told.append(job)
            self._tell(job, lambda watch: watch.unchanged())
            return
        try:
            overdub = api.overdub_of(overdub_id, row)
        except ValueError:
            return
        if ended_at is not None:
            if overdub.is_final or word == api.NOT_FOUND:
                del self._ended[overdub_id]
            elif asked_at - ended_at > STALE_SECONDS:
                self._ended.clear()
                late = asked_at - ended_at
                self._lag = f"overdub {overdub_id} is {overdub.status} there, {late:.0f} s after its end"
        if job is None or word == api.NOT_FOUND:
            return
        self._told.append(job)
        if overdub.is_final and not overdub.model_fields_set >= _DETAILS:
            job.due, job.urgent = min(job.due, self._tick_at), True  # a GET has what is missing
            return
        job.word = word
        self._tell(job, lambda watch: watch.saw(overdub))

    def _let_go(self) -> None:
        """Count the running jobs, and let as many create tasks go as there is room for."""
        now = self.now
        self._count_at = now + COUNT_SECONDS
        if self._listed_at < self._tick_at:
            if now - self._listed_at < BLIND_SECONDS:
                return  # it may be readable again
            self._running = set()
        # What is awaited runs, also where the list does not have it.
        waits = {i for i, job in self.jobs.items() if not all(waiter.ended.done() for waiter in job.waiters)}
        for place in self.slots.count(self._running | waits, now):
            if not place.task.done():
                place.task.set_result(None)
        self._count_at = self.slots.next_count(now)

    # --- One by one -----------------------------------------------------------------------------------

    async def _ask_for_each(self, gets: asyncio.TaskGroup, hook: HeyGenHook, until: float) -> None:
        """GET what is due still."""
        for job in self._due():
            while len(self._gets) >= CONCURRENT_GETS and self.now < until:
                await asyncio.wait(self._gets, timeout=until - self.now, return_when=asyncio.FIRST_COMPLETED)
            if self.now >= until:
                break
            await self._my_turn()
            if self._gets_from > self.now:
                break
            if job.due <= self._tick_at:  # it has not been told meanwhile
                job.due, job.asked_at = math.inf, self.now
                get = gets.create_task(self._get(hook, job))
                self._gets.add(get)
                get.add_done_callback(self._gets.discard)
                if self._failed >= DOWN:  # one tells whether the others shall try
                    await asyncio.wait([get], timeout=TICK_SECONDS)
            if self._failed >= DOWN:
                break

    async def _get(self, hook: HeyGenHook, job: _Job) -> None:
        try:
            overdub = await self._send(hook, api.get_overdub(job.overdub_id))
        except Exception as error:
            failure = error
            outdated = hook is not self._hook
            if not outdated and _asks(error):
                self._gets_from = self.now + retry_delay(1, error)
            if outdated or self._failed >= DOWN:
                job.due = self._tick_at  # for a fresh connection, or to fail with the others
            else:
                self._tell(job, lambda watch: watch.failed(failure))
        else:
            if hook is not self._hook:  # perhaps another account
                job.due = self.now
            else:
                if overdub.is_final:
                    self._ended[job.overdub_id] = self.now
                    if len(self._ended) > MAX_ENDED:
                        del self._ended[next(iter(self._ended))]
                self._tell(job, lambda watch: watch.saw(overdub))
        self._ring(job.due)

    # --- Requests -------------------------------------------------------------------------------------

    async def _connect(self, session: AsyncExitStack) -> HeyGenHook:
        """Read the Airflow connection when it is time to, and keep an HTTP session for it."""
        now = self.now
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
                    self._settings = settings
                    self._forget()
                await session.enter_async_context(hook)
                self._hook = hook
        return self._hook

    async def _ask(self, hook: HeyGenHook, call: api.Call[T]) -> T:
        await self._my_turn()
        return await self._send(hook, call)

    async def _my_turn(self) -> None:
        """Keep to the connection's rate, and pause while requests fail."""
        async with self._turn:
            while (pause := self._next_turn - self.now) > 0:  # noqa: ASYNC110 - it may be put off meanwhile
                await asyncio.sleep(pause)
            self._next_turn = self._rate_until = self.now + self._spacing

    async def _send(self, hook: HeyGenHook, call: api.Call[T]) -> T:
        """Send one call; pause longer after each failure in a row."""
        started_at = self.now
        metrics.polled(self.conn_id)
        try:
            answer = await hook.asend(call)
        except HeyGenError as error:
            if not isinstance(error, HeyGenNotFoundError) and not error.retry_after:
                self._last_trouble, self._failed = error, self._failed + 1
                if started_at >= self._trouble_at:  # of several that failed together, one counts
                    self._trouble, self._trouble_at = self._trouble + 1, self.now
                pause = retry_delay(self._trouble, first=0.5, longest=LONGEST_PAUSE)
                self._next_turn = max(self._next_turn, self.now + pause)
            raise
        finally:
            self._took = self.now - started_at
        self._trouble = self._failed = 0
        return answer


def _asks(error: Exception) -> bool:
    return bool(getattr(error, "retry_after", None))
