"""
Dub one video: upload a video and an audio file, create the overdub, wait without a worker, keep the result.

Trigger it with your own files, local or in any storage Airflow's ObjectStoragePath knows:

    airflow dags trigger example_heygen_overdub \
        --conf '{"video": "s3://in/talk.mp4", "audio": "s3://in/talk.de.mp3", "result": "s3://out/"}'

It needs a connection ``heygen_default``; `make demo` and `make ui` bring one, with an emulator behind it.
"""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_heygen.operators.asset import HeyGenUploadAssetOperator
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

MEDIA = os.environ.get("HEYGEN_EXAMPLE_MEDIA", "/opt/airflow/media")

with DAG(
    dag_id="example_heygen_overdub",
    schedule=None,
    params={
        "video": f"{MEDIA}/talk.mp4",
        "audio": f"{MEDIA}/talk.de.mp3",
        "result": f"{MEDIA}/talk.dubbed.mp4",
    },
    # A retry uploads nothing twice, and goes on with the overdub that an earlier try has started.
    default_args={"retries": 3, "retry_delay": timedelta(seconds=10)},
    tags=["example", "heygen"],
    doc_md=__doc__,
) as dag:
    upload_video = HeyGenUploadAssetOperator(
        task_id="upload_video",
        source="{{ params.video }}",
        doc_md="Streams the video to HeyGen; XCom `asset_id` says as what.",
    )
    upload_audio = HeyGenUploadAssetOperator(
        task_id="upload_audio",
        source="{{ params.audio }}",
        doc_md="Streams the new audio to HeyGen; XCom `asset_id` says as what.",
    )

    dub = HeyGenCreateOverdubOperator(
        task_id="dub",
        video=upload_video.output,
        audio=upload_audio.output,
        title="Talk, German ({{ run_id }})",
        mode="precision",
        deferrable=True,
        poke_interval=10,
        doc_md="Starts one overdub and waits for it in the triggerer. XCom `overdub_id` holds its id from the"
        " start, XCom `overdub` its title, status and length when it is done.",
    )

    save = HeyGenOverdubToObjectStorageOperator(
        task_id="save",
        overdub_id=dub.output,
        destination="{{ params.result }}",
        overwrite=True,
        doc_md="Streams the dubbed video to where the parameter `result` says.",
    )
