"""Every way to wait for an overdub, in every kind of trouble; the test steers the emulator."""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG
from cases import (
    CONNECTIONS,
    CREATE_CASES,
    CREATES,
    REFUSED_CREATES,
    REFUSED_POLLS,
    SENSOR_CASES,
    SENSORS,
    SKIPS,
    STEERED,
)

from airflow_provider_heygen.operators.asset import HeyGenUploadAssetOperator
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

with DAG(
    "failures",
    schedule=None,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=1)},
    # The inputs hold secrets. They come into being when a task runs, as with a presigned link, so that the
    # provider is the only one that can give them away.
    user_defined_macros={"secret_url": os.environ.get},
):
    # Secret parts in both forms of an input; https to a closed port of this machine as callback.
    inputs = {
        "video": "{{ secret_url('STACK_VIDEO') }}",
        "audio": {"type": "url", "url": "{{ secret_url('STACK_AUDIO') }}"},
        "callback_url": "{{ secret_url('STACK_CALLBACK') }}",
    }
    creates = [(waiter, case) for waiter in CREATES for case in CREATE_CASES]
    creates += [("create_deferred", case) for case in REFUSED_CREATES]
    for waiter, case in creates:
        HeyGenCreateOverdubOperator(
            task_id=f"{waiter}__{case}",
            heygen_conn_id=CONNECTIONS.get(case, "heygen_default"),
            title="{{ task.task_id }}",
            deferrable=waiter == "create_deferred",
            poke_interval=1,
            # A wait that has timed out would be retried, as long as Airflow allows.
            **({"timeout": 12, "retries": 0} if case in REFUSED_POLLS else {}),
            **inputs,
        )
    mapped = {name: value for name, value in inputs.items() if name != "video"}
    HeyGenCreateOverdubOperator.partial(
        task_id="create_mapped", title="{{ task.task_id }}", deferrable=True, poke_interval=1, **mapped
    ).expand(video=[inputs["video"]])

    for waiter in SENSORS:
        for case in SENSOR_CASES:
            HeyGenOverdubSensor(
                task_id=f"{waiter}__{case}",
                heygen_conn_id=CONNECTIONS.get(case, "heygen_default"),
                overdub_id="{{ dag_run.conf['ids'][task.task_id] }}",
                mode="reschedule" if waiter == "sensor_reschedule" else "poke",
                deferrable=waiter == "sensor_deferred",
                # Long enough for Airflow to see the end of the last process; see MIN_HEARTBEAT_INTERVAL.
                poke_interval=10 if waiter == "sensor_reschedule" else 1,
                timeout=600 if case in STEERED else 12,
                **SKIPS.get(case, {}),
            )

    HeyGenUploadAssetOperator(task_id="upload", source="{{ dag_run.conf['folder'] }}/upload.mp4")
    for task_id in ("transfer__after_trouble", "transfer__place_taken"):
        HeyGenOverdubToObjectStorageOperator(
            task_id=task_id,
            overdub_id="{{ dag_run.conf['ids'][task.task_id] }}",
            destination="{{ dag_run.conf['folder'] }}/{{ task.task_id }}.mp4",
        )
