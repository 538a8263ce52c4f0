"""Waits that end in the triggerer where they can, one like them that does not, and what comes after them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Asset, get_current_context, task

from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor

with DAG(
    "ends",
    schedule=None,
    default_args={
        "retries": 2,
        "retry_delay": timedelta(seconds=1),
        "overdub_id": "{{ dag_run.conf['ids'][0] }}",
        "deferrable": True,
        "poke_interval": 1,
        "end_from_trigger": True,
    },
):
    on_worker = HeyGenOverdubSensor(task_id="on_worker", end_from_trigger=False)
    plain = HeyGenOverdubSensor(task_id="plain")
    mapped = HeyGenOverdubSensor.partial(task_id="mapped").expand(
        overdub_id=[f"{{{{ dag_run.conf['ids'][{index}] }}}}" for index in range(5)]
    )
    HeyGenOverdubSensor.partial(
        task_id="labelled", map_index_template="overdub {{ task.overdub_id }}"
    ).expand(overdub_id=["{{ dag_run.conf['ids'][4] }}"])
    HeyGenOverdubSensor(task_id="silent", do_xcom_push=False)
    HeyGenOverdubSensor(task_id="with_outlets", outlets=[Asset("dubbed")])
    HeyGenOverdubSensor(
        task_id="with_callback",
        on_success_callback=lambda context: print("Called back:", context["ti"].task_id),
    )
    HeyGenOverdubSensor(task_id="fails", overdub_id="{{ dag_run.conf['fails'] }}")
    HeyGenOverdubSensor(task_id="fails_softly", overdub_id="{{ dag_run.conf['fails'] }}", soft_fail=True)
    HeyGenOverdubSensor(task_id="times_out", overdub_id="{{ dag_run.conf['lasts'] }}", timeout=4)
    HeyGenOverdubSensor(
        task_id="times_out_softly", overdub_id="{{ dag_run.conf['lasts'] }}", timeout=4, soft_fail=True
    )
    expanded = HeyGenOverdubSensor(task_id="expanded")
    # One for each member of the result. They need no worker, so they cost nothing.
    EmptyOperator.partial(task_id="members").expand(doc=expanded.output)

    @task
    def take(task_id: str, value: Any, status: str) -> list[Any]:
        return [value, get_current_context()["ti"].xcom_pull(task_ids=task_id), status]

    for sensor in (on_worker, plain):
        name = sensor.task_id
        status = f"{{{{ ti.xcom_pull(task_ids='{name}')['status'] }}}}"
        take.override(task_id=f"take_{name}")(name, sensor.output, status)

    @task
    def take_all(values: Any) -> list[Any]:
        pull = get_current_context()["ti"].xcom_pull
        return [list(values), [pull(task_ids="mapped", map_indexes=index) for index in range(5)]]

    @task
    def take_each(value: Any) -> Any:
        return value

    take_all(mapped.output)
    take_each.expand(value=mapped.output)
