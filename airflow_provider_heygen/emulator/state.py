"""The state of the emulated HeyGen: settings, assets, jobs and their timelines, faults, a request log."""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import parse_qsl, urlsplit

from fastapi import Depends
from fastapi.requests import Request
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
)

from airflow_provider_heygen.emulator.contract import (
    MAX_INPUT_BYTES,
    ApiError,
    Body,
    CreateJob,
    invalid,
    is_web_address,
    mime_type_of,
    too_large,
)

Status = Literal["pending", "running", "completed", "failed"]
KeyScope = Annotated[str, StringConstraints(pattern=r"^[a-z_*]+:(read|write|\*)$")]

IDEMPOTENCY_SECONDS = 24 * 3600
LOG_LENGTH = 10_000


class Behaviour(BaseModel):
    """
    How the emulator behaves; may be changed while it runs. By default as HeyGen probably does, but faster.

    All times are seconds. A job keeps the timeline, outcome and failure text it was created with.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)

    job_seconds: NonNegativeFloat | None = None
    """life of a job: a quarter pending, the rest running (instead of the next two)"""
    pending_seconds: NonNegativeFloat = 0.5
    """how long a new job is pending"""
    running_seconds: NonNegativeFloat = 1.5
    """how long a job runs, or longer if ffmpeg does"""
    fail_jobs: NonNegativeInt = 0
    """how many of the next jobs will fail"""
    failure_message: str | None = "No speaker detected in the video"
    """of jobs made to fail"""
    fetch_urls: bool = False
    """download url inputs; otherwise, a short test clip is used"""
    link_seconds: float = 7 * 86400
    """life of presigned URLs"""
    upload_seconds: float = 3600
    """life of the URL of a direct upload"""
    max_upload_bytes: PositiveInt = 209_715_200
    """largest direct upload; 200 MB in HeyGen's own uploader"""
    concurrent_jobs: NonNegativeInt | None = None
    """active jobs above which a create request gets 429"""
    foreign_jobs: NonNegativeInt = 0
    """how many of those are jobs of HeyGen's other products, which no list shows"""
    retry_after: NonNegativeInt = 10
    """Retry-After of that 429, in seconds"""
    create_latency: NonNegativeFloat = 0
    """seconds until the response to a create request"""
    get_lag: NonNegativeFloat = 0
    """seconds after its creation during which GET of a job is 404"""
    list_lag: NonNegativeFloat = 0
    """seconds by which statuses in the list are behind those of GET"""
    list_order: Literal["desc", "asc", "shuffle"] = "desc"
    """order of the list by age"""
    callback_id_in_list: bool = True
    """list rows have callback_id"""
    id_field: Literal["route", "overdub_id", "lipsync_id", "id"] = "route"
    """name of the id in the response to a create request; route: overdub_id or lipsync_id by path"""
    resources: Literal["both", "overdubs", "lipsyncs"] = "both"
    """resource names served; the other is 404"""
    missing_resource: Literal["envelope", "page"] = "envelope"
    """whether that 404 has HeyGen's error envelope or is a gateway's HTML page"""
    unknown_fields: Literal["reject", "ignore"] = "reject"
    """what is done with body fields that HeyGen does not have"""
    key_scopes: tuple[KeyScope, ...] = ("*:*",)
    """scopes of the API key, such as lipsync:write, assets:write, account:read"""
    key_expires_at: float | None = None
    """when the API key expires, in Unix seconds"""
    idempotency: bool = True
    """honour Idempotency-Key"""
    unknown_status: str | None = None
    """a status to use instead of running"""
    null_video_url: NonNegativeInt = 0
    """first responses per completed job that lack video_url"""
    extra_members: bool = False
    """put unknown members into every object of every response"""
    html_errors: bool = False
    """errors come as HTML pages, as from a gateway"""

    @property
    def timeline(self) -> tuple[float, float]:
        """Seconds pending and seconds running."""
        if self.job_seconds is None:
            return self.pending_seconds, self.running_seconds
        return self.job_seconds / 4, self.job_seconds * 3 / 4

    def allows(self, area: str, action: str) -> bool:
        """Check whether the scopes of the API key cover ``area:action``; write includes read."""
        granted = [scope.split(":") for scope in self.key_scopes]
        return any(at in (area, "*") and may in (action, "*", "write") for at, may in granted)

    def update(self, changes: dict[str, Any]) -> None:
        """Change some settings, or none if one of them is wrong (``ValidationError``)."""
        valid = Behaviour.model_validate(self.model_dump() | changes)
        for name in changes:
            setattr(self, name, getattr(valid, name))


class Fault(BaseModel):
    """
    A fault of the next ``count`` requests that match.

    With ``status``, ``body`` or ``html``, the request has no effect and gets that response. Otherwise, it has
    its effect, and the response is delayed, cut or lost.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    method: str | None = None
    """HTTP method; None: any"""
    path: re.Pattern[str] = re.compile("/")
    """regular expression that the path must start with"""
    count: PositiveInt = 1
    """how many requests it hits"""
    latency: NonNegativeFloat = 0
    """seconds the response is held back"""
    status: Annotated[int, Field(ge=200, le=599)] | None = None
    """HTTP status; 200 with body, 502 with html"""
    code: str | None = None
    """error code; by default the usual one of that status"""
    message: str = "A fault was asked for"
    """error message"""
    headers: dict[str, str] = {}
    """headers for that response, such as Retry-After"""
    body: str | None = None
    """the whole body, instead of an error envelope"""
    html: bool = False
    """the body is a gateway's HTML page"""
    truncate: NonNegativeInt | None = None
    """cut the body to so many bytes, Content-Length too"""
    drop: Literal["before", "after"] | None = None
    """close the TCP connection without a response, before or after the request took effect"""
    drop_after_bytes: NonNegativeInt | None = None
    """close it after so many bytes of the body"""

    def matches(self, method: str, path: str) -> bool:
        """Check whether the fault applies to a request."""
        return self.method in (None, method) and self.path.match(path) is not None


@dataclass
class RequestRecord:
    """A request as it was received, and the status of its response; None without a response."""

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
    """A file that was uploaded, or that is to be uploaded by PUT; ``path`` is None until then."""

    id: str
    name: str
    mime_type: str
    size_bytes: int
    path: Path | None = None
    ready: bool = True
    sha256: str | None = None
    checksum_sha256: str | None = None
    uploaded_at: float = field(default_factory=time.time)


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
    null_video_urls: int
    title: str | None
    outcome: Literal["completed", "failed"] = "completed"
    failure_message: str | None = None
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
        """Status that a GET would return now."""
        return self.status_at(time.time())

    @property
    def ended(self) -> bool:
        """Whether the job is completed or failed."""
        return self.status in ("completed", "failed")

    @property
    def ends_at(self) -> float | None:
        """Time at which the job ends; None while it is being rendered."""
        if self.rendered_at is None:
            return None
        return max(self.rendered_at, self.created_at + self.pending_seconds + self.running_seconds)

    def status_at(self, at: float) -> Status:
        """Return the status of the job at a time in the past or now."""
        if self.forced is not None and at >= self.forced_at:
            return self.forced
        if self.ends_at is not None and at >= self.ends_at:
            return self.outcome
        return "pending" if at < self.created_at + self.pending_seconds else "running"

    def force(self, status: Status, failure_message: str | None = None) -> None:
        """Set a status that stays until another is forced."""
        self.forced, self.forced_at = status, time.time()
        if status == "failed":
            self.failure_message = failure_message
        self.forcing.set()

    def fail(self, message: str | None) -> None:
        """Make the job end as failed."""
        self.outcome, self.failure_message = "failed", message


class State:
    """All state in memory; also issues URLs and cursors."""

    def __init__(self, behaviour: Behaviour, credentials: Mapping[str, str] | None = None) -> None:
        self.behaviour = behaviour
        self.credentials = dict(credentials or {})
        self.directory = Path()
        self.started_at = time.time()
        self._initial = behaviour.model_copy()
        self._secret = secrets.token_bytes(16)
        self.created: list[Job] = []
        self.reset()

    def reset(self) -> None:
        """Remove all state, and restore the initial behaviour."""
        for job in self.created:
            if job.work is not None:
                job.work.cancel()
        self.behaviour.update(self._initial.model_dump())
        self.created = []
        self.assets: dict[str, Asset] = {}
        self.faults: list[Fault] = []
        # (credential, path, key) -> time and response; None while the first request is running.
        self.idempotency: dict[tuple[str, str, str], tuple[float, bytes | None]] = {}
        self.requests: deque[RequestRecord] = deque(maxlen=LOG_LENGTH)
        self.requests_by_route: Counter[str] = Counter()
        self.jobs: dict[str, Job] = {}

    # Jobs

    def check_known(self, body: Body) -> None:
        """Raise the 400 that names the first unknown field, unless those are ignored."""
        if self.behaviour.unknown_fields == "reject":
            body.check_known()

    def create_job(
        self, resource: str, request: CreateJob, base_url: str, idempotency_key: str | None
    ) -> Job:
        """Create a job, or raise the 4xx for a source that HeyGen rejects or 429 above the limit."""
        for kind, source in (("video", request.video), ("audio", request.audio)):
            if source.asset_id is not None:
                if not self.asset(source.asset_id).ready:
                    raise ApiError(
                        409, "asset_not_available", f"Asset {source.asset_id} is not uploaded yet."
                    )
            elif source.url is not None:
                self._check_url(kind, source.url, base_url)
        ceiling = self.behaviour.concurrent_jobs
        active = self.behaviour.foreign_jobs + sum(not job.ended for job in self.jobs.values())
        if ceiling is not None and active >= ceiling:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                "Too many requests. Retry after the duration specified in the Retry-After header.",
                headers={"Retry-After": str(self.behaviour.retry_after)},
            )
        job = Job(
            new_id("od" if resource == "overdubs" else "ls"),
            len(self.created),
            resource,
            request,
            base_url,
            idempotency_key,
            *self.behaviour.timeline,
            null_video_urls=self.behaviour.null_video_url,
            title=request.title,
        )
        if self.behaviour.fail_jobs:
            self.behaviour.fail_jobs -= 1
            job.fail(self.behaviour.failure_message)
        self.created.append(job)
        self.jobs[job.id] = job
        return job

    def job(self, job_id: str) -> Job:
        """Return the job, or raise 404."""
        if job_id not in self.jobs:
            raise ApiError(404, "not_found", f"No overdub or lipsync {job_id}.")
        return self.jobs[job_id]

    def delete_job(self, job: Job) -> None:
        """Remove a job with its files; its work is cancelled and no callback is sent."""
        del self.jobs[job.id]
        job.deleted = True
        if job.work is not None:
            job.work.cancel()

    def page(self, limit: int, token: str | None) -> tuple[list[Job], str | None]:
        """Return one page and the cursor of the next one, which stays valid when jobs are added."""
        order = self.behaviour.list_order

        def place(job: Job) -> str:
            number = job.number if order == "asc" else 10**9 - job.number
            return hashlib.sha256(job.id.encode()).hexdigest() if order == "shuffle" else f"{number:010}"

        jobs = sorted(self.jobs.values(), key=place)
        if token is not None:
            after_order, _, after = token.partition("+")
            if after_order != order:
                raise invalid("token: not a cursor of this list", "token")
            jobs = [job for job in jobs if place(job) > after]
        page = jobs[:limit]
        return page, f"{order}+{place(page[-1])}" if len(jobs) > limit else None

    # Assets

    def asset(self, asset_id: str) -> Asset:
        """Return the asset, or raise 404."""
        if asset_id not in self.assets:
            raise ApiError(404, "asset_not_found", f"No asset {asset_id}.")
        return self.assets[asset_id]

    def file(self, name: str) -> Path | None:
        """Return the file of a job or an asset by its name, or None if either is missing."""
        owner = name.partition(".")[0]
        if owner in self.jobs:
            return self.jobs[owner].output
        return self.assets[owner].path if owner in self.assets else None

    def file_at(self, url: str) -> Path | None:
        """Return the file behind a presigned URL, or None if the URL is invalid or has expired."""
        parts = urlsplit(url)
        if not self.is_signed("GET", parts.path, dict(parse_qsl(parts.query))):
            return None
        return self.file(parts.path.removeprefix("/files/"))

    def _check_url(self, kind: str, url: str, base_url: str) -> None:
        # Only the emulator's own URLs need not be https, and only for them the size is known.
        if url.startswith(f"{base_url}/"):
            path = self.file_at(url)
            if path is not None and path.stat().st_size > MAX_INPUT_BYTES:
                raise invalid(too_large(mime_type_of(urlsplit(url).path)), kind)
        elif not is_web_address(url, "https"):
            raise invalid(f"{kind}: url must be a public https URL", kind)

    # Faults and the log

    def next_fault(self, method: str, path: str) -> Fault | None:
        """Return the first fault that applies to a request, and decrease its count."""
        fault = next((fault for fault in self.faults if fault.matches(method, path)), None)
        if fault is not None:
            fault.count -= 1
            if not fault.count:
                self.faults.remove(fault)
        return fault

    # Signatures

    def presign(self, method: str, url: str, path: str) -> str:
        """Return a URL to read ``path`` by GET, or to write it by PUT."""
        seconds = self.behaviour.upload_seconds if method == "PUT" else self.behaviour.link_seconds
        expires = f"{time.time() + seconds:.6f}"
        return f"{url}{path}?Expires={expires}&Signature={self._sign(method, path, expires)}"

    def is_signed(self, method: str, path: str, query: Mapping[str, str]) -> bool:
        """Check that the signature is right and has not expired."""
        expires, signature = query.get("Expires", ""), query.get("Signature", "")
        good = hmac.compare_digest(signature.encode(), self._sign(method, path, expires).encode())
        return good and time.time() < float(expires)

    def _sign(self, *parts: str) -> str:
        return hmac.new(self._secret, "\n".join(parts).encode(), hashlib.sha256).hexdigest()


async def get_state(request: Request) -> State:
    """Return the state behind a request; a dependency of routes."""
    return cast("State", request.app.state.heygen)


StateHere = Annotated[State, Depends(get_state)]


def new_id(prefix: str) -> str:
    """Return a random id that is safe in a URL and as a file name."""
    return f"{prefix}_{secrets.token_hex(8)}"
