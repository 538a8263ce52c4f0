"""Start one overdub, or upload one file, for one task instance, as :mod:`.submission` decides."""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow_provider_heygen import metrics, waiting
from airflow_provider_heygen.api import MAX_PAGE_SIZE, MediaAsset, OverdubStatus, redact_urls
from airflow_provider_heygen.compat import task_state_store
from airflow_provider_heygen.exceptions import (
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenOutcomeUnknownError,
    HeyGenPermanentError,
)
from airflow_provider_heygen.media import size_text
from airflow_provider_heygen.submission import (
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

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_heygen.api import CreateOverdubRequest, Overdub
    from airflow_provider_heygen.hooks.heygen import HeyGenHook
    from airflow_provider_heygen.upload import Source

log = logging.getLogger(__name__)

CLOCK_SKEW_SECONDS = 600.0
"""Seconds by which the clocks of two workers may differ."""

REUSE_SECONDS = 3 * 24 * 60 * 60
"""Maximum age in seconds of an overdub of another task or DAG run that may be reused."""


class SubmissionStore:
    """
    The submission record of a task instance, in Airflow's task state store (3.3+).

    Before 3.3, it lasts for one try, and what an earlier try may have sent is derived from the task instance.

    :param durable: ``False`` if the record lasts for one try and nothing is derived.
    :param resumed: whether the task continues after it was deferred until HeyGen has a free slot.
    :param kept: :attr:`kept` before that deferral.
    """

    def __init__(self, context: Context, *, durable: bool, resumed: bool = False, kept: Any = None) -> None:
        self.ti: Any = context["ti"]
        self.durable = durable
        self.resumed = resumed
        self.is_completed = False  # whether the overdub was completed when it was found
        self.dag_run_began = context["dag_run"].start_date
        self._state: Any = task_state_store(context) if durable else None
        self._kept = kept

    @cached_property
    def record(self) -> Submission | None:
        """The record of this and earlier tries, read once."""
        if self._state is None:
            return Submission.load(self._kept)
        record = Submission.load(self._state.get(STATE_KEY))
        if record is not None and record.max_tries != self.ti.max_tries:
            # A user has cleared the task, perhaps because of its files.
            return record.model_copy(update={"files": {}})
        return record

    @property
    def kept(self) -> Any:
        """The record as JSON, if no store keeps it during a deferral."""
        return self.record.model_dump(mode="json") if self._state is None and self.record else None

    @property
    def files(self) -> Mapping[str, tuple[str, str]]:
        """SHA-256 and MIME type of files by their fingerprint."""
        return self.record.files if self.record else {}

    def load(self, body_digest: str) -> Submission | None:
        """Return what the task instance has submitted so far."""
        derive = self.durable and self._state is None and (self.ti.try_number > 1 or self.resumed)
        if self.record is None and derive:
            began = self.dag_run_began.timestamp() if self.dag_run_began else time.time()
            # The time of sending is unknown, but has passed.
            found = {"began": began, "sent": True, "sent_at": time.time()}
            self.record = self.new(body_digest, None).model_copy(update=found)
        return self.record

    def new(self, body_digest: str, before: Submission | None) -> Submission:
        """Return a new submission, not yet written."""
        # A stored key can be random, so no other Airflow has the same one.
        derive = self.durable and self._state is None
        random = f"{content_prefix(body_digest)}{uuid.uuid4()}"
        return Submission(
            digest=body_digest,
            number=before.number + 1 if before else 1,
            key=derived_key(self.ti, body_digest) if derive else random,
            began=time.time(),
            max_tries=self.ti.max_tries,
            assets=self.reusable(before) if before else {},
        )

    def save(self, submission: Submission, **changes: Any) -> None:
        """Write a changed submission for the next try."""
        self.record = submission.model_copy(update={**changes, "max_tries": self.ti.max_tries})
        if self._state is not None:
            self._state.set(STATE_KEY, self.record.model_dump(mode="json"))

    def reusable(self, submission: Submission) -> dict[str, str]:
        """Return the assets that need no other upload: a user may clear a task because of its assets."""
        return submission.assets if submission.max_tries == self.ti.max_tries else {}

    @property
    def outcome_unknown(self) -> bool:
        """Whether a create request was sent whose outcome is unknown."""
        return self.record is not None and self.record.sent and self.record.overdub_id is None

    @property
    def asset_ids(self) -> list[str]:
        """The ids of the HeyGen assets that were uploaded for the overdub."""
        return list(self.record.assets.values()) if self.record else []

    def mark_delivered(self) -> None:
        """Record that the task returns its result: clearing it now starts another overdub."""
        if self.record is not None and self._state is not None:
            self.save(self.record, delivered=True)


@dataclass(frozen=True)
class Submitter:
    """
    Starts the overdub of one task instance, or reattaches to the overdub of an earlier try.

    :param files: files to upload for ``video`` and ``audio``, instead of these fields of the request.
    """

    request: CreateOverdubRequest
    hook: HeyGenHook
    store: SubmissionStore
    files: Mapping[str, Source]

    def submit(self, check: Callable[[], object] | None = None, *, reuse: bool = False) -> str:
        """
        Start the overdub, or reattach to the overdub of an earlier try, and return its id.

        :param check: called before anything is sent for a new overdub.
        :param reuse: whether to reattach to an overdub of another task or DAG run, see
            :meth:`_find_reusable`.
        :raises HeyGenError: if no overdub is known. The record states whether a request may have been sent.
        """
        # The digest contains the content of a file, because each upload creates another asset.
        digests = {name: f"sha256:{file.digest}" for name, file in self.files.items()}
        body_digest = digest(_with_assets(self.request, digests))
        submission = self.store.load(body_digest)
        step = next_step(submission, body_digest, self.store.ti.max_tries)
        if submission is not None and step in (Step.CHECK, Step.SEARCH):
            submission, overdub_id, seen = self._check_remote(submission)
            step = next_step(submission, body_digest, self.store.ti.max_tries, seen)
            if step is Step.REATTACH:
                log.info("Reattached to overdub %s, which an earlier try of this task started.", overdub_id)
                self._reattach(submission, overdub_id)
                return overdub_id
        if check is not None:
            check()
        if reuse and (found := self._find_reusable(body_digest)):
            self.store.is_completed = found.is_completed
            self._reattach(self.store.new(body_digest, submission), found.overdub_id)
            return found.overdub_id
        if submission is None or step is Step.SUBMIT_NEW:
            if submission is not None and submission.overdub_id and not submission.delivered:
                log.info(
                    "Overdub %s of an earlier try is left unchanged; submitting a new one.",
                    submission.overdub_id,
                )
            submission = self.store.new(body_digest, submission)
        return self._send(submission)

    def _send(self, submission: Submission) -> str:
        """Upload and create; once more if HeyGen has forgotten what an earlier try uploaded."""
        try:
            return self._create(submission)
        except HeyGenNotFoundError as error:
            if not self.files or error.code != "asset_not_found" or error.outcome_unknown:
                raise
            log.info("%s The files are uploaded again.", error)
        submission = self.store.new(submission.digest, submission).model_copy(update={"assets": {}})
        return self._create(submission, generation=2)

    def _create(self, submission: Submission, generation: int = 1) -> str:
        submission = _upload(self.files.values(), submission, self.hook, self.store, generation)
        asset_ids = {name: submission.assets[file.digest] for name, file in self.files.items()}
        request = _with_assets(self.request, asset_ids)
        if submission.sent and submission.labels:
            # An earlier attempt may still take effect, and a search needs the callback_id of that attempt.
            request = request.model_copy(update={"callback_id": submission.callback_id})
        submission = before = submission.model_copy(update=labels(request))
        self.hook.created_under = submission.resource

        def record_attempt() -> None:
            # The next try must know that the request may have been sent, when, and under which resource.
            nonlocal submission
            sent = {"sent": True, "resource": self.hook.known_resource, "account": self.hook.account}
            submission = submission.model_copy(update=sent)
            self.store.save(submission, sent_at=time.time())

        try:
            overdub_id = self.hook.create_overdub(
                request, idempotency_key=submission.key, before_sending=record_attempt
            )
        except HeyGenError as error:
            error.no_slot = error.status_code == 429 and not error.outcome_unknown
            # Even if this try started nothing, an earlier one may have: keep its record.
            if error.outcome_unknown:
                reported = isinstance(error, HeyGenOutcomeUnknownError)
                self.store.save(submission, sent=True, sent_at=time.time(), doubt_reported=reported)
            else:
                if isinstance(error, HeyGenPermanentError) and not before.sent:
                    # HeyGen may return a stored rejection to the same key, even if its cause is mended.
                    before = before.model_copy(update={"key": self.store.new(before.digest, None).key})
                self.store.save(before)
            raise
        found = {"resource": self.hook.known_resource, "overdub_id": overdub_id, "answered": time.time()}
        self.store.save(submission, sent=True, **found)
        metrics.submitted(self.store.ti)  # after writing, so that no retry counts it again
        title = f" {redact_urls(request.title)!r}" if request.title else ""
        log.info("Started overdub %s%s, mode %s.", overdub_id, title, request.mode or "speed")
        return overdub_id

    def _reattach(self, submission: Submission, overdub_id: str) -> None:
        answered = submission.answered or time.time()
        found = {"overdub_id": overdub_id, "answered": answered, "resource": self.hook.known_resource}
        found["account"] = submission.account or self.hook.account
        submission = submission.model_copy(update=found)
        self.store.save(self._relabel(submission, overdub_id))
        metrics.reattached(self.store.ti)

    def _find_reusable(self, body_digest: str) -> Overdub | None:
        """
        Return an overdub of the same request that has not failed and is younger than three days.

        It is found by the provider's ``callback_id``. HeyGen does not document the order of its list, so the
        list is read until as many consecutive overdubs as fit on a page are older.
        """
        usable = (OverdubStatus.PENDING, OverdubStatus.RUNNING, OverdubStatus.COMPLETED)
        oldest, in_a_row = time.time() - REUSE_SECONDS, 0
        for overdub in self.hook.iter_overdubs():
            if (overdub.created_at or 0.0) < oldest:
                in_a_row += 1
                if in_a_row == MAX_PAGE_SIZE:
                    break
                continue
            in_a_row = 0
            same = (overdub.callback_id or "").startswith(content_prefix(body_digest))
            if same and overdub.status in usable:
                log.info(
                    "Reattached to overdub %s %r, mode %s, which a task or run with the same request started"
                    " %s ago.",
                    overdub.overdub_id,
                    redact_urls(overdub.title or ""),
                    self.request.mode or "speed",
                    waiting.duration_text(time.time() - (overdub.created_at or 0)),
                )
                return overdub
        return None

    def _check_remote(self, submission: Submission) -> tuple[Submission, str, RemoteState]:
        """Check an earlier submission at HeyGen; return it with the overdub's id, if any, and the state."""
        self.hook.created_under = submission.resource
        # A user who clears the task has read that the overdub may be in another account.
        is_retry = submission.max_tries == self.store.ti.max_tries
        other_account = is_retry and submission.account not in (None, self.hook.account)
        if submission.overdub_id is not None:
            # A failed poll is no reason to submit again: the wait continues after failed polls.
            until = submission.answered + waiting.NOT_FOUND_GRACE_SECONDS
            watch = waiting.OverdubWait(
                submission.overdub_id,
                poke_interval=waiting.GONE_SECONDS,
                deadline=None,
                not_found_until=until,
                log=log,
            )
            watch.account_changed = other_account
            end = watch.poll_twice(self.hook)
            status = end["status"] if isinstance(end, dict) else ""
            self.store.is_completed = status == "completed"
            seen = {"failed": RemoteState.FAILED, "gone": RemoteState.MISSING}.get(status, RemoteState.USABLE)
            return submission, submission.overdub_id, seen
        request = self.request
        if submission.labels:  # unknown without a store
            sent = {"title": submission.title, "callback_id": submission.callback_id}
            request = request.model_copy(update=sent)
        try:
            overdub = self.hook.find_created(
                request,
                submission.key,
                since=submission.began,
                sent_at=submission.sent_at,
                skew=CLOCK_SKEW_SECONDS,
            )
        except HeyGenOutcomeUnknownError:
            if is_retry or not submission.doubt_reported:
                self.store.save(submission, doubt_reported=True)
                raise
            # A user has read this error and cleared the task, which confirms that no candidate belongs to it.
            confirmed = {"sent": False, "doubt_reported": False}
            return submission.model_copy(update=confirmed), "", RemoteState.MISSING
        if overdub is None and other_account:
            raise HeyGenOutcomeUnknownError(
                "A create request was sent, its response was lost, and the host or the password of Airflow"
                f" connection '{self.hook.heygen_conn_id}' has changed since. HeyGen's list does not have it:"
                " it may be in another account. Nothing more was sent. Restore the connection, or clear the"
                " task to send the request again.",
                outcome_unknown=True,
            )
        if overdub is None:
            return submission, "", RemoteState.MISSING
        self.store.is_completed = overdub.is_completed
        failed = overdub.status == OverdubStatus.FAILED
        return submission, overdub.overdub_id, RemoteState.FAILED if failed else RemoteState.USABLE

    def _relabel(self, submission: Submission, overdub_id: str) -> Submission:
        """Rename a reattached overdub if the title has changed; return the submission with the new title."""
        if not submission.labels:
            return submission  # the labels of the request are unknown
        wanted = labels(self.request)
        if wanted["labels"] != submission.labels or wanted["callback_id"] != submission.callback_id:
            log.warning(
                "'callback_url', 'callback_id' or 'folder_id' has changed since overdub %s was started;"
                " HeyGen cannot change them.",
                overdub_id,
            )
        title = wanted["title"]
        if title in (None, submission.title):
            return submission
        try:
            self.hook.update_overdub(overdub_id, title)
        except HeyGenError as error:
            log.warning("Overdub %s keeps its title: %s", overdub_id, error)
            return submission
        log.info("Renamed overdub %s to %r.", overdub_id, redact_urls(title))
        return submission.model_copy(update={"title": title})


def upload_once(file: Source, hook: HeyGenHook, store: SubmissionStore) -> str:
    """Return the asset id of a file, which is uploaded unless an earlier try has uploaded it."""
    submission = store.load(file.digest)
    if submission is None or next_step(submission, file.digest, store.ti.max_tries) is Step.SUBMIT_NEW:
        submission = store.new(file.digest, submission)
    return _upload([file], submission, hook, store).assets[file.digest]


def _upload(
    files: Collection[Source],
    submission: Submission,
    hook: HeyGenHook,
    store: SubmissionStore,
    generation: int = 1,
) -> Submission:
    """Upload the files that are not uploaded yet; return the submission with all of its assets."""
    seen = {file.fingerprint: (file.digest, file.mime_type) for file in files if file.fingerprint}
    submission = submission.model_copy(update={"files": seen, "assets": store.reusable(submission)})
    for file in files:
        if file.digest in submission.assets:
            asset_id = submission.assets[file.digest]
            log.info("Uploaded before (%s): %s, as asset %s.", size_text(file.size), file, asset_id)
            continue
        # Written before the request, because the next try must send the file under the same key.
        store.save(submission)
        key = upload_key(submission, file.digest, store.ti.max_tries, generation)
        began = time.monotonic()
        asset = hook.upload_asset(file, idempotency_key=key)
        log.info(
            "Uploaded %s in %.1f s: %s, %s, as asset %s.",
            size_text(file.size),
            time.monotonic() - began,
            file,
            file.mime_type,
            asset.asset_id,
        )
        assets = {**submission.assets, file.digest: asset.asset_id}
        submission = submission.model_copy(update={"assets": assets})
        store.save(submission)
    return submission


def _with_assets(request: CreateOverdubRequest, asset_ids: Mapping[str, str]) -> CreateOverdubRequest:
    media = {name: MediaAsset(type="asset_id", asset_id=asset_id) for name, asset_id in asset_ids.items()}
    return request.model_copy(update=media)
