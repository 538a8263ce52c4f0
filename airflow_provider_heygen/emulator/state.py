"""All the emulated HeyGen knows: settings, assets, jobs and their timelines, faults, what it was asked."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from airflow_provider_heygen.emulator.contract import ApiError, invalid

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_provider_heygen.emulator.contract import CreateJob

Resource = Literal["overdubs", "lipsyncs"]
Status = Literal["pending", "running", "completed", "failed"]

IDEMPOTENCY_SECONDS = 24 * 3600
LOG_LENGTH = 10_000


class Behaviour(BaseModel):
    """How this HeyGen behaves; may be changed while it runs. Defaults: the likeliest reality, only faster.

    All times are seconds. A job keeps the timeline, outcome and failure text it was created with.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    job_seconds: float | None = Field(
        default=None,
        ge=0,
        description="life of a job: a quarter pending, the rest running (instead of the next two)",
    )
    pending_seconds: float = Field(default=0.5, ge=0, description="how long a new job is pending")
    running_seconds: float = Field(
        default=1.5, ge=0, description="how long a job runs, or longer if ffmpeg does"
    )
    fail_jobs: int = Field(default=0, ge=0, description="how many of the next jobs will fail")
    failure_message: str | None = Field(
        default="No speaker detected in the video", description="of jobs made to fail"
    )
    fetch_urls: bool = Field(
        default=False, description="download url inputs; else a short test clip takes their place"
    )
    link_seconds: float = Field(default=7 * 86400, description="life of presigned links")
    upload_seconds: float = Field(default=3600, description="life of the URL of a direct upload")
    max_upload_bytes: int = Field(
        default=209_715_200, ge=1, description="largest direct upload; 200 MB in HeyGen's own uploader"
    )
    concurrent_jobs: int | None = Field(
        default=None, ge=0, description="active jobs above which create answers 429"
    )
    retry_after: int = Field(default=10, ge=0, description="Retry-After of that 429, in seconds")
    create_latency: float = Field(default=0, ge=0, description="seconds a create takes to answer")
    get_lag: float = Field(
        default=0, ge=0, description="seconds after its creation during which GET of a job is 404"
    )
    list_lag: float = Field(
        default=0, ge=0, description="seconds by which statuses in the list are behind those of GET"
    )
    list_order: Literal["desc", "asc", "shuffle"] = Field(
        default="desc", description="order of the list by age"
    )
    callback_id_in_list: bool = Field(default=True, description="list rows have callback_id")
    id_field: Literal["route", "overdub_id", "lipsync_id", "id"] = Field(
        default="route",
        description="name of the id in a create's answer; route: overdub_id or lipsync_id by path",
    )
    resources: frozenset[Resource] = Field(
        default=frozenset({"overdubs", "lipsyncs"}), description="resource names served; others are 404"
    )
    idempotency: bool = Field(default=True, description="honour Idempotency-Key")
    unknown_status: str | None = Field(default=None, description="a status word to use instead of running")
    null_video_url: int = Field(
        default=0, ge=0, description="first answers per completed job that lack video_url"
    )
    extra_members: bool = Field(
        default=False, description="put unknown members into every object of every answer"
    )
    html_errors: bool = Field(default=False, description="errors come as HTML pages, as from a gateway")

    @property
    def timeline(self) -> tuple[float, float]:
        """Seconds pending, seconds running."""
        if self.job_seconds is None:
            return self.pending_seconds, self.running_seconds
        return self.job_seconds / 4, self.job_seconds * 3 / 4

    def update(self, changes: dict[str, Any]) -> None:
        """Change some settings, or none if one of them is wrong (``ValidationError``)."""
        valid = Behaviour.model_validate(self.model_dump() | changes)
        for name in changes:
            setattr(self, name, getattr(valid, name))


class Fault(BaseModel):
    """Something that goes wrong with the next ``count`` requests that match.

    With ``status``, ``body`` or ``html`` the request has no effect and gets that answer. Otherwise it takes
    effect, and the answer is delayed, cut or lost.
    """

    model_config = ConfigDict(extra="forbid")

    method: str | None = Field(default=None, description="HTTP method; None: any")
    path: str = Field(default="/", description="regular expression that the path must start with")
    count: int = Field(default=1, ge=1, description="how many requests it hits")
    latency: float = Field(default=0, ge=0, description="seconds the answer is held back")
    status: int | None = Field(
        default=None, ge=200, le=599, description="HTTP status; 200 with body, 502 with html"
    )
    code: str | None = Field(default=None, description="error code; by default the usual one of that status")
    message: str = Field(default="A fault was asked for", description="error message")
    headers: dict[str, str] = Field(default={}, description="headers for that answer, such as Retry-After")
    body: str | None = Field(default=None, description="the whole body, instead of an error envelope")
    html: bool = Field(default=False, description="the body is a gateway's HTML page")
    truncate: int | None = Field(
        default=None, ge=0, description="cut the body to so many bytes, Content-Length too"
    )
    drop: Literal["before", "after"] | None = Field(
        default=None,
        description="close the TCP connection unanswered, before or after the request took effect",
    )
    drop_after_bytes: int | None = Field(
        default=None, ge=0, description="close it after so many bytes of the body"
    )

    @field_validator("path")
    @classmethod
    def _compiles(cls, path: str) -> str:
        try:
            re.compile(path)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return path

    def matches(self, method: str, path: str) -> bool:
        """Whether it strikes this request."""
        return self.method in (None, method) and re.match(self.path, path) is not None


@dataclass
class RequestRecord:
    """One request as it was seen, and the status it got; None when it got no answer."""

    method: str
    path: str
    route: str
    query: str
    headers: dict[str, str]
    credential: Literal["api_key", "oauth", "both"] | None
    idempotency_key: str | None
    at: float
    status: int | None = None


@dataclass
class Asset:
    """A file given to HeyGen, or still to be uploaded by PUT; ``path`` is None until its bytes are there."""

    id: str
    mime_type: str
    size_bytes: int
    path: Path | None = None
    ready: bool = True
    sha256: str | None = None
    checksum_sha256: str | None = None


@dataclass
class Job:
    """One overdub (or lipsync: the same). Times are Unix seconds."""

    id: str
    number: int
    resource: str
    request: CreateJob
    base_url: str
    idempotency_key: str | None
    pending_seconds: float
    running_seconds: float
    outcome: Literal["completed", "failed"]
    failure_message: str | None
    null_video_urls: int
    title: str | None
    created_at: float = field(default_factory=time.time)
    rendered_at: float | None = None
    output: Path | None = None
    duration: float | None = None
    deleted: bool = False
    callback_delivered: bool = False
    forced: Status | None = None
    forced_at: float = 0.0
    forcing: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    work: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def status(self) -> Status:
        """What a GET would say now."""
        return self.status_at(time.time())

    @property
    def ended(self) -> bool:
        """Completed or failed."""
        return self.status in ("completed", "failed")

    @property
    def ends_at(self) -> float | None:
        """When it is completed or failed; None while that is open."""
        if self.rendered_at is None:
            return None
        return max(self.rendered_at, self.created_at + self.pending_seconds + self.running_seconds)

    def status_at(self, at: float) -> Status:
        """Its status at some time, past or present."""
        if self.forced is not None and at >= self.forced_at:
            return self.forced
        if self.ends_at is not None and at >= self.ends_at:
            return self.outcome
        return "pending" if at < self.created_at + self.pending_seconds else "running"

    def force(self, status: Status, failure_message: str | None = None) -> None:
        """Give it a status that stays until the next one is forced."""
        self.forced, self.forced_at = status, time.time()
        if status == "failed":
            self.failure_message = failure_message
        self.forcing.set()

    def fail(self, message: str) -> None:
        """The work itself failed."""
        self.outcome, self.failure_message = "failed", message


@dataclass
class BatchItem:
    """One entry of a batch: a job, or the error that kept it from becoming one."""

    job: Job | None
    error: dict[str, Any] | None = None


@dataclass
class Batch:
    """Lipsyncs created in one call."""

    id: str
    title: str | None
    items: list[BatchItem]
    created_at: float = field(default_factory=time.time)
    work: asyncio.Task[None] | None = field(default=None, repr=False)


class State:
    """Everything in memory, and the one place that hands out ids, links and cursors."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self._initial = behaviour.model_copy()
        self._secret = secrets.token_bytes(16)
        self.created: list[Job] = []
        self.batches: dict[str, Batch] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything, and behave as in the beginning again."""
        for work in [job.work for job in self.created] + [batch.work for batch in self.batches.values()]:
            if work is not None:
                work.cancel()
        self.behaviour.update(self._initial.model_dump())
        self.created = []
        self.assets: dict[str, Asset] = {}
        self.batches = {}
        self.faults: list[Fault] = []
        # (credential, path, key) -> when, and (status, body), or None while the first request is running.
        self.idempotency: dict[tuple[str, str, str], tuple[float, tuple[int, bytes] | None]] = {}
        self.requests: deque[RequestRecord] = deque(maxlen=LOG_LENGTH)
        self.requests_by_route: Counter[str] = Counter()
        self._jobs: dict[str, Job] = {}

    # Jobs

    @property
    def active_jobs(self) -> int:
        """Jobs pending or running."""
        return sum(not job.ended for job in self._jobs.values())

    def create_job(
        self, resource: str, request: CreateJob, base_url: str, idempotency_key: str | None
    ) -> Job:
        """Accept a job; 404 for an unknown asset, 429 above the ceiling."""
        for source in (request.video, request.audio):
            if source.asset_id is not None and not self.asset(source.asset_id).ready:
                raise ApiError(409, "asset_not_available", f"Asset {source.asset_id} is not uploaded yet.")
        ceiling = self.behaviour.concurrent_jobs
        if ceiling is not None and self.active_jobs >= ceiling:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                "Too many requests. Retry after the duration specified in the Retry-After header.",
                headers={"Retry-After": str(self.behaviour.retry_after)},
            )
        failing = self.behaviour.fail_jobs > 0
        if failing:
            self.behaviour.fail_jobs -= 1
        pending, running = self.behaviour.timeline
        job = Job(
            id=new_id("od" if resource == "overdubs" else "ls"),
            number=len(self.created),
            resource=resource,
            request=request,
            base_url=base_url,
            idempotency_key=idempotency_key,
            pending_seconds=pending,
            running_seconds=running,
            outcome="failed" if failing else "completed",
            failure_message=self.behaviour.failure_message if failing else None,
            null_video_urls=self.behaviour.null_video_url,
            title=request.title,
        )
        self.created.append(job)
        self._jobs[job.id] = job
        return job

    def job(self, job_id: str) -> Job:
        """The job, or 404."""
        if job_id not in self._jobs:
            raise ApiError(404, "not_found", f"No overdub or lipsync {job_id}.")
        return self._jobs[job_id]

    def find_job(self, job_id: str) -> Job | None:
        """The job, or None."""
        return self._jobs.get(job_id)

    def delete_job(self, job: Job) -> None:
        """Remove it with its files; its work is dropped and no callback is sent."""
        del self._jobs[job.id]
        job.deleted = True
        if job.work is not None:
            job.work.cancel()

    def page(self, limit: int, token: str | None) -> tuple[list[Job], str | None]:
        """One page and the cursor of the next. A cursor is a place in the order, so inserts shift nothing."""
        order = self.behaviour.list_order

        def place(job: Job) -> tuple[Any, ...]:
            if order == "shuffle":
                return (hashlib.sha256(job.id.encode()).hexdigest(),)
            return (job.number if order == "asc" else -job.number,)

        jobs = sorted(self._jobs.values(), key=place)
        if token is not None:
            after_order, *after = self.read_token(token)
            if after_order != order:
                raise invalid("token: not a cursor of this list", "token")
            jobs = [job for job in jobs if place(job) > tuple(after)]
        more = len(jobs) > limit
        jobs = jobs[:limit]
        return jobs, self.make_token(order, *place(jobs[-1])) if more else None

    # Assets

    def asset(self, asset_id: str) -> Asset:
        """The asset, or 404."""
        if asset_id not in self.assets:
            raise ApiError(404, "asset_not_found", f"No asset {asset_id}.")
        return self.assets[asset_id]

    def file(self, name: str) -> Path | None:
        """The file behind a link, while what it belongs to exists."""
        owner = name.partition(".")[0]
        if owner in self._jobs:
            return self._jobs[owner].output
        return self.assets[owner].path if owner in self.assets else None

    # Faults and the log

    def next_fault(self, method: str, path: str) -> Fault | None:
        """The first fault that strikes this request; it is used up by that."""
        for fault in self.faults:
            if fault.matches(method, path):
                fault.count -= 1
                if not fault.count:
                    self.faults.remove(fault)
                return fault
        return None

    def record(self, request: RequestRecord) -> None:
        """Log and count a request."""
        self.requests.append(request)
        self.requests_by_route[f"{request.method} {request.route}"] += 1

    # Signatures

    def presign(self, method: str, url: str, path: str, seconds: float) -> str:
        """A link to ``path`` that works for so many seconds."""
        expires = f"{time.time() + seconds:.6f}"
        return f"{url}{path}?Expires={expires}&Signature={self._sign(method, path, expires)}"

    def link_works(self, method: str, path: str, expires: str, signature: str) -> bool:
        """Whether the signature is ours and the time not over."""
        good = hmac.compare_digest(signature.encode(), self._sign(method, path, expires).encode())
        return good and time.time() < float(expires)

    def make_token(self, *place: Any) -> str:
        """An opaque cursor."""
        text = json.dumps(place)
        return base64.urlsafe_b64encode(f"{self._sign('token', text)[:12]}{text}".encode()).decode()

    def read_token(self, token: str) -> list[Any]:
        """What is in a cursor, or 400 when it is not one of ours."""
        try:
            text = base64.urlsafe_b64decode(token.encode("ascii")).decode()
        except ValueError as error:
            raise invalid("token: not a cursor of this list", "token") from error
        if not hmac.compare_digest(text[:12].encode(), self._sign("token", text[12:])[:12].encode()):
            raise invalid("token: not a cursor of this list", "token")
        return list(json.loads(text[12:]))

    def _sign(self, *parts: str) -> str:
        return hmac.new(self._secret, "\n".join(parts).encode(), hashlib.sha256).hexdigest()


def new_id(prefix: str) -> str:
    """Unguessable, and safe in a URL and as a file name."""
    return f"{prefix}_{secrets.token_hex(8)}"
