"""
One video, many languages: dub, keep, rename and clean up, one mapped task per language.

HeyGen runs a limited number of jobs at a time (10 on pay-as-you-go). The pool keeps within it, and because it
includes deferred tasks, a dub holds its slot while it waits without a worker. Create it once:

    airflow pools set heygen 10 "jobs HeyGen runs at a time" --include-deferred

The audio files are ``talk.<language>.mp3`` beside the video; ``LANGUAGES`` in this file says which.
Needs a connection ``heygen_default``.
"""

from __future__ import annotations

import os

from airflow.sdk import DAG

from airflow_provider_heygen.operators.asset import HeyGenUploadAssetOperator
from airflow_provider_heygen.operators.overdub import (
    HeyGenCreateOverdubOperator,
    HeyGenDeleteOverdubOperator,
    HeyGenUpdateOverdubOperator,
)
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

MEDIA = os.environ.get("HEYGEN_EXAMPLE_MEDIA", "/opt/airflow/media")
LANGUAGES = ["de", "fr", "es"]

with DAG(
    dag_id="example_heygen_localisation",
    schedule=None,
    params={"media": MEDIA},
    user_defined_macros={"languages": LANGUAGES},
    tags=["example", "heygen"],
    doc_md=__doc__,
) as dag:
    upload_video = HeyGenUploadAssetOperator(
        task_id="upload_video",
        source="{{ params.media }}/talk.mp4",
        doc_md="Streams the video to HeyGen, once for all languages.",
    )

    upload_audio = HeyGenUploadAssetOperator.partial(
        task_id="upload_audio", doc_md="Streams the audio of each language to HeyGen."
    ).expand(source=[f"{{{{ params.media }}}}/talk.{language}.mp3" for language in LANGUAGES])

    # Results keep the order of the languages, so a task finds its language by its map index.
    language = "{{ languages[ti.map_index] }}"

    dub = HeyGenCreateOverdubOperator.partial(
        task_id="dub",
        video=upload_video.output,
        title=f"Talk, {language}",
        deferrable=True,
        poke_interval=10,
        pool="heygen",
        retries=3,
        map_index_template=language,
        doc_md="Starts one overdub per language and waits for it in the triggerer, at most 10 at a time.",
    ).expand(audio=upload_audio.output)

    save = HeyGenOverdubToObjectStorageOperator.partial(
        task_id="save",
        destination=f"{{{{ params.media }}}}/dubbed/talk.{language}.mp4",
        overwrite=True,
        map_index_template=language,
        doc_md="Streams each dubbed video to `dubbed/` beside the original.",
    ).expand(overdub_id=dub.output)

    rename = HeyGenUpdateOverdubOperator.partial(
        task_id="rename",
        title=f"Talk, {language}, delivered",
        map_index_template=language,
        doc_md="Marks in HeyGen's dashboard what is saved.",
    ).expand(overdub_id=dub.output)

    clean_up = HeyGenDeleteOverdubOperator.partial(
        task_id="clean_up",
        map_index_template=language,
        doc_md="Deletes the overdub and its files at HeyGen, for good.",
    ).expand(overdub_id=dub.output)

    save >> rename >> clean_up
