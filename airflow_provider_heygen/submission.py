"""
Exactly once: what a task has submitted so far, and what to do about it when it starts again.

HeyGen bills each job that completes, so a crash, a retry or a lost answer must not start a second one; a job
that failed, a changed request and a clear after success must. The record below is written to Airflow's task
state store (3.3+) *before* the request is sent, so whoever comes next knows that something may be out there.
This module decides, :mod:`.submitter` carries it out.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from airflow_provider_heygen.api import CreateOverdubRequest

STATE_KEY = "heygen_overdub"
"""The key in the task state store; frozen, retries of an older release must find it."""

_NAMESPACE = uuid.UUID("6f0c8a2e-41d5-5b7c-9d0e-8f1f6a3b2c4d")


class Submission(BaseModel):
    """
    One submission of one task.

    :param digest: of the request, to tell a changed one: see :func:`digest`.
    :param number: counts the submissions of this task; a new one gets a new key.
    :param key: idempotency key, and ``callback_id`` unless the author set one; see :func:`content_prefix`.
    :param began: Unix seconds of the first attempt.
    :param max_tries: the task's ``max_tries`` then. Airflow sets it anew when somebody clears the task, to
        the tries so far and ``retries``, and leaves it alone over retries.
    :param sent: a request may have reached HeyGen.
    :param sent_at: Unix seconds of the last time that may have been.
    :param overdub_id: what HeyGen answered, once it has.
    :param answered: Unix seconds of that answer; how fresh the overdub is.
    :param delivered: the task has handed on the result.
    :param title: the title that it was sent with.
    :param callback_id: the author's ``callback_id`` that it was sent with.
    :param labels: a digest of the other labels, to notice a change.
    :param resource: HeyGen's name for the resource, under which it was sent, if it was known then.
    :param assets: what was uploaded for it: the SHA-256 of each file, and the asset it has become.
    :param files: SHA-256 and MIME type of each file by its fingerprint, so that it is read once.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    digest: str
    number: int
    key: str
    began: float
    max_tries: int
    sent: bool = False
    sent_at: float = 0.0
    overdub_id: str | None = None
    answered: float = 0.0
    delivered: bool = False
    title: str | None = None
    callback_id: str | None = None
    labels: str = ""
    resource: str | None = None
    assets: dict[str, str] = Field(default_factory=dict)
    files: dict[str, tuple[str, str]] = Field(default_factory=dict)

    @classmethod
    def load(cls, stored: Any) -> Submission | None:
        """Read what the state store holds; what no release has written counts as nothing."""
        try:
            return cls.model_validate(stored)
        except ValidationError:
            return None

    def same_request(self, other: str, max_tries: int) -> bool:
        """
        Tell whether a digest is of the request this submission is for.

        A template may sign an input's link anew for each try, which does not make a retry another wish. After
        a clear it may: somebody has perhaps corrected the link.
        """
        if self.max_tries != max_tries:
            return self.digest == other
        return self.digest.partition(":")[0] == other.partition(":")[0]


def content_prefix(digest: str) -> str:
    """Return the beginning of the keys of all submissions that ask for the same, in any task and run."""
    return f"{digest.rpartition(':')[2][:32]}:"


def derived_key(ti: Any, digest: str) -> str:
    """
    Give a key that a retry of a task instance comes to by itself, for an Airflow without a state store.

    It changes with a clear, and never with the try number, or a retry would start a second overdub.
    """
    unsigned, _, whole = digest.partition(":")
    parts = (ti.dag_id, ti.run_id, ti.task_id, ti.map_index, ti.max_tries, unsigned)
    key = str(uuid.uuid5(_NAMESPACE, json.dumps(parts)))
    # A URL that is signed again on each try leads to the same key.
    return f"{content_prefix(digest)}{key}" if unsigned == whole else key


def upload_key(submission: Submission, digest: str, max_tries: int, generation: int) -> str:
    """
    Give the idempotency key of one upload for a submission.

    :param digest: SHA-256 of the file.
    :param max_tries: the task's ``max_tries`` now: after a clear the same key would bring the old asset.
    :param generation: begins when HeyGen has forgotten the asset.
    """
    return str(uuid.uuid5(_NAMESPACE, json.dumps((submission.key, max_tries, generation, digest))))


LABELS = ("title", "callback_url", "callback_id", "folder_id")
"""Fields that HeyGen does not bill: another value does not make another overdub."""


def digest(request: CreateOverdubRequest) -> str:
    """
    Return two digests of what is billed of a request: without credentials and queries in its URLs, and whole.

    Records outlive releases, so this must not change; what is redacted for a log may.
    """
    billed = {name: value for name, value in request.body().items() if name not in LABELS}
    body = json.dumps(billed, sort_keys=True)
    unsigned = re.sub(r'(?i)(https?://)(?:[^\s/@"?]*@)?([^\s"?]*)(?:\?[^\s"]*)?', r"\1\2", body)
    return ":".join(hashlib.sha256(text.encode()).hexdigest() for text in (unsigned, body))


def labels(request: CreateOverdubRequest) -> dict[str, Any]:
    """Return what a record keeps of a request's labels: of a callback URL, which may be secret, a digest."""
    others = json.dumps((request.callback_url, request.folder_id)).encode()
    return {
        "title": request.title,
        "callback_id": request.callback_id,
        "labels": hashlib.sha256(others).hexdigest(),
    }


class Seen(StrEnum):
    """What HeyGen has of a submission."""

    NOT_LOOKED = "not looked"
    ALIVE = "alive"
    """It is not final, or completed."""
    FAILED = "failed"
    MISSING = "missing"


class Step(StrEnum):
    """What to do next."""

    LOOK = "look at the overdub whose id is known"
    SEARCH = "search for the overdub whose id is not known"
    ATTACH = "go on with the overdub that exists"
    POST_AGAIN = "send the same submission again, under its key"
    POST_NEW = "begin a new submission"


def next_step(record: Submission | None, digest: str, max_tries: int, seen: Seen = Seen.NOT_LOOKED) -> Step:
    """
    Decide what a starting task does.

    :param record: what an earlier run of this task instance left behind.
    :param digest: of the request it would send now.
    :param max_tries: the task's ``max_tries`` now.
    :param seen: what HeyGen has; first ask without, then again with what :attr:`Step.LOOK` or
        :attr:`Step.SEARCH` found.
    """
    if record is None or not record.same_request(digest, max_tries):
        return Step.POST_NEW
    if record.delivered and record.max_tries != max_tries:
        # Cleared after success: "do it again". Without a clear in between, the worker died after it had
        # noted the delivery and before Airflow knew.
        return Step.POST_NEW
    if record.overdub_id is None and not record.sent:
        return Step.POST_AGAIN
    if seen is Seen.NOT_LOOKED:
        return Step.LOOK if record.overdub_id else Step.SEARCH
    if seen is Seen.FAILED:
        return Step.POST_NEW
    if seen is Seen.MISSING:
        # An id that is certainly gone was deleted. One we never learnt may not have come to be.
        return Step.POST_NEW if record.overdub_id else Step.POST_AGAIN
    return Step.ATTACH
