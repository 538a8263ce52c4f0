"""What OpenLineage and StatsD see: from files over assets and overdubs to files again."""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG, get_current_context, task

from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.operators.asset import HeyGenUploadAssetOperator
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

with DAG(
    "observed",
    schedule=None,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=1)},
    user_defined_macros={"secret_url": os.environ.get},
):
    common = {"heygen_conn_id": "heygen_observed", "title": "{{ task.task_id }}", "poke_interval": 1}
    audio = {"type": "url", "url": "{{ secret_url('STACK_AUDIO') }}"}
    links = {"video": "{{ secret_url('STACK_VIDEO') }}", "audio": audio}
    upload = HeyGenUploadAssetOperator(
        task_id="upload", heygen_conn_id="heygen_observed", source="{{ dag_run.conf['folder'] }}/upload.mp4"
    )
    HeyGenCreateOverdubOperator(task_id="sync", video=upload.output, audio=audio, **common)
    deferred = HeyGenCreateOverdubOperator(task_id="deferred", deferrable=True, **links, **common)
    HeyGenCreateOverdubOperator.partial(task_id="mapped", deferrable=True, audio=audio, **common).expand(
        video=["https://example.com/0.mp4", "file://{{ dag_run.conf['folder'] }}/upload.mp4"]
    )
    HeyGenCreateOverdubOperator(task_id="fails", deferrable=True, **links, **common)
    HeyGenCreateOverdubOperator(
        task_id="goes_on", timeout="{{ 2 if ti.try_number == 1 else 600 }}", **links, **common
    )
    HeyGenOverdubToObjectStorageOperator(
        task_id="keep",
        heygen_conn_id="heygen_observed",
        overdub_id=deferred.output,
        destination="{{ dag_run.conf['folder'] }}/kept/",
    )

    @task
    def download(overdub_id: str) -> int:
        folder = get_current_context()["dag_run"].conf["folder"]
        return HeyGenHook("heygen_observed").download_overdub(overdub_id, f"{folder}/downloaded.mp4")

    download(deferred.output)
    started = HeyGenCreateOverdubOperator(task_id="started", wait_for_completion=False, **links, **common)
    HeyGenOverdubSensor(
        task_id="wait",
        heygen_conn_id="heygen_observed",
        overdub_id=started.output,
        deferrable=True,
        poke_interval=1,
    )
