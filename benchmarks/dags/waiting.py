"""A sensor for each overdub of the environment: some end on a worker, some in the triggerer."""

from __future__ import annotations

import os

from airflow.sdk import DAG

from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor

with DAG("waiting", schedule=None):
    for task_id, end_from_trigger in {"on_a_worker": False, "from_the_trigger": True}.items():
        HeyGenOverdubSensor.partial(
            task_id=task_id, deferrable=True, poke_interval=1, end_from_trigger=end_from_trigger
        ).expand(overdub_id=os.environ[task_id.upper()].split(","))
