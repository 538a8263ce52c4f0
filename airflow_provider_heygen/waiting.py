"""
Rules for waiting for an overdub: what each poll means, when to poll next, and how the wait ends.

Operator and sensor on the worker and the trigger in the triggerer all wait by these rules.
"""

from __future__ import annotations

import math
import time
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, get_args

from airflow_provider_heygen.api import Overdub, OverdubStatus, check_id, redact_urls
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenOverdubFailedError,
    HeyGenOverdubTimeoutError,
    HeyGenTriggerEventError,
    retry_delay,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_provider_heygen.connection import HeyGenConnection
    from airflow_provider_heygen.hooks.heygen import HeyGenHook
    from airflow_provider_heygen.metrics import WaitMetrics

NOT_FOUND_GRACE_SECONDS = 30
"""Seconds after a create request during which a 404 means that the overdub is not readable yet."""

GONE_SECONDS = 30.0
"""Minimum seconds between two 404 before an overdub that is also missing from the list is gone."""

MAX_BACKOFF_SECONDS = 120.0
"""Maximum seconds between polls while they fail, unless HeyGen asks for more."""

MAX_SECONDS = 10 * 365.25 * 86400
"""Maximum of a duration: beyond it, clocks and dates overflow."""

SILENCE_SECONDS = 300.0
"""Maximum seconds without a log line while polls succeed."""

EventStatus = Literal["completed", "failed", "gone", "timeout", "error"]


class WaitEvent(TypedDict):
    """
    The end of a wait. Airflow stores and logs it, so it contains no URL and no secret.

    :param overdub_id: the awaited overdub.
    :param status: ``completed`` or ``failed`` as HeyGen reports; ``gone`` if the overdub was deleted;
        ``timeout`` if the deadline passed; ``error`` if the wait could not begin.
    :param message: text for users.
    :param overdub: details without URLs, if ``completed``.
    """

    overdub_id: str
    status: EventStatus
    message: str
    overdub: NotRequired[dict[str, Any]]


@dataclass(slots=True, eq=False)
class OverdubWait:
    """
    The wait for one overdub: turns each poll result into the delay until the next poll, or into the end.

    A wait ends if the overdub is completed, failed or gone, or if the deadline has passed. Any other poll
    result (a rejection, a gateway's page, an outage) proves nothing about the overdub.

    :param overdub_id: the overdub.
    :param poke_interval: seconds between polls while they succeed.
    :param deadline: Unix seconds at which the wait ends; ``None`` for never.
    :param not_found_until: Unix seconds until which a 404 means "not readable yet".
    :param log: receives one line per change of status or of error.
    :param logged_status: the status that was logged before.
    """

    overdub_id: str
    _: KW_ONLY
    poke_interval: float
    deadline: float | None
    not_found_until: float
    log: Any
    logged_status: str | None = None
    # What the polls have told so far.
    status: str = "not seen yet"
    failures: int = 0
    trouble: str = ""
    missing_since: float | None = None
    missing_for: float = 0.0
    settings: HeyGenConnection | None = None  # of the last poll on a worker
    is_known: bool = False
    """Whether the connection has reached the overdub. If so, a wrong setting does not end the wait."""
    account_changed: bool = False
    """Whether the credential may now be for another account, which does not have the overdub."""
    began: float = field(init=False)
    logged_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.logged_at = time.monotonic()

    def on_poll(self, overdub: Overdub) -> float | WaitEvent:
        """Handle a successful poll."""
        self.status = overdub.status
        if overdub.status != self.logged_status and not overdub.is_final:  # the task itself logs the end
            self.logged_status = overdub.status
            self.logged_at = time.monotonic()
            known = isinstance(overdub.status, OverdubStatus)
            self.log.info(
                "Overdub %s is %s%s.",
                self.overdub_id,
                self.status,
                "" if known else " (an unknown status; treated as not final)",
            )
        try:
            overdub.raise_for_failure()
        except HeyGenOverdubFailedError as error:
            return self._end("failed", error.message)
        if overdub.is_completed:
            event = self._end("completed", f"Overdub {self.overdub_id} is completed.")
            event["overdub"] = overdub.details()
            return event
        return self.on_unchanged()

    def on_unchanged(self) -> float | WaitEvent:
        """Handle a successful poll that does not end the wait."""
        self.failures, self.trouble, self.missing_since, self.missing_for = 0, "", None, 0.0
        self.is_known, self.account_changed = True, False
        now = time.monotonic()
        if now - self.logged_at >= SILENCE_SECONDS:
            self.logged_at = now
            waited = duration_text(now - self.began)
            self.log.info("Overdub %s is still %s after %s.", self.overdub_id, self.status, waited)
        return self._pause(self.poke_interval)

    def on_error(self, error: Exception) -> float | WaitEvent:
        """Handle a failed poll."""
        if isinstance(error, HeyGenNotFoundError):
            if time.time() < self.not_found_until:
                self.log.info("Overdub %s is not readable yet; it was created just now.", self.overdub_id)
                return self._pause(min(self.poke_interval, 2.0))
            if self.missing_since is None:
                self.missing_since = time.monotonic()
            self.missing_for = time.monotonic() - self.missing_since
        self.failures += 1
        first, longest = self.poke_interval, MAX_BACKOFF_SECONDS
        if self.missing_since is not None:
            first = longest = min(self.poke_interval, GONE_SECONDS)
        pause = retry_delay(self.failures, error, first=first, longest=longest)
        text = redact_urls(str(error))
        # A long outage must not log a line for each poll.
        if text != self.trouble or self.failures.bit_count() == 1:
            self.trouble = text
            self.log.warning(
                "%s Overdub %s is not affected. Polling again in %.0f s (%d consecutive failures).",
                text,
                self.overdub_id,
                pause,
                self.failures,
            )
        return self._pause(pause)

    @property
    def may_be_gone(self) -> bool:
        """Whether HeyGen has returned 404 for so long that :meth:`absent` must check the list."""
        return self.missing_for >= GONE_SECONDS

    def absent(self, listed: bool | None) -> WaitEvent | None:
        """
        Return the end of the wait if an overdub that :attr:`may_be_gone` is gone.

        :param listed: whether the list contains the overdub; ``None`` if that could not be determined.
        """
        if listed or self.account_changed:
            self.missing_since, self.missing_for = None, 0.0
        if listed is not False or not self.may_be_gone:  # a poll during the search may have found it
            return None
        return self._end(
            "gone",
            f"Overdub {self.overdub_id} is gone: HeyGen has returned 404 for it for {GONE_SECONDS:.0f} s,"
            " and its list does not have it. It was deleted, or belongs to another account than the"
            " Airflow connection.",
        )

    def give_up(self, error: Exception) -> WaitEvent:
        """Return the end of a wait that cannot begin."""
        return self._end("error", redact_urls(str(error)))

    def poll(self, hook: HeyGenHook) -> float | WaitEvent:
        """Poll once with a synchronous hook; return the delay until the next poll, or the end."""
        self.overdub_id = check_id(self.overdub_id)  # native rendering may have made it a number
        try:
            if self.settings not in (None, hook.settings):
                self.account_changed = True  # perhaps
            self.settings = hook.settings
            return self.on_poll(hook.get_overdub(self.overdub_id))
        except Exception as error:
            if isinstance(error, HeyGenBadInputError) and not self.is_known:
                raise
            if self.account_changed or not isinstance(error, HeyGenNotFoundError):
                hook.forget_settings()
            step = self.on_error(error)
        if self.may_be_gone:
            step = self.absent(hook.is_listed(self.overdub_id)) or step
        return step

    def poll_until_final(self, hook: HeyGenHook) -> WaitEvent:
        """Poll until the wait ends."""
        while not isinstance(step := self.poll(hook), dict):
            time.sleep(step)
        return step

    def poll_twice(self, hook: HeyGenHook) -> float | WaitEvent:
        """Poll once, and a second time if the poll returned 404 and the list does not contain the overdub."""
        step = self.poll(hook)
        if (
            self.missing_since is None
            or isinstance(step, dict)
            or hook.is_listed(self.overdub_id) is not False
        ):
            return step
        time.sleep(GONE_SECONDS)
        return self.poll(hook)

    def _pause(self, seconds: float) -> float | WaitEvent:
        left = self.seconds_left
        return min(seconds, left) if left > 0 else self.timed_out()

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return math.inf if self.deadline is None else self.deadline - time.time()

    def timed_out(self) -> WaitEvent:
        """Return the end of a wait whose deadline has passed."""
        trouble = f" The last status check failed: {self.trouble}" if self.trouble else ""
        return self._end(
            "timeout",
            f"Timed out waiting for overdub {self.overdub_id} (status: {self.status}).{trouble}"
            " It keeps running at HeyGen and may still complete. To keep waiting, retry this task or"
            " pass the id to HeyGenOverdubSensor. To wait longer, raise 'timeout' (or"
            " 'execution_timeout').",
        )

    def _end(self, status: EventStatus, message: str) -> WaitEvent:
        return {"overdub_id": self.overdub_id, "status": status, "message": message}


def duration_text(seconds: float) -> str:
    """Return a duration as text, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"


def waiting_text(where: str, poke_interval: float, deadline: float | None) -> str:
    """Return the log line for the start of a wait."""
    until = "without a limit"
    if deadline is not None:
        end = datetime.fromtimestamp(deadline, UTC)
        day = f"{end:%Y-%m-%d} " if deadline - time.time() > 86400 else ""
        until = f"until {day}{end:%H:%M} UTC"
    return f"Waiting {where}, checking every {duration_text(poke_interval)} {until}."


def completion_summary(details: Mapping[str, Any]) -> str:
    """Return the log line for a completed overdub, with its duration and cost if they are known."""
    title, duration, created_at, mode, cost = (
        details.get(name) for name in ("title", "duration", "created_at", "mode", "cost")
    )
    video = "a video" if duration is None else f"{duration:.1f} s of video"
    took = "" if created_at is None else f" in {duration_text(max(0.0, time.time() - created_at))}"
    further = "".join([f", mode {mode}" if mode else "", "" if cost is None else f", ${cost:.2f}"])
    named = f" {title!r}" if title else ""
    return f"Dubbed {video}{took}{further}: overdub {details['overdub_id']}{named}."


def check_event(event: Any, overdub_id: str | None = None) -> WaitEvent:
    """
    Check the event with which a deferred task is resumed.

    :param overdub_id: the overdub that the event must be about, if known.
    :raises HeyGenTriggerEventError: if the event is missing, malformed or about another overdub.
    """
    if (
        not isinstance(event, dict)
        or event.get("status") not in get_args(EventStatus)
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


def _one_poll(overdub_id: str, log: Any) -> OverdubWait:
    return OverdubWait(overdub_id, poke_interval=1.0, deadline=None, not_found_until=0.0, log=log)


def no_triggerer(overdub_id: str) -> WaitEvent:
    """Return the end of a wait that no triggerer has served before its deadline."""
    return _one_poll(overdub_id, None).timed_out()


def resolve_wait(event: WaitEvent, wait: WaitMetrics, hook: HeyGenHook | None = None) -> dict[str, Any]:
    """
    Return the overdub's details at the end of a wait, or raise the exception that fits.

    :param wait: counts the end.
    :param hook: polls once more after a timeout in the triggerer, which may have been down or unable to reach
        HeyGen. ``None`` if the last poll was made on this worker.
    :raises HeyGenOverdubFailedError: if HeyGen reports that the overdub failed.
    :raises HeyGenNotFoundError: if the overdub is gone.
    :raises HeyGenOverdubTimeoutError: if the deadline passed. A retry continues the wait.
    :raises HeyGenError: if the wait could not begin.
    """
    overdub_id, message = event["overdub_id"], event["message"]
    if event["status"] == "completed":
        wait.count("completed")
        return event["overdub"]
    if event["status"] == "failed":
        wait.count("failed")
        raise HeyGenOverdubFailedError(message, overdub_id=overdub_id)
    if event["status"] == "gone":
        raise HeyGenNotFoundError(message, status_code=404, overdub_id=overdub_id)
    if event["status"] == "error":
        raise HeyGenError(message, overdub_id=overdub_id)
    if hook is not None:
        try:
            overdub = hook.get_overdub(overdub_id)
        except HeyGenError as error:
            raise HeyGenOverdubTimeoutError(
                f"{message} The last status check failed: {error}", overdub_id=overdub_id
            ) from error
        last = _one_poll(overdub_id, hook.log).on_poll(overdub)
        if isinstance(last, dict):
            return resolve_wait(last, wait)
    raise HeyGenOverdubTimeoutError(message, overdub_id=overdub_id)


def parse_seconds(value: Any, name: str) -> float:
    """
    Return a duration in seconds from a number, its text (a template renders to text) or a timedelta.

    :raises HeyGenBadInputError: if the duration is not positive, or longer than ten years.
    """
    try:
        number = value.total_seconds() if isinstance(value, timedelta) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not (0 < number <= MAX_SECONDS):
        raise HeyGenBadInputError(
            f"{name} must be a positive number of seconds or a timedelta, at most ten years, not {value!r}."
        )
    return number


def execution_deadline(execution_timeout: timedelta | None, context: Mapping[str, Any]) -> float | None:
    """
    Return the Unix seconds at which ``execution_timeout`` of this try ends.

    Airflow itself does not enforce the timeout while a task is deferred.
    """
    if execution_timeout is None:
        return None
    started = getattr(context["ti"], "start_date", None)
    return (started.timestamp() if started else time.time()) + execution_timeout.total_seconds()


def deferral_timeout(deadline: float | None, poke_interval: float) -> timedelta | None:
    """Return Airflow's deferral timeout, a little after the deadline, in case no triggerer runs."""
    if deadline is None:
        return None
    return timedelta(seconds=max(0.0, deadline - time.time()) + poke_interval + 60)
