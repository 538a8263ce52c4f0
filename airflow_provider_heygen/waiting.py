"""
Waiting for an overdub, without I/O: what each look means, when to look again, how a wait ends.

Operator and sensor on the worker and the trigger in the triggerer all wait by these rules, so a wait ends the
same way wherever it happens.
"""

from __future__ import annotations

import math
import random
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from airflow_provider_heygen.api import DEFAULT_FAILURE_MESSAGE, Overdub, OverdubStatus, redact_links
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenOverdubFailedError,
    HeyGenOverdubTimeoutError,
    HeyGenPermanentError,
    HeyGenTransientError,
    HeyGenTriggerEventError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_provider_heygen.hooks.heygen import HeyGenHook
    from airflow_provider_heygen.metrics import Wait

FRESH_SECONDS = 30
"""How long after our own create a 404 means "not readable yet" rather than "gone"."""

MAX_CONSECUTIVE_FAILURES = 10
"""Failed looks in a row after which a wait is given up."""

MAX_TIMES_GIVEN_UP = 3
"""How often a wait that was given up is taken up again, because the worker finds the overdub well."""

LONGEST_PAUSE_ON_WORKER = 5.0
"""The longest ``Retry-After`` that a deferrable task sits through, in seconds. In an outage all waits may
come back to a worker at once, and each holds one."""

LONGEST_BACKOFF = 120.0
"""Seconds between looks, at most, while they fail (unless HeyGen asks for more)."""


class WaitEvent(TypedDict):
    """
    How a wait ended. Airflow stores and logs it whole: it holds no link and no secret.

    :param overdub_id: the overdub waited for.
    :param status: ``completed`` or ``failed`` as HeyGen says; ``timeout`` when the deadline passed; ``error``
        when looking was given up or refused.
    :param message: text for people.
    :param overdub: the details without links, with ``completed``.
    """

    overdub_id: str
    status: Literal["completed", "failed", "timeout", "error"]
    message: str
    overdub: NotRequired[dict[str, Any]]


class Watch:
    """
    Follow one overdub: fed with looks, answers each with a pause in seconds or with the end.

    :param overdub_id: the overdub.
    :param poke_interval: seconds between looks while all is well.
    :param deadline: Unix seconds at which the wait ends; ``None`` for never.
    :param max_consecutive_failures: failed looks in a row after which looking is given up.
    :param not_found_until: Unix seconds before which a 404 is waited out.
    :param log: gets one line per change of status and per failed look.
    :param told: the status that the log has been told before.
    """

    __slots__ = (
        "deadline",
        "failures",
        "log",
        "max_consecutive_failures",
        "not_found_until",
        "overdub_id",
        "poke_interval",
        "status",
        "told",
    )

    def __init__(
        self,
        overdub_id: str,
        *,
        poke_interval: float,
        deadline: float | None,
        max_consecutive_failures: int,
        not_found_until: float,
        log: Any,
        told: str | None = None,
    ) -> None:
        self.overdub_id = overdub_id
        self.poke_interval = poke_interval
        self.deadline = deadline
        self.max_consecutive_failures = max_consecutive_failures
        self.not_found_until = not_found_until
        self.log = log
        self.status = "not seen yet"
        self.told = told
        self.failures = 0

    def saw(self, overdub: Overdub) -> float | WaitEvent:
        """Take a successful look."""
        self.status = overdub.status
        if overdub.status != self.told:
            self.told = overdub.status
            known = isinstance(overdub.status, OverdubStatus)
            self.log.info(
                "Overdub %s is %s%s.",
                self.overdub_id,
                self.status,
                "" if known else " (a word we do not know; taken as not final)",
            )
        if overdub.status == OverdubStatus.COMPLETED:
            event = self._end("completed", f"Overdub {self.overdub_id} is completed.")
            event["overdub"] = overdub.details()
            return event
        if overdub.status == OverdubStatus.FAILED:
            return self._end("failed", failure(overdub))
        return self.unchanged()

    def unchanged(self) -> float | WaitEvent:
        """Take a successful look that found what the last one found, and no end."""
        self.failures = 0
        return self._pause(self.poke_interval)

    def failed(self, error: Exception) -> float | WaitEvent:
        """Take a look that failed, for whatever reason."""
        if isinstance(error, HeyGenNotFoundError) and time.time() < self.not_found_until:
            self.log.info("Overdub %s is not readable yet; it was created just now.", self.overdub_id)
            return self._pause(min(self.poke_interval, 2.0))
        if isinstance(error, HeyGenPermanentError):
            return self.give_up(error)
        text = redact_links(str(error))
        self.failures += 1
        if self.failures >= self.max_consecutive_failures:
            return self._end(
                "error", f"Gave up on overdub {self.overdub_id} after {self.failures} failed looks: {text}"
            )
        doubled = self.poke_interval * 2.0 ** min(self.failures - 1, 30)  # more would overflow some day
        backoff = min(doubled, max(self.poke_interval, LONGEST_BACKOFF))
        told = error.retry_after if isinstance(error, HeyGenError) else None
        # Jitter spreads many waiters that failed together; it never shortens what HeyGen asked for.
        pause = max(backoff, told or 0.0) * random.uniform(1.0, 1.25)  # noqa: S311
        self.log.warning("%s Looking again in %.0f s (failure %d in a row).", text, pause, self.failures)
        return self._pause(pause)

    def give_up(self, error: Exception) -> WaitEvent:
        """End the wait because looking again is no use."""
        return self._end("error", redact_links(str(error)))

    def follow(self, hook: HeyGenHook, *, once: bool = False) -> WaitEvent | None:
        """Look with a synchronous hook until the end; or once, and give ``None`` if that is not the end."""
        while True:
            try:
                step = self.saw(hook.get_overdub(self.overdub_id))
            except Exception as error:
                step = self.failed(error)
            if isinstance(step, dict):
                return step
            if once:
                return None
            time.sleep(step)

    def _pause(self, seconds: float) -> float | WaitEvent:
        left = self.left
        return min(seconds, left) if left > 0 else self.timed_out()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return math.inf if self.deadline is None else self.deadline - time.time()

    def timed_out(self) -> WaitEvent:
        """End the wait because its time is over."""
        return self._end(
            "timeout",
            f"Stopped waiting for overdub {self.overdub_id}, which is {self.status}."
            " It goes on at HeyGen and may still complete. To go on waiting, retry this task or point"
            " HeyGenOverdubSensor at the id; to wait longer, raise 'timeout' (or 'execution_timeout').",
        )

    def _end(self, status: Literal["completed", "failed", "timeout", "error"], message: str) -> WaitEvent:
        return {"overdub_id": self.overdub_id, "status": status, "message": message}


def summary(details: Mapping[str, Any]) -> str:
    """Say what came of a completed overdub, and how long it took, as far as its details tell."""
    title, duration, created_at = (details.get(name) for name in ("title", "duration", "created_at"))
    told = [f"Overdub {details['overdub_id']}{f' ({title!r})' if title else ''} is done"]
    if duration is not None:
        told.append(f"{duration:.1f} s of video")
    if created_at is not None:
        told.append(f"{max(0.0, time.time() - created_at):.0f} s after it was created")
    return f"{', '.join(told)}."


def failure(overdub: Overdub) -> str:
    """Say that and why an overdub failed."""
    reason = redact_links(overdub.failure_message or DEFAULT_FAILURE_MESSAGE)
    return f"Overdub {overdub.overdub_id} failed: {reason}"


def is_stale(try_number: int | None, context: Mapping[str, Any]) -> bool:
    """
    Tell whether a task is resumed with what an earlier try was told when it deferred.

    Airflow 3.0 begins a retry where the last try went on after its deferral, instead of at the beginning.

    :param try_number: of the try that deferred.
    """
    return try_number not in (None, context["ti"].try_number)


def check_event(event: Any, overdub_id: str | None = None) -> WaitEvent:
    """
    Check the event a deferred task is resumed with.

    :param overdub_id: the overdub it must be about, where that is known.
    :raises HeyGenTriggerEventError: it is missing, malformed or about another overdub. Taking it for success
        would hand an unfinished video to the rest of the DAG.
    """
    if (
        not isinstance(event, dict)
        or event.get("status") not in ("completed", "failed", "timeout", "error")
        or not isinstance(event.get("message"), str)
        or not isinstance(event.get("overdub_id"), str)
        or event["overdub_id"] != str(overdub_id or event["overdub_id"])
        or (event["status"] == "completed" and not isinstance(event.get("overdub"), dict))
    ):
        shape = sorted(map(str, event)) if isinstance(event, dict) else type(event).__name__
        raise HeyGenTriggerEventError(
            f"The wait for overdub {overdub_id or '(id unknown)'} ended with an event that"
            f" HeyGenOverdubTrigger does not send ({shape}). The overdub itself is not affected; retry the"
            " task."
        )
    return event  # type: ignore[return-value]


def conclude(event: WaitEvent, hook: HeyGenHook, given_up: int, wait: Wait) -> dict[str, Any] | None:
    """
    Turn the end of a wait into the overdub's details, or into the right exception.

    :param given_up: how often the wait was given up before.
    :param wait: counts how it has ended.
    :returns: the details; ``None`` when looking was given up but a last look from here finds the overdub
        well and not ended, so that the wait may go on (the key was changed, a network came back), or is told
        to come later.
    :raises HeyGenOverdubFailedError: HeyGen says it failed.
    :raises HeyGenOverdubTimeoutError: the deadline passed.
    :raises HeyGenError: looking was given up or refused, and a last look from here fares no better.
    """
    if event["status"] == "completed":
        wait.completed()
        return event["overdub"]
    if event["status"] == "failed":
        wait.failed()
        raise HeyGenOverdubFailedError(event["message"])
    if event["status"] == "timeout":
        raise HeyGenOverdubTimeoutError(event["message"])
    # An event carries no exception class. Asking once more gives the right one, or good news.
    hook.log.warning("%s", event["message"])
    try:
        overdub = hook.get_overdub(event["overdub_id"])
    except HeyGenTransientError as error:
        if error.retry_after is None or given_up >= MAX_TIMES_GIVEN_UP:
            raise
        hook.log.warning("%s", error)
        return None
    if overdub.status == OverdubStatus.FAILED:
        wait.failed()
        raise HeyGenOverdubFailedError(failure(overdub))
    if overdub.status == OverdubStatus.COMPLETED:
        wait.completed()
        return overdub.details()
    if given_up >= MAX_TIMES_GIVEN_UP:
        raise HeyGenTransientError(
            f"{event['message']} A look from the worker succeeded each time; do worker and triggerer have the"
            " same Airflow connection and network?"
        )
    return None


def seconds(value: Any, name: str) -> float:
    """
    Give a duration in seconds from a number, its text (a template renders to text) or a timedelta.

    :raises HeyGenBadInputError: it is not a positive duration.
    """
    try:
        number = value.total_seconds() if isinstance(value, timedelta) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (0 < number < math.inf):
        raise HeyGenBadInputError(
            f"{name} must be a positive number of seconds or a timedelta, not {value!r}."
        )
    return number


def first_deadline(
    timeout: Any, execution_timeout: timedelta | None, context: Mapping[str, Any]
) -> float | None:
    """
    Give the moment, in Unix seconds, at which a wait that begins now must end.

    :param timeout: seconds or timedelta from now; ``None`` for no limit of its own.
    :param execution_timeout: Airflow's limit, from the start of this try. Airflow itself does not enforce
        it while a task is deferred.
    """
    ends = []
    if timeout is not None:
        ends.append(time.time() + seconds(timeout, "timeout"))
    if execution_timeout is not None:
        started = getattr(context["ti"], "start_date", None)
        ends.append((started.timestamp() if started else time.time()) + execution_timeout.total_seconds())
    return min(ends, default=None)


def backstop(deadline: float | None, poke_interval: float) -> timedelta | None:
    """Give Airflow's own deferral timeout: a little after ours, for a triggerer that never comes back."""
    if deadline is None:
        return None
    return timedelta(seconds=max(0.0, deadline - time.time()) + poke_interval + 60)
