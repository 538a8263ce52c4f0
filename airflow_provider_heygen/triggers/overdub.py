"""Wait for an overdub in the triggerer, where waiting costs no worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent
from asgiref.sync import sync_to_async

from airflow_provider_heygen import poller
from airflow_provider_heygen.api import OverdubStatus
from airflow_provider_heygen.hooks.heygen import HeyGenHook, to_its_end
from airflow_provider_heygen.metrics import Wait
from airflow_provider_heygen.waiting import MAX_CONSECUTIVE_FAILURES, Watch, summary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class HeyGenOverdubTrigger(BaseTrigger):
    """
    Fire one :class:`~airflow_provider_heygen.waiting.WaitEvent` when an overdub has ended.

    Class path and argument names are frozen: rows of an older release are still in somebody's metadata
    database. The arguments hold no secret, they are stored and sent in plain JSON.

    :param heygen_conn_id: the Airflow connection.
    :param overdub_id: the overdub.
    :param poke_interval: seconds between looks.
    :param deadline: Unix seconds at which to stop waiting, so that a restarted triggerer does not start
        over; ``None`` for never.
    :param max_consecutive_failures: failed looks in a row (429, 5xx, network) that are survived, less one.
    :param not_found_until: Unix seconds before which a 404 is waited out.
    :param delete_on_kill: delete the overdub when a user kills the deferred task (Airflow 3.3+).
    :param end_task: end the task here when the overdub is completed, without another start of a worker.
    :param do_xcom_push: with ``end_task``, push the details as the task's return value.
    :param since: with ``end_task``, Unix seconds when the wait began, for the metrics.
    """

    def __init__(
        self,
        *,
        heygen_conn_id: str,
        overdub_id: str,
        poke_interval: float = 30.0,
        deadline: float | None = None,
        max_consecutive_failures: int = MAX_CONSECUTIVE_FAILURES,
        not_found_until: float = 0.0,
        delete_on_kill: bool = False,
        end_task: bool = False,
        do_xcom_push: bool = True,
        since: float | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heygen_conn_id = heygen_conn_id
        self.overdub_id = overdub_id
        self.poke_interval = poke_interval
        self.deadline = deadline
        self.max_consecutive_failures = max_consecutive_failures
        self.not_found_until = not_found_until
        self.delete_on_kill = delete_on_kill
        self.end_task = end_task
        self.do_xcom_push = do_xcom_push
        self.since = since

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Give class path and arguments."""
        return (
            "airflow_provider_heygen.triggers.overdub.HeyGenOverdubTrigger",
            {
                "heygen_conn_id": self.heygen_conn_id,
                "overdub_id": self.overdub_id,
                "poke_interval": self.poke_interval,
                "deadline": self.deadline,
                "max_consecutive_failures": self.max_consecutive_failures,
                "not_found_until": self.not_found_until,
                "delete_on_kill": self.delete_on_kill,
                # Left out where they are not needed: a triggerer of an older release does not know them.
                **(
                    {"end_task": True, "do_xcom_push": self.do_xcom_push, "since": self.since}
                    if self.end_task
                    else {}
                ),
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait until the overdub has ended, the deadline has passed or looking is hopeless."""
        watch = Watch(
            self.overdub_id,
            poke_interval=self.poke_interval,
            deadline=self.deadline,
            max_consecutive_failures=self.max_consecutive_failures,
            not_found_until=self.not_found_until,
            log=self.logger(),  # one for all triggers: a logger each would be half of what waiting takes
            told=OverdubStatus.PENDING,  # by the worker, which has looked before; the rest is news
        )
        event = await poller.wait(self.heygen_conn_id, watch)
        # Without a task instance this is `airflow dags test`, which knows no end without a worker.
        if self.end_task and event["status"] == "completed" and self.task_instance is not None:
            try:
                if self.do_xcom_push:
                    await self._push(event["overdub"])
            except Exception as error:
                self.log.warning("A worker has to end this task: pushing its XCom failed (%s).", error)
            else:
                self.log.info("%s The task ends here.", summary(event["overdub"]))
                Wait(self.task_instance, self.since, in_triggerer=True).completed()
                yield TaskSuccessEvent()
                return
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def _push(self, details: dict[str, Any]) -> None:
        """
        Push the return value as a worker would.

        What :class:`TaskSuccessEvent` itself carries, Airflow encodes twice: the next task would get the text
        of the details (seen on 3.3.2).
        """
        from airflow.sdk.execution_time.xcom import XCom

        names = ("dag_id", "task_id", "run_id", "map_index")
        of_task = {name: getattr(self.task_instance, name) for name in names}
        push = XCom.aset if hasattr(XCom, "aset") else sync_to_async(XCom.set)  # aset: from Airflow 3.3 on
        await to_its_end(push(key="return_value", value=details, **of_task))

    async def on_kill(self) -> None:
        """
        Delete the overdub when a user kills the deferred task, if asked to and if it has not ended.

        Airflow 3.3+ calls this for a user's action only. A restart of the triggerer cancels :meth:`run` and
        must delete nothing, which is why nothing here listens to cancellation.
        """
        if not self.delete_on_kill:
            return
        async with HeyGenHook(self.heygen_conn_id, max_attempts=2) as hook:
            if (await hook.aget_overdub(self.overdub_id)).is_final:
                self.log.info("Overdub %s has already ended; it is kept.", self.overdub_id)
                return
            await hook.adelete_overdub(self.overdub_id)
            self.log.info("The task was killed: deleted overdub %s.", self.overdub_id)
