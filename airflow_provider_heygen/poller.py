"""
One poller for all triggers of an event loop that wait on the same Airflow connection.

On each tick, it polls the overdubs that are due: first with pages that tell of up to 100 each, of the list or
of the bulk status call of ``lipsyncs``, as far as they cost less than GETs; then with a GET for each of the
rest. A GET has the last word: the list may lack an overdub, and a GET now and then finds out whether it lags.

What a poll means is decided by :class:`~airflow_provider_heygen.waiting.Watch`, and which create task that
HeyGen had no slot for goes next by :mod:`.slots`.
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
from airflow_provider_heygen.waiting import seconds

if TYPE_CHECKING:
    from airflow_provider_heygen.connection import HeyGenConnection
    from airflow_provider_heygen.waiting import WaitEvent, Watch

log = logging.getLogger(__name__)

DEBOUNCE_SECONDS = 0.2  # from a new wait to its first poll: those that join together share it
GRACE_SECONDS = 5.0  # after its deadline, or its start if later, a wait may still be decided by a poll
REFRESH_SECONDS = 60.0  # how often the Airflow connection is read again, for a key that was rotated
TICK_SECONDS = 5.0  # how long GETs and pages wait for each other; how often a GET verifies what pages tell
CONCURRENT_GETS = 10
DOWN = 3  # failed GETs in a row after which all that are due have failed
LONGEST_PAUSE = 15.0  # between GETs after failures in a row, unless HeyGen asks for more
DISTRUST_SECONDS = 600.0  # how long pages are left alone at most, and if they are refused or lag behind
STALE_SECONDS = 10.0  # how far they may lag behind a GET
BLIND_SECONDS = 120.0  # if the list is left alone for longer, the queue does without
PAGE_COST = 2  # in GETs: a page is one request, but takes twice the CPU (measured)
SEARCH_SECONDS = 10.0  # until another search for what was on no page that paid; doubles

_FINAL = ("completed", "failed", api.NOT_FOUND)
_DETAILS = {"title", "duration", "callback_id", "created_at", "failure_message"}
_AT_ONCE = -math.inf  # when a GET is due that no page can replace

_Pages = AsyncGenerator[api.Statuses, None]


class _Waiter(NamedTuple):
    """One trigger: its rules, its context (where its log goes) and its end."""

    watch: Watch
    context: contextvars.Context
    ended: asyncio.Future[WaitEvent]


@dataclass(slots=True, eq=False)
class _Job:
    """One awaited overdub."""

    overdub_id: str
    due: float = math.inf  # when its next poll is due, in seconds of the loop; not while a GET is under way
    interval: float = math.inf  # what its most eager wait asked for
    waiters: list[_Waiter] = field(default_factory=list)
    word: str | None = None  # its status in a page, as it came
    hidden_until: float = -math.inf  # until then no page is read for it
    vain_searches: int = 0


@dataclass(eq=False)
class _Route:
    """One kind of request, which is left alone for a while when it fails."""

    name: str
    failures: int = 0
    usable_from: float = -math.inf

    def failed(self, error: Exception, began: float, now: float, first: float, longest: float) -> None:
        if began >= self.usable_from and not getattr(error, "retry_after", None):
            self.failures += 1  # of several that failed together, one counts
        pause = retry_delay(self.failures, error, first=first, longest=longest)
        self.usable_from = max(self.usable_from, now + pause)


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
    """
    try:
        watch.overdub_id = api.check_id(watch.overdub_id)  # a template may have made it a number
        watch.poke_interval = seconds(watch.poke_interval, "poke_interval")
    except HeyGenPermanentError as error:
        return watch.give_up(error)
    poller = _poller(heygen_conn_id)
    waiter = poller.join(watch)
    # A deadline that passed while the triggerer was away leaves one poll: the overdub may have ended.
    left = None if watch.deadline is None else max(0.0, watch.left) + GRACE_SECONDS
    try:
        async with asyncio.timeout(left):
            return await waiter.ended
    except TimeoutError:
        return watch.timed_out()
    finally:
        await poller.leave(waiter)


async def queue(heygen_conn_id: str, since: float, pause: float, *, again: bool, log: Any) -> None:
    """
    Wait until a create task that HeyGen had no slot for may send its request again.

    The arguments are those of :class:`.HeyGenSlotTrigger`; a pause below 0: it was refused before a restart.
    """
    poller = _poller(heygen_conn_id)
    place = Place(since, poller.now() + max(0.0, pause), poller.loop.create_future())
    ahead = poller.slots.join(place, refused_now=pause > 0, again=again)
    poller.survey_at = min(poller.survey_at, poller.now())
    poller.start()
    log.info("HeyGen has no free slot. At least %d tasks wait before this one.", ahead)
    try:
        await place.task
    finally:
        with suppress(ValueError):  # it was let go
            poller.slots.places.remove(place)
        await poller.stop_if_idle()


class _Poller:
    def __init__(self, heygen_conn_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.conn_id, self.loop, self.now = heygen_conn_id, loop, loop.time
        self.jobs: dict[str, _Job] = {}
        self.slots = Slots()
        self._task: asyncio.Task[None] | None = None
        self._hook: HeyGenHook | None = None
        self._settings: HeyGenConnection | None = None
        self._resolved_at = self._next_turn = self._tick_at = -math.inf
        self._wake, self._alarm = asyncio.Event(), math.inf
        self._forget()

    def _forget(self) -> None:
        """Forget what was learned of the server: a new connection may lead to another one."""
        self.slots = Slots(self._settings.max_concurrent_jobs if self._settings else None, self.slots.places)
        self._list, self._bulk = _Route("the list of overdubs"), _Route("the bulk status call")
        self._gets = _Route("GETs")
        self.survey_at = self._verify_at = self._witness_at = -math.inf
        self._witness = ""  # an overdub that has ended, says a GET, and was running, said a page before
        for job in self.jobs.values():
            job.word, job.hidden_until = None, -math.inf
            job.due = min(job.due, self.now())  # what an earlier connection was asked to wait for is over

    # --- Coming and going -----------------------------------------------------------------------------

    def join(self, watch: Watch) -> _Waiter:
        waiter = _Waiter(watch, contextvars.copy_context(), self.loop.create_future())
        job = self.jobs.setdefault(watch.overdub_id, _Job(watch.overdub_id))
        job.due = min(job.due, self.now())
        job.interval = min(job.interval, watch.poke_interval)
        job.word = None  # whoever comes anew has not heard it
        job.waiters.append(waiter)
        self.start()
        return waiter

    def start(self) -> None:
        """Have the poller run, and soon."""
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

    # --- The rhythm -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._hook, self._under_way = None, set[asyncio.Task[None]]()
        try:
            async with AsyncExitStack() as session, asyncio.TaskGroup() as gets:
                while True:
                    await self._until_due()
                    try:
                        await self._tick(session, gets)
                    except Exception as error:
                        self.survey_at = self._tick_at + LONGEST_PAUSE
                        await self._all_failed(error)
        finally:
            if self._task is asyncio.current_task():  # nobody has stopped it
                self._task = None
                waits: list[asyncio.Future[Any]] = [place.task for place in self.slots.places]
                for ended in waits + [waiter.ended for job in self.jobs.values() for waiter in job.waiters]:
                    if not ended.done():  # better a failed task than one that waits for ever
                        ended.set_exception(RuntimeError(f"The poller of '{self.conn_id}' died."))

    async def _until_due(self) -> None:
        dues = [self.now() + REFRESH_SECONDS, *(job.due for job in self.jobs.values())]
        dues += [self.survey_at] if self.slots.places else []
        # While GETs have to wait, pages may tell.
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
        self._tick_at = self.now()
        hook = await self._connect(session)
        self._spacing = 1 / hook.settings.max_requests_per_second
        interval = max(min((job.interval for job in self.jobs.values()), default=0.0), self._spacing)
        await self._ask_for_many(hook, max(interval, TICK_SECONDS))
        if self.survey_at <= self._tick_at:
            await self._survey(hook)
        with suppress(TimeoutError):
            async with asyncio.timeout(min(interval, TICK_SECONDS) / 2):
                await self._ask_for_each(hook, gets)

    def _due(self) -> list[_Job]:
        due = [job for job in self.jobs.values() if job.due <= self._tick_at]
        return sorted(due, key=lambda job: job.due + job.interval)  # the eager do not stand behind others

    def _next(self, watch: Watch, pause: float) -> float:
        """Return when the next poll is due: on a grid, so that waits that began apart meet in one tick."""
        if pause != watch.poke_interval:
            return self.now() + pause
        slot = math.ceil(self._tick_at / pause + 0.1)
        return min(max(self.now(), slot * pause), self.now() + watch.left)

    def _tell(self, job: _Job, take: Callable[[Watch], float | WaitEvent | None]) -> None:
        """Feed a poll to the rules of each wait for this overdub."""
        job.due = math.inf
        for waiter in [waiter for waiter in job.waiters if not waiter.ended.done()]:
            try:
                step = waiter.context.run(take, waiter.watch)  # its log lines go where its trigger logs
                if isinstance(step, dict):
                    waiter.ended.set_result(step)
                else:
                    job.due = min(job.due, self.now() if step is None else self._next(waiter.watch, step))
            except Exception as error:  # it could not log, say; the others can
                waiter.ended.set_exception(error)

    async def _all_failed(self, error: Exception) -> None:
        for number, job in enumerate(self._due(), start=1):
            self._tell(job, lambda watch: watch.failed(error))
            if number % 20 == 0:
                await asyncio.sleep(0)  # each writes a line to its log; the loop has others to serve

    # --- Many at once: pages of the list or of the bulk call ------------------------------------------

    async def _ask_for_many(self, hook: HeyGenHook, patience: float) -> None:
        """Read pages as long as the search for the rest costs less than an eighth of GETs for the rest."""
        due = [job for job in self._due() if job.due > _AT_ONCE and job.hidden_until <= self._tick_at]
        wanted = {job.overdub_id: job for job in due}
        gain = best = 0
        unpaid: list[_Job] = []

        def more(page: api.Statuses) -> bool:
            nonlocal gain, best, unpaid
            told = [name for name, row in page.rows.items() if self._take_row(name, row)]
            found = [wanted.pop(name) for name in told if name in wanted]
            gain += len(found) - PAGE_COST
            best, unpaid = (gain, []) if gain > best else (best, unpaid + found)
            return len(wanted) > PAGE_COST and best - gain < len(wanted) / 8

        routes = [(self._list, self._list_pages(hook))]
        if hook.resource == "lipsyncs":
            routes.insert(0, (self._bulk, self._bulk_pages(hook, [*wanted, self._witness])))
        span = max(patience, len(wanted) * self._spacing)  # GETs would take as long
        for route, pages in routes:
            if len(wanted) > PAGE_COST and await self._read(route, pages, more, span):
                # What was on no page that paid gets GETs.
                for job in unpaid + list(wanted.values()) * (len(wanted) > PAGE_COST):
                    # On a grid, too: those that are hidden together are worth another search together.
                    turn = self._tick_at // SEARCH_SECONDS + 2**job.vain_searches
                    job.hidden_until, job.vain_searches = turn * SEARCH_SECONDS, job.vain_searches + 1
                told = [job for job in self.jobs.values() if job.word and self._tick_at < job.due < math.inf]
                if told and self._verify_at <= self._tick_at:
                    self._verify_at = self._tick_at + TICK_SECONDS
                    random.choice(told).due = _AT_ONCE  # noqa: S311 - no secret
                return

    async def _survey(self, hook: HeyGenHook) -> None:
        """Read the list while jobs run, for the queue, or to its end, if overdubs may be gone."""
        jobs = self.jobs.items()
        doubtful = {name for name, job in jobs if any(waiter.watch.may_be_gone for waiter in job.waiters)}
        if not (doubtful or self.slots.places):
            return
        listed, running = set[str](), set[str]()

        def more(page: api.Statuses) -> bool:
            # Where some may be gone, the list has to be read to its end, also if it lags.
            for name, row in () if doubtful else page.rows.items():
                self._take_row(name, row)
            unfinished = {name for name, row in page.rows.items() if row.get("status") not in _FINAL}
            listed.update(page.rows)
            running.update(unfinished)
            for job in [self.jobs[name] for name in doubtful & self.jobs.keys() if not page.next_token]:
                self._tell(job, lambda watch: watch.absent(watch.overdub_id in listed))
            return bool(doubtful or unfinished)

        was_read = await self._read(self._list, self._list_pages(hook), more)
        now = self.now()
        self.survey_at = now + COUNT_SECONDS
        if self.slots.places and (was_read or self._list.usable_from > now + BLIND_SECONDS):
            # What is awaited runs, also where the list does not have it.
            running |= {name for name, job in jobs if not all(waiter.ended.done() for waiter in job.waiters)}
            for place in self.slots.count(running, now):
                if not place.task.done():
                    place.task.set_result(None)
            self.survey_at = min(self.survey_at, self.slots.go_at)

    async def _read(
        self, route: _Route, pages: _Pages, more: Callable[[api.Statuses], bool], span: float | None = None
    ) -> bool:
        """Read pages while more are needed, unless they are left alone; return whether that went well."""
        began = self.now()
        if route.usable_from > began:
            return False
        try:
            async with asyncio.timeout(span), aclosing(pages):
                async for page in pages:
                    if not more(page):
                        break
        except Exception as error:
            # A refusal of the credential is met by the GETs as well, and may be over sooner.
            refused = isinstance(error, HeyGenPermanentError) and error.status_code != 401
            first = DISTRUST_SECONDS if refused else TICK_SECONDS
            route.failed(error, began, self.now(), first, DISTRUST_SECONDS)
            pause, reason = route.usable_from - self.now(), str(error) or "it takes too long"
            log.info("Doing without %s for %.0f s: %s", route.name, pause, api.redact_links(reason))
            return False
        route.failures = 0
        return True

    async def _bulk_pages(self, hook: HeyGenHook, ids: list[str]) -> _Pages:
        for first in range(0, len(ids), api.MAX_PAGE_SIZE):
            some = filter(None, ids[first : first + api.MAX_PAGE_SIZE])
            yield await self._ask(hook, api.list_statuses(some))

    async def _list_pages(self, hook: HeyGenHook) -> _Pages:
        token, tokens = None, set[str | None]()
        while token not in tokens and len(tokens) < MAX_LISTED_PAGES:  # it may go in circles
            tokens.add(token)
            page = await self._ask(hook, api.skim_overdubs(api.MAX_PAGE_SIZE, token))
            yield page
            if (token := page.next_token) is None:
                return

    def _take_row(self, overdub_id: str, row: dict[str, Any]) -> bool:
        """Take one row of a page; return whether it tells of an awaited overdub."""
        job, word = self.jobs.get(overdub_id), row.get("status")
        late = self._tick_at - self._witness_at
        if overdub_id == self._witness and word not in _FINAL and late > STALE_SECONDS:
            reason = f"overdub {overdub_id} is {word} there, {late:.0f} s after its end"
            raise HeyGenPermanentError(reason)  # for the poller's own log
        if job is None or not isinstance(word, str) or word == api.NOT_FOUND:
            return False  # of somebody else, or half a row, which tells nothing
        if word == job.word:
            self._tell(job, lambda watch: watch.unchanged())
            return True
        try:
            overdub = api.overdub_of(overdub_id, row)
        except ValueError:
            return False
        if overdub.is_final and not overdub.model_fields_set >= _DETAILS:
            job.due = _AT_ONCE if job.due < math.inf else job.due  # a GET has what is missing
        else:
            job.word = word
            self._tell(job, lambda watch: watch.saw(overdub))
        return True

    # --- One by one -----------------------------------------------------------------------------------

    async def _ask_for_each(self, hook: HeyGenHook, gets: asyncio.TaskGroup) -> None:
        for job in self._due():
            while len(self._under_way) >= CONCURRENT_GETS:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
            await self._my_turn()
            if self._gets.usable_from > self.now():
                return
            if job.due <= self._tick_at:  # it has not failed with others meanwhile
                job.due = math.inf
                get = gets.create_task(self._get(hook, job))
                self._under_way.add(get)
                get.add_done_callback(self._under_way.discard)

    async def _get(self, hook: HeyGenHook, job: _Job) -> None:
        began = self.now()
        metrics.polled(self.conn_id)
        try:
            answer: api.Overdub | Exception = await hook.asend(api.get_overdub(job.overdub_id))
        except Exception as error:
            answer = error
        if hook is not self._hook:
            job.due = self.now()  # perhaps another account, or a fresh key
        elif isinstance(answer, api.Overdub):
            overdub, self._gets.failures = answer, 0
            if overdub.is_final and job.word and self.now() - self._witness_at > REFRESH_SECONDS:
                self._witness, self._witness_at = job.overdub_id, self.now()
            self._tell(job, lambda watch: watch.saw(overdub))
        else:
            failure = answer
            self._tell(job, lambda watch: watch.failed(failure))
            if isinstance(failure, HeyGenNotFoundError):
                job.hidden_until = self.now() + REFRESH_SECONDS  # pages have no more to tell
            else:
                self._gets.failed(failure, began, self.now(), 0.5, LONGEST_PAUSE)
                if self._gets.failures >= DOWN:
                    await self._all_failed(failure)
        self._ring(job.due)

    # --- Requests -------------------------------------------------------------------------------------

    async def _connect(self, session: AsyncExitStack) -> HeyGenHook:
        """Read the Airflow connection when it is time to, and keep an HTTP session for it."""
        now = self.now()
        if self._hook and not self._gets.failures and now - self._resolved_at < REFRESH_SECONDS:
            return self._hook
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
        if self._hook is None or settings != self._settings:
            self._hook = None
            await session.aclose()
            if settings != self._settings:
                self._settings = settings
                self._forget()
            await session.enter_async_context(hook)
            self._hook = hook
        return self._hook

    async def _ask(self, hook: HeyGenHook, call: api.Call[api.Statuses]) -> api.Statuses:
        await self._my_turn()
        metrics.polled(self.conn_id)
        return await hook.asend(call)

    async def _my_turn(self) -> None:
        """Keep to the connection's rate."""
        await asyncio.sleep(self._next_turn - self.now())
        self._next_turn = max(self._next_turn, self.now()) + self._spacing
