"""What the retry policy decides. What a real Airflow makes of it is in `stack/test_failures.py`."""

from __future__ import annotations

import json

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException
from airflow.sdk import DAG
from airflow_task import StateStore, Task
from conftest import HAS_RETRY_POLICIES, needs_retry_policies
from test_exactly_once import dub

from airflow_provider_heygen import retry_policy
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenOverdubTimeoutError,
    HeyGenPermanentError,
    HeyGenTransientError,
)
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.operators.asset import HeyGenUploadAssetOperator
from airflow_provider_heygen.retry_policy import HeyGenRetryPolicy


def decide(error):
    return HeyGenRetryPolicy().evaluate(error, try_number=1, max_tries=3)


def raised_from(error, cause):
    error.__cause__ = cause
    return error


def raised_while(error, other):
    error.__context__ = other
    return error


BUSY = HeyGenTransientError("Busy.", status_code=429, retry_after=120.0)
REFUSED = HeyGenPermanentError("No credit left.", status_code=402)


@needs_retry_policies
@pytest.mark.parametrize(
    ("error", "action", "least", "most"),
    [
        (BUSY, "retry", 120, 144),
        (HeyGenTransientError("Down.", status_code=503, retry_after=90.0), "retry", 90, 108),
        (HeyGenOverdubTimeoutError("Too long.", retry_after=70.0), "retry", 70, 84),
        (raised_from(ValueError("mine"), BUSY), "retry", 120, 144),
        (HeyGenTransientError("Now.", retry_after=0.0), "retry", 0, 0),
        (HeyGenTransientError("Busy.", status_code=429), "default", None, None),
        (HeyGenError("Not completed yet."), "default", None, None),
        (OSError("disk full"), "default", None, None),
        (REFUSED, "fail", None, None),
        (HeyGenBadInputError("mode: no such."), "fail", None, None),
        (raised_from(RuntimeError("mine"), raised_from(ValueError("mine"), REFUSED)), "fail", None, None),
        (raised_while(OSError("mine"), REFUSED), "default", None, None),
    ],
    ids=repr,
)
def test_decisions(error, action, least, most):
    decision = decide(error)
    assert decision.action.value == action
    if least is None:
        assert decision.retry_delay is None
    else:
        assert least <= decision.retry_delay.total_seconds() <= most


@needs_retry_policies
def test_reasons_name_what_heygen_said():
    assert decide(BUSY).reason == "HeyGen asks to wait 120 s: Busy."
    assert decide(REFUSED).reason == "HeyGen will refuse it again: No credit left."


@needs_retry_policies
def test_those_that_are_turned_away_together_do_not_come_back_together():
    assert len({decide(BUSY).retry_delay for _ in range(20)}) > 10


@needs_retry_policies
def test_a_create_that_may_not_wait_so_long(heygen):
    heygen.fail_next(method="POST", status=429, headers={"Retry-After": "500"}, code="rate_limit_exceeded")
    with pytest.raises(HeyGenOverdubTimeoutError) as raised:
        Task(dub(timeout=100), store=StateStore()).start()
    assert 500 <= decide(raised.value).retry_delay.total_seconds() <= 600


@needs_retry_policies
def test_a_long_retry_after_of_any_call(heygen):
    heygen.fail_next(method="GET", status=429, headers={"Retry-After": "61"})
    with pytest.raises(HeyGenTransientError) as raised:
        HeyGenHook().get_overdub("od_1")
    assert 61 <= decide(raised.value).retry_delay.total_seconds() <= 73.2


@needs_retry_policies
def test_a_dag_can_have_it():
    from airflow.serialization.serialized_objects import DagSerialization

    with DAG("dag", schedule=None, default_args={"retry_policy": HeyGenRetryPolicy()}) as dag:
        HeyGenUploadAssetOperator(task_id="plain", source="/v.mp4")
        HeyGenUploadAssetOperator.partial(task_id="mapped").expand(source=["/v.mp4"])
    stored = json.loads(json.dumps(DagSerialization.to_dict(dag)))
    read = DagSerialization.from_dict(stored)
    assert [read.get_task(name).has_retry_policy for name in ("plain", "mapped")] == [True, True]
    policy = HeyGenRetryPolicy()
    assert isinstance(HeyGenRetryPolicy.deserialize(json.loads(json.dumps(policy.serialize()))), type(policy))


def test_before_airflow_3_3_it_says_what_it_needs(monkeypatch):
    if HAS_RETRY_POLICIES:
        monkeypatch.setattr(retry_policy, "RetryDecision", None)
    with pytest.raises(RuntimeError, match=r"needs Airflow 3\.3"):
        HeyGenRetryPolicy()


def test_a_permanent_error_needs_no_policy():
    assert isinstance(REFUSED, AirflowFailException)
