"""One overdub of links that hold secrets; they come into being when the task runs, as presigned links do."""

from __future__ import annotations

import os

from airflow.sdk import DAG

from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator

with DAG("dub_talk", schedule=None, user_defined_macros={"secret_url": os.environ.get}):
    HeyGenCreateOverdubOperator(
        task_id="dub",
        video="{{ secret_url('STACK_VIDEO') }}",
        audio={"type": "url", "url": "{{ secret_url('STACK_AUDIO') }}"},
        callback_url="{{ secret_url('STACK_CALLBACK') }}",
        title="Talk, German",
        mode="precision",
        deferrable=True,
        poke_interval=1,
    )
