"""
Dub one video and save the result, in one task.

Video and audio are public https URLs, or files in any storage that Airflow knows. `make demo` and `make ui`
run this DAG with an emulator of HeyGen. Otherwise it needs an Airflow connection `heygen_default`.
"""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator

MEDIA = os.environ.get("HEYGEN_EXAMPLE_MEDIA", "/opt/airflow/media")
SOURCE = "A public https URL, or the URI of a file (`file:///data/talk.mp4`, `s3://media/talk.mp4` ...)."

with DAG(
    dag_id="example_heygen_overdub",
    description="Dub one video and save the result",
    schedule=None,
    params={
        "video": Param(f"file://{MEDIA}/talk.mp4", type="string", title="Video", description=SOURCE),
        "audio": Param(f"file://{MEDIA}/talk.de.mp3", type="string", title="New audio", description=SOURCE),
        "title": Param("Talk, German", type="string", title="Title", description="In HeyGen's dashboard."),
        "mode": Param(
            "speed",
            type="string",
            enum=["speed", "precision"],
            values_display={"speed": "Speed", "precision": "Precision (better, slower, twice the price)"},
            title="Mode",
            description="Precision pays if the speaker's face is prominent.",
        ),
        "result": Param(
            f"{MEDIA}/talk.dubbed.mp4",
            type="string",
            title="Result",
            description="Where the video is saved. A file that exists is replaced.",
        ),
    },
    tags=["example", "heygen"],
    doc_md=__doc__,
) as dag:
    HeyGenCreateOverdubOperator(
        task_id="dub",
        video="{{ params.video }}",
        audio="{{ params.audio }}",
        title="{{ params.title }}",
        mode="{{ params.mode }}",
        destination="{{ params.result }}",
        overwrite=True,
        deferrable=True,
        poke_interval=10,
        # A retry reattaches to the overdub that an earlier try has started.
        retries=3,
        retry_delay=timedelta(seconds=10),
        doc_md="Uploads the files, starts one overdub, waits for it in the triggerer and saves the video."
        " XCom `overdub` has title, length and URI.",
    )
