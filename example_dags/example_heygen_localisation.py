"""
A night of dubs: each video of a folder or bucket, in each language that it has an audio file for.

`talk.mp4` and `talk.de.mp3` become `dubbed/talk.de.mp4`. A current result is kept. `dubbed.json` lists all.
"""

import json
import os

from airflow.sdk import DAG, ObjectStoragePath, Param, task

from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator

MEDIA = f"file://{os.environ.get('HEYGEN_EXAMPLE_MEDIA', '/opt/airflow/media')}"


def alert(context):  # send it to your team instead
    print(f"ALERT: {context['task'].title} is not dubbed: {context['exception']}")


with DAG(
    "example_heygen_localisation",
    description="Dub all videos of a folder or bucket into many languages",
    params={
        "media": Param(
            MEDIA,
            type="string",
            pattern="[^/]$",
            title="Folder",
            description="URI of a folder or bucket, without a final slash",
        ),
        "mode": Param("speed", enum=["speed", "precision"], title="Mode", description="See *Cost and quota*"),
    },
    tags=["example", "heygen"],
    doc_md=__doc__,
) as dag:

    @task(doc_md="Finds the audio files: `<video>.<language>.mp3`, each one video in one language.")
    def plan(params):
        return sorted(f.stem for f in ObjectStoragePath(params["media"]).iterdir() if f.suffix == ".mp3")

    names = plan()
    dub = HeyGenCreateOverdubOperator.partial(
        task_id="dub",
        video="{{ params.media }}/{{ task.title.rpartition('.')[0] }}.mp4",
        audio="{{ params.media }}/{{ task.title }}.mp3",
        destination="{{ params.media }}/dubbed/{{ task.title }}.mp4",
        mode="{{ params.mode }}",
        skip_existing=True,
        reuse="content",
        deferrable=True,
        retries=3,
        map_index_template="{{ task.title }}",
        on_failure_callback=alert,
        doc_md="Dubs one video in one language, waits in the triggerer, and saves it.",
    ).expand(title=names)

    @task(trigger_rule="all_done", doc_md="Writes `dubbed.json`. Fails if a language is missing.")
    def manifest(names, params, ti):
        found = ti.xcom_pull(task_ids="dub", key="overdub", map_indexes=range(len(names)))
        done = {name: overdub for name, overdub in zip(names, found, strict=True) if overdub}
        ObjectStoragePath(f"{params['media']}/dubbed.json").write_text(json.dumps(done, indent=2))
        if missing := sorted(set(names) - set(done)):
            raise RuntimeError(f"{len(missing)} of {len(names)} are missing: {', '.join(missing)}")

    dub >> manifest(names)
