"""The decision table of a starting task: every record x every remote state x retry or clear."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest

from airflow_provider_heygen.api import CreateOverdubRequest
from airflow_provider_heygen.exceptions import HeyGenError, HeyGenPermanentError
from airflow_provider_heygen.submission import (
    LABELS,
    STATE_KEY,
    RemoteState,
    Step,
    Submission,
    content_prefix,
    derived_key,
    digest,
    labels,
    next_step,
    upload_key,
)

TI = SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1, max_tries=2)


def submission(**changes):
    fields = {"digest": "same", "number": 1, "key": "k", "began": 0.0, "max_tries": 2}
    return Submission(**fields | changes)


RECORDS = {
    "nothing": None,
    "not sent": submission(),
    "sent": submission(sent=True),
    "answered": submission(sent=True, overdub_id="od_1"),
    "delivered": submission(sent=True, overdub_id="od_1", delivered=True),
}

# What must come out while the request is the same. Where the second column is None, it holds for all.
TABLE = [
    ("nothing", None, "retry", Step.SUBMIT_NEW),
    ("nothing", None, "clear", Step.SUBMIT_NEW),
    # Nothing reached HeyGen: the same submission, as if for the first time.
    ("not sent", None, "retry", Step.RESEND),
    ("not sent", None, "clear", Step.RESEND),
    # An overdub may have been started: search for it first.
    ("sent", RemoteState.NOT_CHECKED, "retry", Step.SEARCH),
    ("sent", RemoteState.USABLE, "retry", Step.REATTACH),
    ("sent", RemoteState.FAILED, "retry", Step.SUBMIT_NEW),
    ("sent", RemoteState.MISSING, "retry", Step.RESEND),
    ("sent", RemoteState.NOT_CHECKED, "clear", Step.SEARCH),
    ("sent", RemoteState.USABLE, "clear", Step.REATTACH),
    ("sent", RemoteState.FAILED, "clear", Step.SUBMIT_NEW),
    ("sent", RemoteState.MISSING, "clear", Step.RESEND),
    # The id is known. Gone means deleted: a new one is wanted.
    ("answered", RemoteState.NOT_CHECKED, "retry", Step.CHECK),
    ("answered", RemoteState.USABLE, "retry", Step.REATTACH),
    ("answered", RemoteState.FAILED, "retry", Step.SUBMIT_NEW),
    ("answered", RemoteState.MISSING, "retry", Step.SUBMIT_NEW),
    ("answered", RemoteState.NOT_CHECKED, "clear", Step.CHECK),
    ("answered", RemoteState.USABLE, "clear", Step.REATTACH),
    ("answered", RemoteState.FAILED, "clear", Step.SUBMIT_NEW),
    ("answered", RemoteState.MISSING, "clear", Step.SUBMIT_NEW),
    # The worker died between marking the delivery and reporting to Airflow: no changed request.
    ("delivered", RemoteState.NOT_CHECKED, "retry", Step.CHECK),
    ("delivered", RemoteState.USABLE, "retry", Step.REATTACH),
    ("delivered", RemoteState.FAILED, "retry", Step.SUBMIT_NEW),
    ("delivered", RemoteState.MISSING, "retry", Step.SUBMIT_NEW),
    # Cleared after success: do it again.
    ("delivered", None, "clear", Step.SUBMIT_NEW),
]
CASES = [
    (record, one, how, step)
    for record, seen, how, step in TABLE
    for one in ([seen] if seen is not None else list(RemoteState))
]


def test_the_table_is_complete():
    assert {case[:3] for case in CASES} == set(product(RECORDS, RemoteState, ("retry", "clear")))
    assert len(CASES) == len({case[:3] for case in CASES})


def test_same_request():
    """Each combination of record, state of the overdub, and retry or clear leads to its step of the table."""
    max_tries = {"retry": 2, "clear": 3}  # Airflow raises max_tries when a task is cleared
    steps = [next_step(RECORDS[record], "same", max_tries[how], seen) for record, seen, how, _ in CASES]
    assert [(*case[:3], step) for case, step in zip(CASES, steps, strict=True)] == CASES


def test_a_changed_request_is_always_a_new_submission():
    for record, remote, max_tries in product(RECORDS, RemoteState, (2, 3)):
        assert next_step(RECORDS[record], "other", max_tries, remote) is Step.SUBMIT_NEW


def test_a_derived_key_stays_over_retries_and_changes_with_what_wants_another_job():
    key = derived_key(TI, "same:x")
    assert key == derived_key(SimpleNamespace(**vars(TI), try_number=2), "same:a link signed anew")
    others = [
        derived_key(SimpleNamespace(**vars(TI) | {name: value}), "same:x")
        for name, value in {
            "dag_id": "x",
            "run_id": "x",
            "task_id": "x",
            "map_index": 0,
            "max_tries": 3,
        }.items()
    ]
    others.append(derived_key(TI, "other:x"))
    assert len({key, *others}) == len(others) + 1


def test_the_same_request_has_the_same_prefix_in_each_key_unless_its_urls_have_queries():
    plain, signed = "a" * 64, "b" * 64
    prefix = content_prefix(f"{plain}:{plain}")
    assert derived_key(TI, f"{plain}:{plain}").startswith(prefix)
    assert not derived_key(TI, f"{plain}:{signed}").startswith((prefix, content_prefix(f"{plain}:{signed}")))
    assert content_prefix(f"{plain}:{signed}") != prefix


def test_a_url_signed_again_is_the_same_request_on_a_retry_and_another_after_a_clear():
    for record, seen in product(set(RECORDS) - {"nothing"}, RemoteState):
        signed = RECORDS[record].model_copy(update={"digest": "same:first"})
        same = next_step(RECORDS[record], "same", 2, seen)
        assert next_step(signed, "same:second", 2, seen) is same, (record, seen)
        assert next_step(signed, "same:second", 3, seen) is Step.SUBMIT_NEW, (record, seen)


def test_what_no_release_has_written_counts_as_nothing():
    invalid = [None, "", [], {}, {"digest": "x"}, {"number": "many"}, 7]
    assert [stored for stored in invalid if Submission.load(stored) is not None] == []


def test_a_record_survives_the_store():
    record = submission(sent=True, overdub_id="od_1", delivered=True)
    assert Submission.load(record.model_dump(mode="json") | {"of a later release": 1}) == record


def test_the_digest_knows_requests_apart_however_they_are_written():
    video, audio = "https://x.y/v.mp4", {"type": "asset_id", "asset_id": "a"}
    request = CreateOverdubRequest.of({"video": video, "audio": audio})
    same = CreateOverdubRequest.of({"audio": audio, "video": {"type": "url", "url": video}, "title": None})
    other = CreateOverdubRequest.of({"video": video, "audio": audio, "enable_watermark": False})
    assert digest(request) == digest(same) != digest(other)


FIELDS = {
    "video": "https://user:pw@x.y/v.mp4?sig=1",
    "audio": {"type": "asset_id", "asset_id": "a"},
    "mode": "precision",
    "start_time": 1,
}


def digest_of(**changes):
    return digest(CreateOverdubRequest.of(FIELDS | changes))


def test_a_retry_finds_the_records_of_an_older_release():
    """Frozen: another value would start a second overdub for each task that is on its way."""
    assert STATE_KEY == "heygen_overdub"
    assert digest_of() == (
        "9004a378ba6bb69064903580eaddb0fcfa3ea0b53b86b1dd748c720a35e3a01c"
        ":2c2ec352e97dd2c40fd2d332ab43068e3b5e45d9c6f9643e353db463904527db"
    )
    assert derived_key(TI, "same:x") == "8238a788-0a9c-5f9c-bbd0-f994bf6b4415"
    assert upload_key(submission(), "ab" * 32, 2, 1) == "858ce642-4371-56e6-a5eb-1d2462ae88b6"
    assert content_prefix(digest_of()) == "2c2ec352e97dd2c40fd2d332ab43068e:"
    assert labels(CreateOverdubRequest.of(FIELDS | {"title": "t"})) == {
        "title": "t",
        "callback_id": None,
        "labels": "6d9695b0f6f0de8c737c15a199b1658001af6e4ef0d756109efffbd0c69ad4c9",
    }


def test_an_upload_has_a_key_of_its_own():
    keys = {
        upload_key(submission(), "a", 2, 1),
        upload_key(submission(), "b", 2, 1),
        upload_key(submission(key="other"), "a", 2, 1),
        upload_key(submission(), "a", 3, 1),
        upload_key(submission(), "a", 2, 2),
    }
    assert len(keys) == 5


@pytest.mark.parametrize(
    "video", ["https://x.y/v.mp4", "https://x.y/v.mp4?sig=2", "https://other:secret@x.y/v.mp4?sig=1"]
)
def test_credentials_and_queries_of_urls_are_no_part_of_the_first_digest(video):
    first, whole = digest_of().split(":")
    assert digest_of(video=video).split(":")[0] == first
    assert digest_of(video=video).split(":")[1] != whole


LABELLED = {"title": "t", "callback_url": "https://x.y/hook", "callback_id": "c", "folder_id": "f"}
BILLED = {
    "video": "https://x.y/other.mp4",
    "audio": {"type": "asset_id", "asset_id": "b"},
    "mode": "speed",
    "enable_caption": True,
    "enable_dynamic_duration": False,
    "disable_music_track": True,
    "enable_speech_enhancement": True,
    "enable_watermark": True,
    "start_time": 2,
    "end_time": 3,
    "keep_the_same_format": True,
    "fps_mode": "cfr",
}


def test_each_field_is_a_label_or_billed():
    assert {*LABELLED, *BILLED} == set(CreateOverdubRequest.model_fields) - {"extra_body"}
    assert set(LABELLED) == set(LABELS)


@pytest.mark.parametrize("field", LABELLED)
def test_a_label_makes_no_other_overdub(field):
    change = {field: LABELLED[field]}
    assert digest_of(**change) == digest_of()
    assert labels(CreateOverdubRequest.of(FIELDS | change)) != labels(CreateOverdubRequest.of(FIELDS))


@pytest.mark.parametrize("field", BILLED)
def test_what_is_billed_makes_another_overdub(field):
    change = {field: BILLED[field]}
    assert digest_of(**change).split(":")[0] != digest_of().split(":")[0]
    assert labels(CreateOverdubRequest.of(FIELDS | change)) == labels(CreateOverdubRequest.of(FIELDS))


def test_a_record_keeps_no_callback_url():
    kept = labels(CreateOverdubRequest.of(FIELDS | {"callback_url": "https://x.y/hook?token=SECRET1"}))
    assert "SECRET1" not in str(kept)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sent_at", None), ("answered", None), ("assets", None), ("labels", {}), ("files", {"a": [1, 2, 3]})],
)
def test_an_invalid_member_does_not_hide_the_overdub(name, value):
    stored = submission(sent=True, overdub_id="od_1").model_dump(mode="json") | {name: value}
    assert Submission.load(stored).overdub_id == "od_1"


@pytest.mark.parametrize("known", [{"sent": True}, {"overdub_id": "od_1"}])
def test_an_unreadable_record_of_a_request_that_was_sent_stops_the_task(known):
    with pytest.raises(HeyGenError, match=r"cannot be read \(.*digest.*\)") as caught:
        Submission.load(known | {"digest": None})
    assert not isinstance(caught.value, HeyGenPermanentError)  # so that a retry checks it again
    assert "od_1" in str(caught.value) or "overdub_id" not in known
