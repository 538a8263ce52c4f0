"""One overdub for each entry of the run's ``conf["work"]``, whose members are arguments of the operator."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, get_current_context, task

from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator

# While Airflow's API server is down, no task can start, and each attempt costs a retry. When all others are
# deferred, each kill of a worker hits the same task.
for dag_id, retries in {"dubs": 3, "dubs_patient": 30}.items():
    with DAG(dag_id, schedule=None, default_args={"retries": retries, "retry_delay": timedelta(seconds=1)}):

        @task
        def work() -> list[dict[str, Any]]:
            conf: dict[str, Any] = get_current_context()["dag_run"].conf
            return [conf["defaults"] | entry for entry in conf["work"]]

        HeyGenCreateOverdubOperator.partial(
            task_id="dub",
            video="https://example.com/v.mp4",
            audio="https://example.com/a.mp3",
            poke_interval=1,
        ).expand_kwargs(work())
