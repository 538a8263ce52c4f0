"""
The submission record of a task, and the decision what the next try does with it.

HeyGen bills each overdub that completes. Only a failed or deleted overdub, a changed request or a clear after
success may start a second one; a crash, a retry or a lost response must not. The record is written to
Airflow's task state store (3.3+) *before* the request is sent. The next try then knows that a request may
have reached HeyGen. This module decides, and :mod:`.submitter` acts.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from airflow_provider_heygen.exceptions import HeyGenError

if TYPE_CHECKING:
    from airflow_provider_heygen.api import CreateOverdubRequest

STATE_KEY = "heygen_overdub"
"""The key in the task state store; frozen, because a retry after an upgrade must find it."""

_NAMESPACE = uuid.UUID("6f0c8a2e-41d5-5b7c-9d0e-8f1f6a3b2c4d")


class Submission(BaseModel):
    """
    The submission record of a task.

    :param digest: digest of the request, to detect a changed request; see :func:`digest`.
    :param number: number of this submission of the task, from 1. Each submission has its own key.
    :param key: idempotency key, and ``callback_id`` unless the author set one; see :func:`content_prefix`.
    :param began: Unix seconds of the first attempt.
    :param max_tries: the task's ``max_tries`` when the record was last saved. When a user clears the task,
        Airflow sets it to the tries so far plus ``retries``. A retry does not change it.
    :param sent: whether a create request may have reached HeyGen.
    :param sent_at: Unix seconds of the last attempt that may have reached HeyGen.
    :param overdub_id: the overdub, once HeyGen has returned its id.
    :param answered: Unix seconds of the response with the id.
    :param delivered: whether the task has returned the result.
    :param title: the title in the request.
    :param callback_id: the author's own ``callback_id`` in the request.
    :param labels: digest of the other labels, to detect a change.
    :param resource: HeyGen's name for the resource in the request, if known.
    :param account: digest of the host and the credential in the request, to detect another account.
    :param doubt_reported: whether a try has failed with the candidates for the overdub in its message.
    :param assets: the id of each uploaded HeyGen asset, by the SHA-256 of its file.
    :param files: SHA-256 and MIME type of each file by its fingerprint, so that a file is read once.
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
    account: str | None = None
    doubt_reported: bool = False
    assets: dict[str, str] = Field(default_factory=dict)
    files: dict[str, tuple[str, str]] = Field(default_factory=dict)

    @classmethod
    def load(cls, stored: Any) -> Submission | None:
        """
        Return the stored record, or ``None`` if there is none or nothing was sent for an invalid one.

        An invalid optional member gets its default.

        :raises HeyGenError: if a required member is invalid and a request may have been sent.
        """
        try:
            return cls.model_validate(stored)
        except ValidationError as error:
            wrong = {str(problem["loc"][0]) for problem in error.errors() if problem["loc"]}
        required = {name for name, member in cls.model_fields.items() if member.is_required()}
        if isinstance(stored, dict) and not wrong & required:
            return cls.model_validate({name: stored[name] for name in stored.keys() - wrong})
        if isinstance(stored, dict) and (stored.get("sent") or stored.get("overdub_id")):
            names, overdub_id = ", ".join(sorted(wrong)), stored.get("overdub_id") or "id unknown"
            raise HeyGenError(
                f"The submission record of this task cannot be read ({names}). It may have started an overdub"
                f" ({overdub_id}). Nothing was sent. Check it in HeyGen. To start another one, run the"
                " task once with durable=False."
            )
        return None

    def same_request(self, other: str, max_tries: int) -> bool:
        """
        Return whether a digest is of the request of this submission.

        A template may sign an input URL again on each try, so on a retry a changed query is not a changed
        request. After a clear it is: a user may have corrected the URL.
        """
        if self.max_tries != max_tries:
            return self.digest == other
        return self.digest.partition(":")[0] == other.partition(":")[0]


def content_prefix(digest: str) -> str:
    """Return the prefix of the keys of all submissions of the same request, in any task and DAG run."""
    return f"{digest.rpartition(':')[2][:32]}:"


def derived_key(ti: Any, digest: str) -> str:
    """
    Derive the key from the task instance, for Airflow versions without a task state store.

    It changes with a clear, but not with the try number, or a retry would start a second overdub.
    """
    unsigned, _, whole = digest.partition(":")
    parts = (ti.dag_id, ti.run_id, ti.task_id, ti.map_index, ti.max_tries, unsigned)
    key = str(uuid.uuid5(_NAMESPACE, json.dumps(parts)))
    # The prefix would change with a URL that is signed again on each try.
    return f"{content_prefix(digest)}{key}" if unsigned == whole else key


def upload_key(submission: Submission, digest: str, max_tries: int, generation: int) -> str:
    """
    Return the idempotency key of one upload for a submission.

    :param digest: SHA-256 of the file.
    :param max_tries: the task's ``max_tries`` now: after a clear, the same key would return the old asset.
    :param generation: increases when HeyGen no longer has the asset.
    """
    return str(uuid.uuid5(_NAMESPACE, json.dumps((submission.key, max_tries, generation, digest))))


LABELS = ("title", "callback_url", "callback_id", "folder_id")
"""Fields that HeyGen does not bill: another value does not lead to another overdub."""


def digest(request: CreateOverdubRequest) -> str:
    """
    Return two digests of the billed fields: without credentials and queries in their URLs, and complete.

    Records outlive releases, so this must not change, even if the redaction of log lines does.
    """
    billed = {name: value for name, value in request.body().items() if name not in LABELS}
    body = json.dumps(billed, sort_keys=True)
    unsigned = re.sub(r'(?i)(https?://)(?:[^\s/@"?]*@)?([^\s"?]*)(?:\?[^\s"]*)?', r"\1\2", body)
    return ":".join(hashlib.sha256(text.encode()).hexdigest() for text in (unsigned, body))


def labels(request: CreateOverdubRequest) -> dict[str, Any]:
    """Return a request's labels for the record; a callback URL may be secret, so only as a digest."""
    others = json.dumps((request.callback_url, request.folder_id)).encode()
    return {
        "title": request.title,
        "callback_id": request.callback_id,
        "labels": hashlib.sha256(others).hexdigest(),
    }


class RemoteState(StrEnum):
    """The state of a submission's overdub at HeyGen."""

    NOT_CHECKED = "not checked"
    USABLE = "usable"
    """The overdub is not final, or completed."""
    FAILED = "failed"
    MISSING = "missing"


class Step(StrEnum):
    """What to do next."""

    CHECK = "check the overdub whose id is known"
    SEARCH = "search for the overdub whose id is not known"
    REATTACH = "reattach to the overdub that exists"
    RESEND = "send the same submission again, under its key"
    SUBMIT_NEW = "start a new submission"


def next_step(
    record: Submission | None, digest: str, max_tries: int, remote: RemoteState = RemoteState.NOT_CHECKED
) -> Step:
    """
    Decide what a try does.

    :param record: what the task instance has submitted so far.
    :param digest: digest of the request of this try.
    :param max_tries: the task's ``max_tries`` now.
    :param remote: what :attr:`Step.CHECK` or :attr:`Step.SEARCH` has found; the first call omits it.
    """
    if record is None or not record.same_request(digest, max_tries):
        return Step.SUBMIT_NEW
    if record.delivered and record.max_tries != max_tries:
        # A user cleared the task after its success. Without a clear, the worker died after it recorded the
        # delivery and before Airflow recorded the success.
        return Step.SUBMIT_NEW
    if record.overdub_id is None and not record.sent:
        return Step.RESEND
    if remote is RemoteState.NOT_CHECKED:
        return Step.CHECK if record.overdub_id else Step.SEARCH
    if remote is RemoteState.FAILED:
        return Step.SUBMIT_NEW
    if remote is RemoteState.MISSING:
        # An overdub with a known id was deleted. Without an id, the request may never have arrived.
        return Step.SUBMIT_NEW if record.overdub_id else Step.RESEND
    return Step.REATTACH
