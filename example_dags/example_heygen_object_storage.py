"""
From a bucket to a bucket: the video and the new audio come from storage, the dubbed video goes back there.

The create operator uploads ``s3://`` files on the way; nothing is stored by Airflow in between. Any storage
does that Airflow has a provider for (``gs://``, ``abfs://``, ``file://`` ...). The part before the ``@`` of a
URI is the Airflow connection of the storage. Needs the Amazon provider with its extra ``s3fs``, and a
connection ``heygen_default``.
"""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

with DAG(
    dag_id="example_heygen_object_storage",
    schedule=None,
    params={
        "storage": "s3://aws_default@my-bucket/talks",
        "video": "talk.mp4",
        "audio": "talk.de.mp3",
        "result": "dubbed/talk.de.mp4",
    },
    tags=["example", "heygen"],
    doc_md=__doc__,
) as dag:
    dub = HeyGenCreateOverdubOperator(
        task_id="dub",
        video="{{ params.storage }}/{{ params.video }}",
        audio="{{ params.storage }}/{{ params.audio }}",
        deferrable=True,
        poke_interval=10,
        retries=2,
        doc_md="Uploads both files, starts one overdub and waits for it in the triggerer.",
    )

    HeyGenOverdubToObjectStorageOperator(
        task_id="save",
        overdub_id=dub.output,
        destination="{{ params.storage }}/{{ params.result }}",
        overwrite=True,
        retries=2,
        doc_md="Streams the dubbed video into the storage.",
    )
