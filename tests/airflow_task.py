"""
A stand-in for what Airflow hands to a running task, so that a test can kill and start it at will.

Whole DAGs on a real Airflow are in `test_example_dags.py`, `test_other_server.py` and `stack/`.
"""

from __future__ import annotations

import functools
import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from airflow.providers.common.compat.sdk import TaskDeferred
from airflow.sdk.execution_time import supervisor


def build_execution_api_once() -> None:
    """
    Have ``dag.test()`` build its execution API once per process, as Airflow does from 3.3 on.

    Before, it builds one for each start of a task or trigger, which takes some seconds of CPU time each.
    """
    if not hasattr(supervisor.in_process_api_server, "cache_info"):
        supervisor.in_process_api_server = functools.cache(supervisor.in_process_api_server)


class StateStore(dict):
    """Airflow's task state store: JSON values that outlive a try."""

    def get(self, key: str, default: Any = None) -> Any:
        return json.loads(super().get(key, "null")) or default

    def set(self, key: str, value: Any) -> None:
        assert value is not None
        self[key] = json.dumps(value)


class Task:
    """One task instance over its tries. ``store`` is ``None`` on an Airflow before 3.3."""

    def __init__(self, make: Any, *, retries: int = 3, store: StateStore | None = None) -> None:
        self.make = make
        self.store = store
        self.ti = SimpleNamespace(
            dag_id="dag",
            run_id="run",
            task_id="task",
            map_index=-1,
            try_number=0,
            max_tries=retries,
            start_date=None,
            xcom_push=lambda key, value: self.xcoms.update({key: json.loads(json.dumps(value))}),
        )
        self.retries = retries
        self.xcoms: dict[str, Any] = {}
        self.began = datetime.now(UTC)

    @property
    def context(self) -> dict[str, Any]:
        context = {"ti": self.ti, "dag_run": SimpleNamespace(start_date=self.began)}
        return context if self.store is None else {**context, "task_state_store": self.store}

    def start(self) -> Any:
        """Begin the next try; return what it returns, or the ``TaskDeferred`` it ends with."""
        self.xcoms.clear()
        self.ti.try_number += 1
        self.ti.start_date = datetime.now(UTC)
        return self._run(lambda task: task.execute(self.context))

    def resume(self, deferred: TaskDeferred, event: Any) -> Any:
        """Go on after a deferral, in a new process: on a new instance of the operator."""
        kwargs = {**(deferred.kwargs or {}), "event": event}
        return self._run(lambda task: task.resume_execution(deferred.method_name, kwargs, self.context))

    def clear(self) -> None:
        """Do as Airflow does when a user clears the task instance."""
        self.ti.max_tries = self.ti.try_number + self.retries

    def _run(self, go: Any) -> Any:
        try:
            return go(self.make())
        except TaskDeferred as deferred:
            return deferred
