"""
Counts for Airflow's metrics, which go to StatsD, Datadog or OpenTelemetry as Airflow is set up.

Each thing is counted once, where it is known to have happened. Whatever is wrong with the metrics, no task
fails of it. The table of names is in ``docs/guides/observability.md``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


def submitted(ti: Any) -> None:
    """Count an overdub that a task has started: HeyGen has given its id."""
    _send(False, "incr", "heygen.overdubs.submitted", tags=_tags(ti))


def reattached(ti: Any) -> None:
    """Count an overdub that a task goes on with, because an earlier run of it has started it."""
    _send(False, "incr", "heygen.overdubs.reattached", tags=_tags(ti))


def polled(conn_id: str) -> None:
    """Count a request of the triggerer's poller."""
    _send(True, "incr", "heygen.polls", tags={"conn_id": conn_id})


@dataclass(frozen=True)
class Wait:
    """
    The wait of one task instance for its overdub.

    :param ti: whose ``dag_id`` and ``task_id`` become tags.
    :param since: Unix seconds when it began; ``None`` when that is not known, and then it is not timed.
    """

    ti: Any
    since: float | None

    def completed(self) -> None:
        """Count that it has ended well."""
        self._ended("completed")

    def failed(self) -> None:
        """Count that HeyGen says the overdub failed."""
        self._ended("failed")

    def _ended(self, status: str) -> None:
        tags = _tags(self.ti)
        _send(False, "incr", f"heygen.overdubs.{status}", tags=tags)
        if self.since is not None:
            # As a timedelta, or each backend would take the number for a unit of its own.
            took = timedelta(seconds=max(0.0, time.time() - self.since))
            _send(False, "timing", "heygen.overdubs.wait", took, tags=tags | {"status": status})


def _tags(ti: Any) -> dict[str, str]:
    return {"dag_id": ti.dag_id, "task_id": ti.task_id}


def _send(in_triggerer: bool, kind: str, *args: Any, tags: dict[str, str]) -> None:
    try:
        send: Callable[..., None] = getattr(_stats(in_triggerer), kind)
        send(*args, tags=tags)
    except Exception as error:
        _complain(f"Metrics of HeyGen are lost ({type(error).__name__}: {error}).")


def _stats(in_triggerer: bool) -> Any:
    if in_triggerer:
        from airflow_provider_heygen.compat import triggerer_stats

        return triggerer_stats()
    from airflow.providers.common.compat.sdk import Stats

    return Stats


@cache
def _complain(text: str) -> None:
    log.warning("%s", text)  # once, not for each poll
