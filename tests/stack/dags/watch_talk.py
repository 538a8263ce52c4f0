"""One overdub of public links, and a sensor that waits for it, too."""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor

with DAG("watch_talk", schedule=None):
    dub = HeyGenCreateOverdubOperator(
        task_id="dub",
        video="https://media.example.com/talk.mp4",
        audio="https://media.example.com/talk.de.mp3",
        title="{{ dag_run.conf.title }}",
        mode="precision",
        deferrable=True,
        poke_interval=1,
    )
    dub >> HeyGenOverdubSensor(task_id="wait", overdub_id="{{ ti.xcom_pull('dub') }}")
