"""One sensor for each overdub of the environment, once ending on a worker and once in the triggerer."""

from __future__ import annotations

import os

from airflow.sdk import DAG

from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor

for dag_id, options in {"on_a_worker": {}, "from_the_trigger": {"end_from_trigger": True}}.items():
    with DAG(dag_id, schedule=None):
        HeyGenOverdubSensor.partial(task_id="wait", deferrable=True, poke_interval=1, **options).expand(
            overdub_id=os.environ[f"OVERDUBS_{dag_id.upper()}"].split(",")
        )
