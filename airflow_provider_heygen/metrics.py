"""
Metrics for Airflow's backends: StatsD, Datadog or OpenTelemetry.

Each event is counted once, where it is known to have happened. A metrics error never fails a task.
``docs/guides/observability.md`` lists the names.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Literal

from airflow.providers.common.compat.sdk import Stats

from airflow_provider_heygen.compat import triggerer_stats

log = logging.getLogger(__name__)


def submitted(ti: Any) -> None:
    """Count an overdub that a task started and whose id HeyGen returned."""
    _send("incr", "heygen.overdubs.submitted", tags=_tags(ti))


def reattached(ti: Any) -> None:
    """Count an overdub to which a task reattaches."""
    _send("incr", "heygen.overdubs.reattached", tags=_tags(ti))


def polled(conn_id: str) -> None:
    """Count a request of the triggerer's poller."""
    _send("incr", "heygen.polls", tags={"conn_id": conn_id}, in_triggerer=True)


@dataclass(frozen=True)
class WaitMetrics:
    """
    Metrics of one task instance's wait.

    :param since: start of the wait in Unix seconds; ``None`` if unknown, and then the wait is not timed.
    """

    ti: Any
    since: float | None

    def count(self, status: Literal["completed", "failed"]) -> None:
        """Count a wait by the status of its overdub, and report its duration."""
        tags = _tags(self.ti)
        _send("incr", f"heygen.overdubs.{status}", tags=tags)
        if self.since is not None:
            # The backends interpret a plain number in different units.
            duration = timedelta(seconds=max(0.0, time.time() - self.since))
            _send("timing", "heygen.overdubs.wait", duration, tags=tags | {"status": status})


def _tags(ti: Any) -> dict[str, str]:
    return {"dag_id": ti.dag_id, "task_id": ti.task_id}


def _send(kind: str, *args: Any, tags: dict[str, str], in_triggerer: bool = False) -> None:
    try:
        stats = triggerer_stats() if in_triggerer else Stats
        getattr(stats, kind)(*args, tags=tags)
    except Exception as error:
        _warn_once(f"Metrics of HeyGen are lost ({type(error).__name__}: {error}).")


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)
