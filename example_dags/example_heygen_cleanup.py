"""
Delete the overdub of a failed task on purpose.

HeyGen has no cancel, and the provider deletes only on request. In this DAG, `delete` runs if `dub` was marked
failed, or if its last try failed or timed out. `dub` pushes the XCom `overdub_id` before it waits. Without
this XCom, no overdub was started, and `delete` is skipped.

If you mark the whole DAG run failed, Airflow skips `delete`: mark the task instead. The DAG needs a
connection `heygen_default`; `make ui` creates one for the emulator.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Param, task

from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator, HeyGenDeleteOverdubOperator
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

MEDIA = os.environ.get("HEYGEN_EXAMPLE_MEDIA", "/opt/airflow/media")
SOURCE = "A public https URL, or the URI of a file (`file:///data/talk.mp4`, `s3://media/talk.mp4` ...)."

with DAG(
    dag_id="example_heygen_cleanup",
    description="Dub one video; delete the overdub if the task fails",
    schedule=None,
    params={
        "video": Param(f"file://{MEDIA}/talk.mp4", type="string", title="Video", description=SOURCE),
        "audio": Param(f"file://{MEDIA}/talk.de.mp3", type="string", title="New audio", description=SOURCE),
        "result": Param(
            f"{MEDIA}/talk.kept.mp4",
            type="string",
            title="Result",
            description="Where the video is saved. A file that exists is replaced.",
        ),
        "timeout": Param(7200, type="integer", title="Timeout", description="Seconds to wait for HeyGen."),
    },
    tags=["example", "heygen"],
    doc_md=__doc__,
) as dag:
    dub = HeyGenCreateOverdubOperator(
        task_id="dub",
        video="{{ params.video }}",
        audio="{{ params.audio }}",
        deferrable=True,
        poke_interval=10,
        timeout="{{ params.timeout }}",
        # A killed worker costs a try, not the overdub: the next try reattaches to it.
        retries=2,
        retry_delay=timedelta(seconds=10),
        doc_md="Starts one overdub and waits for it in the triggerer. XCom `overdub_id` holds its id"
        " before the wait.",
    )

    # This task fails with `dub`. Without it, the DAG run would succeed when `delete` succeeds.
    save = HeyGenOverdubToObjectStorageOperator(
        task_id="save",
        overdub_id=dub.output,
        destination="{{ params.result }}",
        overwrite=True,
        doc_md="Streams the dubbed video to the parameter `result`.",
    )

    @task.short_circuit(
        trigger_rule="one_failed",
        doc_md="Runs if `dub` has failed. Skips `delete` if no overdub was started.",
    )
    def is_left_behind(ti: Any = None) -> bool:
        return ti.xcom_pull(task_ids="dub", key="overdub_id") is not None

    delete = HeyGenDeleteOverdubOperator(
        task_id="delete",
        overdub_id="{{ ti.xcom_pull(task_ids='dub', key='overdub_id') }}",
        retries=2,
        doc_md="Deletes the overdub and its files at HeyGen. They cannot be restored.",
    )

    dub >> is_left_behind() >> delete
