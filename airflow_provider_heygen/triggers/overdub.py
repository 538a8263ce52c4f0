"""Triggers: wait in the triggerer for an overdub, or for a free slot to create one."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager, suppress
from inspect import signature
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import TaskDeferred
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_heygen import poller
from airflow_provider_heygen.api import OverdubStatus
from airflow_provider_heygen.exceptions import MAX_RETRY_AFTER, HeyGenOverdubTimeoutError
from airflow_provider_heygen.waiting import OverdubWait, deferral_timeout, parse_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from airflow_provider_heygen.hooks.heygen import HeyGenHook

CLOCK_SECONDS = 5.0
"""Seconds by which the clocks of worker and triggerer may differ without a consequence."""


class _Trigger(BaseTrigger):
    """Keeps each argument as an attribute of its name."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return class path and arguments."""
        kind = type(self)
        arguments = {name: getattr(self, name) for name in signature(kind).parameters}
        return f"{kind.__module__}.{kind.__qualname__}", arguments


class HeyGenOverdubTrigger(_Trigger):
    """
    Fire one :class:`~airflow_provider_heygen.waiting.WaitEvent` when the wait for an overdub ends.

    Class path and argument names are frozen, because Airflow's metadata database keeps the rows of an older
    release. Airflow stores the arguments in plain JSON, so they contain no secret. A cancelled trigger means
    that the triggerer restarts or that Airflow moved the trigger, so nothing here acts on cancellation.

    :param heygen_conn_id: the Airflow connection.
    :param overdub_id: the overdub.
    :param poke_interval: seconds between polls.
    :param deadline: Unix seconds at which to stop waiting, so that a restarted triggerer does not start
        over; ``None`` for never.
    :param not_found_until: Unix seconds until which a 404 means that the overdub is not readable yet.
    :param resource: HeyGen's name for the resource, as the worker knows it; ``None`` to find it out.
    """

    def __init__(
        self,
        *,
        heygen_conn_id: str,
        overdub_id: str,
        poke_interval: float = 30.0,
        deadline: float | None = None,
        not_found_until: float = 0.0,
        resource: str | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heygen_conn_id = heygen_conn_id
        self.overdub_id = overdub_id
        self.poke_interval = poke_interval
        self.deadline = deadline
        self.not_found_until = not_found_until
        self.resource = resource

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait until the overdub is final or gone, or the deadline has passed."""
        watch = OverdubWait(
            self.overdub_id,
            poke_interval=self.poke_interval,
            deadline=self.deadline,
            not_found_until=self.not_found_until,
            log=self.logger(),  # one for all triggers: a logger each would be half of what waiting takes
            logged_status=OverdubStatus.PENDING,  # by the worker, which has polled before; the rest is news
        )
        event = await poller.wait(self.heygen_conn_id, watch, self.resource)
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]


def wait_in_triggerer(
    hook: HeyGenHook, overdub_id: str, since: float | None, rules: dict[str, Any], *, again: bool = False
) -> TaskDeferred:
    """
    Return the deferral of a task until the wait for its overdub ends.

    :param since: Unix seconds when the wait began.
    :param rules: ``poke_interval``, ``deadline`` and perhaps ``not_found_until`` of the trigger.
    :param again: whether the triggerer has ended the wait too early. Then Airflow ends it, by its own clock.
    """
    deadline = None if again else rules["deadline"]
    trigger = HeyGenOverdubTrigger(
        heygen_conn_id=hook.heygen_conn_id,
        overdub_id=overdub_id,
        # A connection that is wrong by now must not end the wait.
        resource=None if again else hook.known_resource,
        **{**rules, "deadline": deadline},
    )
    return TaskDeferred(
        trigger=trigger,
        method_name="execute_complete",
        kwargs={"since": since, "deadline": deadline},
        timeout=deferral_timeout(rules["deadline"], rules["poke_interval"]),
    )


@contextmanager
def waits_again_if_early(
    hook: HeyGenHook, overdub_id: str, since: float | None, deadline: float | None, poke_interval: Any
) -> Iterator[None]:
    """
    Defer the task again if its wait timed out by the clock of the triggerer, but not by this worker's.

    :raises TaskDeferred: in place of the timeout. The arguments are those of :func:`wait_in_triggerer`.
    """
    try:
        yield
    except HeyGenOverdubTimeoutError:
        if deadline is None or time.time() > deadline - CLOCK_SECONDS:
            raise
    else:
        return
    hook.log.warning(
        "The wait was ended %.0f s before its deadline, so the clock of the triggerer is ahead of this"
        " worker's. Set both by NTP. Waiting again, until Airflow ends the wait.",
        deadline - time.time(),
    )
    rules = {"poke_interval": parse_seconds(poke_interval, "poke_interval"), "deadline": deadline}
    raise wait_in_triggerer(hook, overdub_id, since, rules, again=True)


class HeyGenSlotTrigger(_Trigger):
    """
    Fire when a create request for which HeyGen had no free slot may be sent again, or its time is over.

    All tasks of a connection wait in one queue per triggerer, first come, first served.

    :param heygen_conn_id: the Airflow connection.
    :param since: Unix seconds of the task's first attempt: its place in the queue, also after a restart.
    :param not_before: Unix seconds before which HeyGen asked not to come back.
    :param deadline: Unix seconds at which the wait ends; ``None`` for never.
    :param resumed: whether the task has waited in the queue before.
    """

    def __init__(
        self,
        *,
        heygen_conn_id: str,
        since: float,
        not_before: float,
        deadline: float | None = None,
        resumed: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heygen_conn_id = heygen_conn_id
        self.since = since
        self.not_before = not_before
        self.deadline = deadline
        self.resumed = resumed

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait in the queue; the task itself sees whether its time is over."""
        now = time.time()
        with suppress(TimeoutError):
            async with asyncio.timeout(None if self.deadline is None else max(0.0, self.deadline - now)):
                pause = min(self.not_before - now, MAX_RETRY_AFTER)  # the worker's clock may be ahead
                await poller.queue(
                    self.heygen_conn_id, self.since, pause, resumed=self.resumed, log=self.logger()
                )
        yield TriggerEvent({"status": "ready"})  # type: ignore[no-untyped-call]
