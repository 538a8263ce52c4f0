"""
Dub, let a person watch the result, then publish it or delete it.

`review` waits for a decision in Airflow's UI (*Required Action*), without a worker. Its text links to the
page that plays the video. The video is published only if a person approves it.
"""

from __future__ import annotations

import os

from airflow.providers.standard.operators.hitl import HITLBranchOperator
from airflow.sdk import DAG, Param

from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator, HeyGenDeleteOverdubOperator
from airflow_provider_heygen.plugin import watch_path
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

MEDIA = os.environ.get("HEYGEN_EXAMPLE_MEDIA", "/opt/airflow/media")
SOURCE = "A public https URL, or the URI of a file (`file:///data/talk.mp4`, `s3://media/talk.mp4` ...)."

with DAG(
    dag_id="example_heygen_review",
    description="Dub one video, and publish it if a person approves",
    schedule=None,
    params={
        "video": Param(f"file://{MEDIA}/talk.mp4", type="string", title="Video", description=SOURCE),
        "audio": Param(f"file://{MEDIA}/talk.de.mp3", type="string", title="New audio", description=SOURCE),
        "published": Param(
            f"{MEDIA}/published/talk.de.mp4",
            type="string",
            title="Published",
            description="Where the approved video is saved.",
        ),
    },
    user_defined_macros={"watch_path": watch_path},
    tags=["example", "heygen"],
    doc_md=__doc__,
) as dag:
    dub = HeyGenCreateOverdubOperator(
        task_id="dub",
        video="{{ params.video }}",
        audio="{{ params.audio }}",
        title="Talk, German",
        deferrable=True,
        poke_interval=10,
        retries=3,
        doc_md="Starts one overdub and waits for it in the triggerer.",
    )

    review = HITLBranchOperator(
        task_id="review",
        subject="Publish this video?",
        body="{% set overdub = ti.xcom_pull(task_ids='dub', key='overdub') %}"
        "**{{ overdub.title }}**, {{ overdub.duration }} s:"
        " [Watch]({{ watch_path(dag.dag_id, run_id, 'dub', -1) }})",
        options=["Publish", "Delete"],
        options_mapping={"Publish": "publish", "Delete": "delete"},
        doc_md="Waits until a person has watched the video and decides.",
    )

    publish = HeyGenOverdubToObjectStorageOperator(
        task_id="publish",
        overdub_id=dub.output,
        destination="{{ params.published }}",
        overwrite=True,
        retries=3,
        doc_md="Saves the approved video.",
    )

    delete = HeyGenDeleteOverdubOperator(
        task_id="delete",
        overdub_id=dub.output,
        retries=3,
        doc_md="Deletes the rejected overdub and its files at HeyGen. They cannot be restored.",
    )

    dub >> review >> [publish, delete]
