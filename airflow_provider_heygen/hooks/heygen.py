"""
The two transports over :mod:`airflow_provider_heygen.api`: requests on the worker, aiohttp in the triggerer.

Both send the same calls and read the answers with the same code; this module adds connections, sessions,
timeouts and retries.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import ssl
import time
import uuid
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import aiohttp
import certifi
import requests
import tenacity
from airflow.providers.common.compat.sdk import get_hook_lineage_collector
from airflow.providers.http.hooks.http import HttpHook
from requests.auth import AuthBase
from requests.exceptions import (
    ConnectionError,
    ConnectTimeout,
    InvalidHeader,
    InvalidProxyURL,
    InvalidSchema,
    InvalidURL,
    RequestException,
    SSLError,
)
from requests_toolbelt import MultipartEncoder
from urllib3.exceptions import NameResolutionError, NewConnectionError

from airflow_provider_heygen import __version__, api, download, lineage, media, upload
from airflow_provider_heygen.connection import HeyGenConnection
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenOutcomeUnknownError,
    HeyGenOverdubFailedError,
    HeyGenPermanentError,
    HeyGenTransientError,
)
from airflow_provider_heygen.waiting import failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
    from os import PathLike

    from airflow.providers.common.compat.sdk import ObjectStoragePath

T = TypeVar("T")

# HeyGen's gateway is known to refuse the default agents of HTTP libraries (contract notes, section 2).
USER_AGENT = f"airflow-provider-heygen/{__version__}"

CLOCK_SKEW = 300
"""Seconds by which HeyGen's clock may be behind ours."""

SETTLE_SECONDS = 45.0
"""How long after a create was sent it may still come to be; HeyGen's slowest answers took 31 s (contract
notes, section 4)."""

MAX_LOOKS = 100
"""Overdubs without ``callback_id`` in the list that are looked at one by one, at most."""

MAX_UPLOAD_URLS = 3
"""How many upload URLs are tried for one file, when they expire or are refused."""

_backoff = tenacity.wait_exponential_jitter(initial=1, max=30, jitter=1)


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    told = error.retry_after if isinstance(error, HeyGenError) else None
    # Never sooner than HeyGen asked for.
    return max(told or 0.0, _backoff(state))


class HeyGenHook(HttpHook):
    """
    Talk to HeyGen with the credential of an Airflow connection of type ``heygen``.

    Use it as a context manager to close its HTTP session early, or ``async with`` in a triggerer to share
    one session with every other hook of the same settings on that event loop.

    Every method raises :class:`~airflow_provider_heygen.exceptions.HeyGenError`: bad input and wrong settings
    before anything is sent, permanent answers at once, transient ones after ``max_attempts``.

    :param heygen_conn_id: the Airflow connection.
    :param max_attempts: how often a call is tried while the failure is transient. Pauses double from 1 to
        30 s, or last as long as HeyGen's ``Retry-After`` says.
    :param longest_pause: seconds; when ``Retry-After`` says more, the error is raised instead, for the caller
        to defer.
    """

    conn_name_attr = "heygen_conn_id"
    default_conn_name = "heygen_default"
    conn_type = "heygen"
    hook_name = "HeyGen"

    def __init__(
        self, heygen_conn_id: str = default_conn_name, *, max_attempts: int = 6, longest_pause: float = 60.0
    ) -> None:
        super().__init__(http_conn_id=heygen_conn_id)
        self.heygen_conn_id = heygen_conn_id
        self.max_attempts = max_attempts
        self.longest_pause = longest_pause
        self._resolved: HeyGenConnection | None = None
        self._closing = ExitStack()
        self._aclosing: list[AsyncExitStack] = []

    # --- The calls ------------------------------------------------------------------------------------

    def create_overdub(
        self,
        request: api.CreateOverdubRequest | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        before_sending: Callable[[], object] | None = None,
    ) -> str:
        """
        Start an overdub and give its id. It costs money when it completes.

        However often the answer gets lost, one overdub is started: each attempt carries the same key, and
        before an attempt that follows a lost answer the list is searched for our ``callback_id``, because
        a server may not know the key.

        :param request: a :class:`~airflow_provider_heygen.api.CreateOverdubRequest` or a mapping of its
            fields.
        :param idempotency_key: 1 to 255 of ``A-Z a-z 0-9 _ - : .``; the same key gets the same overdub for
            24 hours, even for another request. Made up when not given. Also sent as ``callback_id`` unless
            the request has one.
        :param before_sending: called before each attempt; for who notes what may have been sent, and when.
        """
        request = api.CreateOverdubRequest.of(request)
        idempotency_key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        if request.callback_id is None:
            request = request.model_copy(update={"callback_id": idempotency_key})
        call = api.create_overdub(self.settings.resource, request, idempotency_key)
        started_at = sent_at = time.time()
        answer_lost = False
        for attempt in self._retrying():
            with attempt:
                try:
                    if answer_lost:
                        found = self.find_created(request, idempotency_key, since=started_at, sent_at=sent_at)
                        if found is not None:
                            self.log.info(
                                "Its answer was lost, but overdub %s was created.", found.overdub_id
                            )
                            return found.overdub_id
                    if before_sending is not None:
                        before_sending()
                    attempted_at = time.time()
                    return self._send(call)
                except HeyGenError as error:
                    if error.outcome_unknown and error.code is None:
                        # No word from HeyGen itself: the create may still be under way.
                        sent_at = attempted_at
                    # Once an answer was lost, no later error makes that undone.
                    answer_lost = error.outcome_unknown = answer_lost or error.outcome_unknown
                    raise
        raise AssertionError  # tenacity returns or raises; this tells mypy

    def get_overdub(self, overdub_id: str) -> api.Overdub:
        """Read one overdub. Each look gives a fresh ``video_url``."""
        return self._call(api.get_overdub(self.settings.resource, overdub_id))

    def list_overdubs(self, limit: int = 10, token: str | None = None) -> api.OverdubPage:
        """
        List one page of overdubs.

        :param limit: how many, 1 to 100.
        :param token: ``next_token`` of the page before.
        """
        return self._call(api.list_overdubs(self.settings.resource, limit, token))

    def iter_overdubs(self, page_size: int = api.MAX_PAGE_SIZE) -> Iterator[api.Overdub]:
        """
        List all overdubs, each once, page after page as they are consumed.

        :param page_size: how many per request, 1 to 100.
        """
        token: str | None = None
        tokens, ids = set(), set()
        while True:
            page = self.list_overdubs(page_size, token)
            for overdub in page.data:
                # Pages shift while being read when new jobs arrive; the same row may come again.
                if overdub.overdub_id not in ids:
                    ids.add(overdub.overdub_id)
                    yield overdub
            token = page.next_token
            if token is None or token in tokens:
                return
            tokens.add(token)

    def find_created(
        self,
        request: api.CreateOverdubRequest,
        idempotency_key: str,
        *,
        since: float,
        sent_at: float = 0.0,
    ) -> api.Overdub | None:
        """
        Find the overdub that a create whose answer was lost has started, if it has.

        HeyGen's list has no filter, so it is read until its rows are too old; rows without a ``callback_id``
        are looked at one by one. What is certain is adopted. Where it cannot be told whether a job is ours,
        ``lipsyncs`` is asked again under the same key, which is documented there; on ``overdubs`` that might
        start a second job.

        :param request: the create; an author's own ``callback_id`` may be on many jobs and proves nothing.
        :param idempotency_key: its key, sent as ``callback_id`` unless the request has one.
        :param since: Unix seconds of the first attempt.
        :param sent_at: Unix seconds of the last attempt without any answer. What is not there may yet come
            until some time after it, so on ``overdubs`` that time is waited for.
        :raises HeyGenOutcomeUnknownError: it cannot be told, and the server may not know the key.
        :raises HeyGenTransientError: it cannot be told now.
        """
        marker = request.callback_id or idempotency_key
        settled_at = sent_at + SETTLE_SECONDS
        while True:
            try:
                found, doubtful = self._search(marker, request.title, since)
            except HeyGenPermanentError as error:
                found, doubtful = [], [f"the list cannot be read: {error}"]
            if len(found) == 1 and marker == idempotency_key:
                return found[0]
            doubtful += [overdub.overdub_id for overdub in found]
            left = settled_at - time.time()
            if doubtful or left <= 0 or self.settings.resource != "overdubs":
                break
            time.sleep(min(left, 5.0))
        if doubtful and self.settings.resource == "overdubs":
            raise HeyGenOutcomeUnknownError(
                f"A create was sent, its answer was lost, and it cannot be told whether it started an overdub"
                f" (candidates: {', '.join(doubtful[:5])}). Nothing more was sent. If none of them is this"
                " task's, clear the task to send it again (before Airflow 3.3: run it with durable=False)."
                " Leave callback_id unset to have a unique one sent, by which an overdub can be found.",
                outcome_unknown=True,
            )
        return None

    def _search(self, marker: str, title: str | None, since: float) -> tuple[list[api.Overdub], list[str]]:
        """List overdubs created since then: those with the marker, and the ids of those that could be it."""
        oldest = since - CLOCK_SKEW
        found: list[api.Overdub] = []
        doubtful: list[str] = []
        looks = 0
        newest_first, last = True, math.inf
        for count, row in enumerate(self.iter_overdubs(), start=1):
            newest_first = newest_first and row.created_at is not None and row.created_at <= last
            last = row.created_at or last
            if row.created_at is not None and row.created_at < oldest:
                # The order of the list is not documented; a whole page of falling times is proof enough.
                if newest_first and count >= api.MAX_PAGE_SIZE:
                    break
                continue
            overdub = row
            if row.callback_id is None and looks < MAX_LOOKS:
                looks += 1
                try:
                    overdub = self.get_overdub(row.overdub_id)
                except HeyGenNotFoundError as error:
                    # Just listed and not readable: too fresh, or deleted. The next attempt will know.
                    raise HeyGenTransientError(str(error)) from None
            if overdub.callback_id == marker:
                found.append(overdub)
            elif overdub.callback_id is None and title in (None, overdub.title):
                # HeyGen may give a title of its own to what has none.
                doubtful.append(overdub.overdub_id)
        return found, doubtful

    def update_overdub(self, overdub_id: str, title: str) -> api.Overdub:
        """Rename an overdub."""
        return self._call(api.update_overdub(self.settings.resource, overdub_id, title))

    def delete_overdub(self, overdub_id: str) -> None:
        """Delete an overdub and its files for good."""
        call, deletion = api.delete_overdub(self.settings.resource, overdub_id), _Deletion()
        for attempt in self._retrying():
            with attempt, deletion:
                self._send(call)

    def upload_asset(
        self,
        path: upload.Source | str | PathLike[str] | ObjectStoragePath,
        *,
        idempotency_key: str | None = None,
    ) -> api.Asset:
        """
        Upload one file for use as ``video`` or ``audio``, streamed from where it is.

        Up to 32 MB it goes to HeyGen itself, above that (``lipsyncs`` only) to HeyGen's storage.

        :param path: a local path or any URI that Airflow's ObjectStoragePath understands (``file://``,
            ``s3://conn_id@bucket/key``, ``gs://`` ...): mp4, webm, mp3, wav, png or jpeg.
        :param idempotency_key: 1 to 255 of ``A-Z a-z 0-9 _ - : .``; the same key gets the same asset for
            24 hours, even for another file. Made up when not given.
        """
        source = upload.Source.of(path, self.settings)
        idempotency_key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        if source.size > api.MAX_MULTIPART_BYTES:
            return self._upload_directly(source, idempotency_key)
        call = api.upload_asset(idempotency_key)
        for attempt in self._retrying():
            with attempt, source.open() as file:
                # The encoder reads the file while the socket takes it: never all of it in memory.
                form = MultipartEncoder({"file": (source.name, file, source.mime_type)})
                return self._send(call, form=form)
        raise AssertionError

    def _upload_directly(self, source: upload.Source, idempotency_key: str) -> api.Asset:
        key = idempotency_key
        for number in range(1, MAX_UPLOAD_URLS + 1):
            slot = self._call(
                api.create_direct_upload(
                    filename=source.name,
                    content_type=source.mime_type,
                    size_bytes=source.size,
                    checksum_sha256=source.digest,
                    idempotency_key=key,
                )
            )
            if slot.max_bytes is not None and source.size > slot.max_bytes:
                raise HeyGenPermanentError(
                    f"{source} has {source.size / 2**20:.1f} MiB, HeyGen takes"
                    f" {slot.max_bytes / 2**20:.1f} MiB. Make it smaller; nothing was uploaded."
                )
            refusal = self._put(source, slot, time.monotonic())
            completion = api.complete_direct_upload(slot.asset_id)
            try:
                # A URL is also refused when an earlier run has used it, and then there is an asset.
                return self._send(completion) if refusal else self._call(completion)
            except HeyGenError as error:
                if not refusal or error.status_code not in (404, 409):
                    raise
            self.log.info("The upload URL of asset %s is no longer good (%s).", slot.asset_id, refusal)
            # The same key would get the same URL again.
            key = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{idempotency_key}/{number}"))
        raise HeyGenTransientError(
            f"HeyGen's storage refused {MAX_UPLOAD_URLS} upload URLs in a row for {source}: {refusal}."
        )

    def _put(self, source: upload.Source, slot: api.DirectUpload, began: float) -> str | None:
        """Send a file to an upload URL; gives what is wrong with the URL, if that is why it did not go."""
        for attempt in self._retrying():
            with attempt:
                life = math.inf if slot.expires_in_seconds is None else slot.expires_in_seconds
                if time.monotonic() - began >= life:
                    return "it has expired"
                with _new_session(self.settings) as session:
                    return upload.put(source, slot, session=session, settings=self.settings)
        raise AssertionError

    def download_overdub(
        self,
        overdub_id: str,
        destination: str | PathLike[str] | ObjectStoragePath,
        *,
        overwrite: bool = False,
    ) -> int:
        """
        Stream the video of a completed overdub to storage, over as many links and connections as it takes.

        :param destination: a local path or any URI that Airflow's ObjectStoragePath understands.
        :param overwrite: replace what is there; otherwise a file of the same size and with the same first MiB
            is kept as it is.
        :returns: its size in bytes.
        """
        path = media.storage_path(destination, "the destination")
        return self._download("video", overdub_id, path, overwrite)

    def download_captions(
        self,
        overdub_id: str,
        destination: str | PathLike[str] | ObjectStoragePath,
        *,
        overwrite: bool = False,
    ) -> int:
        """
        Stream the captions of a completed overdub to storage: :meth:`download_overdub` for its SRT file.

        HeyGen has them under ``lipsyncs`` only (contract, ``caption_url``).
        """
        path = media.storage_path(destination, "the destination of the captions")
        return self._download("captions", overdub_id, path, overwrite)

    def _download(self, what: str, overdub_id: str, path: ObjectStoragePath, overwrite: bool) -> int:
        call = api.get_overdub(self.settings.resource, overdub_id)

        def fresh_link() -> str:
            overdub = self._send(call)
            if overdub.status == api.OverdubStatus.FAILED:
                raise HeyGenOverdubFailedError(failure(overdub))
            if overdub.status != api.OverdubStatus.COMPLETED:
                raise HeyGenError(
                    f"Overdub {overdub_id} is {overdub.status}, there is no video yet."
                    " Wait for it first, with HeyGenOverdubSensor or wait_for_completion."
                )
            link = overdub.video_url if what == "video" else overdub.caption_url
            if not link:
                # Seen for a short time after completion (contract notes, section 7).
                hint = "" if what == "video" else ". HeyGen makes captions under resource 'lipsyncs' only"
                raise HeyGenTransientError(
                    f"Overdub {overdub_id} is completed but has no link to the {what} yet{hint}."
                )
            return link

        with _new_session(self.settings) as session:
            size = download.save(
                fresh_link,
                path,
                what=what,
                overwrite=overwrite,
                attempts=self._retrying(),
                session=session,
                settings=self.settings,
                say=self.log.info,
            )
        self._tell_lineage(lineage.overdub_uri(overdub_id), media.plain_uri(path))
        return size

    def _tell_lineage(self, source: str, destination: str) -> None:
        try:
            collector = get_hook_lineage_collector()
            collector.add_input_asset(context=self, uri=source)
            collector.add_output_asset(context=self, uri=destination)
        except Exception as error:  # an Asset may have no name of over 1,500 characters, say
            self.log.warning("Airflow's lineage does not take %s: %s", destination, error)

    def test_connection(self) -> tuple[bool, str]:
        """Try the connection with a free look at the resource itself, as Airflow's "Test" button does."""
        try:
            page = self._send(api.list_overdubs(self.settings.resource, 1, None))
        except Exception as error:
            # The web UI tries it under an id made up for the occasion.
            named = f"Airflow connection '{self.heygen_conn_id}'"
            return False, str(error).replace(named, "this connection")
        credential = "OAuth token" if self.settings.auth_type == "oauth" else "API key"
        resource = self.settings.resource
        seen = f"There are {resource}." if page.data else f"There are no {resource} yet."
        return True, f"HeyGen accepts the {credential}. {seen}"

    async def aget_overdub(self, overdub_id: str) -> api.Overdub:
        """:meth:`get_overdub` for an event loop."""
        return await self._acall(lambda resource: api.get_overdub(resource, overdub_id))

    async def alist_overdubs(self, limit: int = 10, token: str | None = None) -> api.OverdubPage:
        """:meth:`list_overdubs` for an event loop."""
        return await self._acall(lambda resource: api.list_overdubs(resource, limit, token))

    async def adelete_overdub(self, overdub_id: str) -> None:
        """:meth:`delete_overdub` for an event loop."""
        call, deletion = api.delete_overdub((await self.asettings()).resource, overdub_id), _Deletion()
        async for attempt in tenacity.AsyncRetrying(**self._retry_options()):
            with attempt, deletion:
                await self.asend(call)

    # --- The worker's transport -----------------------------------------------------------------------

    @property
    def settings(self) -> HeyGenConnection:
        """The connection, resolved once per hook."""
        if self._resolved is None:
            connection = self.get_connection(self.heygen_conn_id)
            self._resolved = HeyGenConnection.from_airflow(connection, connection.extra_dejson)
        return self._resolved

    def __enter__(self) -> HeyGenHook:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the HTTP session; the next call opens another."""
        self.__dict__.pop("_session", None)
        self._closing.close()

    def get_conn(
        self, headers: dict[Any, Any] | None = None, extra_options: dict[str, Any] | None = None
    ) -> requests.Session:
        """
        Make a session with the credential, proxies, TLS settings and keep-alive of the connection.

        Everything inherited from ``HttpHook``, such as ``run``, works with it for HeyGen's other routes.
        """
        settings = self.settings
        session = _new_session(settings)
        session.auth = _Credential(settings)
        session.headers["User-Agent"] = USER_AGENT
        session.headers.update(headers or {})
        if self.keep_alive_adapter:
            session.mount("http://", self.keep_alive_adapter)
            session.mount("https://", self.keep_alive_adapter)
        self.base_url = settings.base_url
        self._base_url_initialized = True
        # Redirects are not followed: the credential would travel along.
        timeout = (settings.connect_timeout, settings.write_timeout)
        self.merged_extra = {"timeout": timeout, **(extra_options or {}), "allow_redirects": False}
        return session

    def check_response(self, response: requests.Response) -> None:
        """Raise our errors for ``HttpHook.run``, whose own would log the whole body."""
        if not response.ok or response.is_redirect:
            path = response.request.path_url.partition("?")[0]
            call: api.Call[None] = api.Call(
                what=f"{response.request.method} {path}", method="POST", path=path, read=lambda _: None
            )
            call.answer(response.status_code, response.headers, response.content, self.settings)

    @cached_property
    def _session(self) -> requests.Session:
        return self._closing.enter_context(self.get_conn())

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(**self._retry_options())

    def _retry_options(self) -> dict[str, Any]:
        return {
            "retry": tenacity.retry_if_exception(self._worth_repeating),
            "wait": _pause,
            "stop": tenacity.stop_after_attempt(self.max_attempts),
            "before_sleep": self._log_pause,
            "reraise": True,
        }

    def _worth_repeating(self, error: BaseException) -> bool:
        return isinstance(error, HeyGenTransientError) and (error.retry_after or 0) <= self.longest_pause

    def _log_pause(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self.log.warning(
            "%s Trying again in %.0f s (attempt %d of %d).",
            error,
            state.upcoming_sleep,
            state.attempt_number + 1,
            self.max_attempts,
        )

    def _call(self, call: api.Call[T]) -> T:
        result: T = self._retrying()(self._send, call)
        return result

    def _send(self, call: api.Call[T], *, form: MultipartEncoder | None = None) -> T:
        """Send one call once."""
        settings = self.settings
        read_timeout = _read_timeout(settings, call, upload=form is not None)
        try:
            response = self._session.request(
                call.method,
                settings.base_url + call.path,
                params=call.params,
                json=call.json,
                data=upload.Chunks(form) if form else None,
                headers={**call.headers, **({"Content-Type": form.content_type} if form else {})},
                timeout=(settings.connect_timeout, read_timeout),
                allow_redirects=False,
            )
        except OSError as error:  # RequestException is one; requests throws bare ones for certificate files
            raise _transport_error(call, settings, error, _requests_fault(error)) from None
        return call.answer(response.status_code, response.headers, response.content, settings)

    # --- The triggerer's transport --------------------------------------------------------------------

    async def asettings(self) -> HeyGenConnection:
        """:attr:`settings` for an event loop."""
        if self._resolved is None:
            self._resolved = await to_its_end(self._look_up())
        return self._resolved

    async def _look_up(self) -> HeyGenConnection:
        from airflow.providers.common.compat.connection import (
            get_async_connection,
            get_async_extra_dejson,
        )

        connection = await get_async_connection(self.heygen_conn_id, hook=self)
        return HeyGenConnection.from_airflow(connection, await get_async_extra_dejson(connection))

    async def __aenter__(self) -> HeyGenHook:
        stack = AsyncExitStack()
        await stack.enter_async_context(_shared_session(await self.asettings()))
        self._aclosing.append(stack)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._aclosing.pop().aclose()

    async def _acall(self, build: Callable[[str], api.Call[T]]) -> T:
        call = build((await self.asettings()).resource)
        result: T = await tenacity.AsyncRetrying(**self._retry_options())(self.asend, call)
        return result

    async def asend(self, call: api.Call[T]) -> T:
        """Send one call once, for those who keep their own patience."""
        settings = await self.asettings()
        name, value = settings.auth_header
        read_timeout = _read_timeout(settings, call)
        timeout = aiohttp.ClientTimeout(
            # An answer that drips in must not outlive the deadline of a wait.
            total=settings.connect_timeout + read_timeout,
            sock_connect=settings.connect_timeout,
            sock_read=read_timeout,
        )
        async with _shared_session(settings) as (session, options):
            try:
                async with session.request(
                    call.method,
                    settings.base_url + call.path,
                    params=dict(call.params),
                    json=call.json,
                    headers={**call.headers, name: value},
                    timeout=timeout,
                    allow_redirects=False,
                    **options,
                ) as response:
                    body = await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _transport_error(call, settings, error, _aiohttp_fault(error)) from None
            return call.answer(response.status, response.headers, body, settings)


class _Deletion:
    """The attempts of one deletion: once an answer was lost, a 404 says that it was done."""

    def __init__(self) -> None:
        self.answer_lost = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self.answer_lost = self.answer_lost or (isinstance(error, HeyGenError) and error.outcome_unknown)
        return self.answer_lost and isinstance(error, HeyGenNotFoundError)


class _Credential(AuthBase):
    """The one credential header, set last: a ``~/.netrc`` entry must not add or replace one."""

    def __init__(self, settings: HeyGenConnection) -> None:
        self.header = settings.auth_header

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        name, value = self.header
        request.headers[name] = value
        return request


def _read_timeout(settings: HeyGenConnection, call: api.Call[Any], *, upload: bool = False) -> float:
    if upload:
        return settings.upload_timeout
    return settings.read_timeout if call.method == "GET" else settings.write_timeout


def _no_credential(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Be the auth of a session that has none: without one, requests would look into ``~/.netrc``."""
    return request


# How far a request got that met a network fault: this decides what may be repeated.
_NEVER_SENT, _MAYBE_SENT, _WRONG_SETTING = "never sent", "maybe sent", "wrong setting"


def _requests_fault(error: OSError) -> str:
    if (
        not isinstance(error, RequestException)
        or isinstance(error, (InvalidURL, InvalidHeader, InvalidProxyURL, InvalidSchema))
        or (isinstance(error, SSLError) and re.search("CERTIFICATE_VERIFY_FAILED|X509|PEM lib", str(error)))
    ):
        return _WRONG_SETTING
    reason = getattr(error.args[0], "reason", None) if error.args else None
    refused = isinstance(error, ConnectionError) and isinstance(
        reason, (NewConnectionError, NameResolutionError)
    )
    # TLS also breaks while an answer is read, so any other SSLError proves nothing.
    return _NEVER_SENT if isinstance(error, ConnectTimeout) or refused else _MAYBE_SENT


def _aiohttp_fault(error: BaseException) -> str:
    if isinstance(error, (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError)):
        return _WRONG_SETTING
    never = isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError))
    return _NEVER_SENT if never else _MAYBE_SENT


def _transport_error(
    call: api.Call[Any], settings: HeyGenConnection, error: BaseException, fault: str
) -> HeyGenError:
    # The library's text may quote the URL and the proxy's password; its class says what happened.
    what = f"{type(error).__name__} during {call.what} at {settings.base_url}"
    if fault == _WRONG_SETTING:
        return HeyGenPermanentError(
            f"{what}. Check host, 'verify', 'cert' and 'proxies' of Airflow connection '{settings.conn_id}'."
        )
    return HeyGenTransientError(
        f"{what}, {'nothing was sent' if fault == _NEVER_SENT else 'no answer arrived'}.",
        outcome_unknown=fault == _MAYBE_SENT and call.method != "GET",
    )


class _Session(requests.Session):
    """A session whose own proxies and TLS settings win over the environment's, as in Airflow's HTTP hook."""

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        proxies = {**self.proxies, **(proxies or {})}
        verify = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, verify, cert)

    def get_redirect_target(self, resp: Any) -> None:  # noqa: ARG002
        # Nobody follows one; requests would still parse it, and fail in its own way on a bad one.
        return None


def _new_session(settings: HeyGenConnection) -> requests.Session:
    """Make a session with the connection's proxies and TLS settings, and no credential."""
    session = _Session()
    session.auth = _no_credential
    session.proxies = dict(settings.proxies)
    session.verify = settings.verify
    session.cert = settings.cert
    session.trust_env = settings.trust_env
    return session


def _aiohttp_options(settings: HeyGenConnection) -> dict[str, Any]:
    """
    Give aiohttp the proxy and TLS settings that requests would use, from connection and environment.

    aiohttp's own ``trust_env`` is left off: it would read ``~/.netrc`` and add a second credential. Reads
    certificate files, so it is kept off the event loop.
    """
    url = settings.base_url
    found = _new_session(settings).merge_environment_settings(url, {}, None, None, None)
    proxy = requests.utils.select_proxy(url, found["proxies"])
    if proxy:
        try:
            proxy = requests.utils.prepend_scheme_if_needed(proxy, "http")  # type: ignore[no-untyped-call]
            usable = urlsplit(proxy).scheme in ("http", "https") and urlsplit(proxy).hostname
        except ValueError:
            usable = False
        if not usable:  # aiohttp would pass by some of them
            raise HeyGenBadInputError(
                f"The 'proxies' of Airflow connection '{settings.conn_id}' (or of the environment) must be"
                " http or https URLs: a triggerer can use no others."
            )
    verify, cert = found["verify"], found["cert"]
    if verify is False:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        bundle = certifi.where() if verify is True else str(verify)
        context = ssl.create_default_context(
            cafile=None if os.path.isdir(bundle) else bundle, capath=bundle if os.path.isdir(bundle) else None
        )
    if cert:
        context.load_cert_chain(*([cert] if isinstance(cert, str) else cert))
    return {"proxy": proxy or None, "ssl": context}


@dataclass
class _Shared:
    """An aiohttp session, the options of its requests, and the number of those who use it."""

    session: aiohttp.ClientSession
    options: dict[str, Any]
    users: int = 0


_asking: set[asyncio.Task[Any]] = set()


async def to_its_end(question: Coroutine[Any, Any, T]) -> T:
    """
    Await what asks Airflow something; who is cancelled meanwhile does not cut it off.

    Before Airflow 3.2, an answer that nobody fetches stays in the pipe between triggerer and supervisor. The
    next question reads it as its own and fails (seen on 3.0.6 and 3.1); it may be that of the runner of all
    triggers, which ends by it (so says its code).
    """
    task = asyncio.create_task(question)
    _asking.add(task)  # an event loop itself does not keep its tasks alive
    task.add_done_callback(_asking.discard)
    return await asyncio.shield(task)


# One session for all triggers of an event loop with the same settings, kept while somebody uses it.
_sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Shared]] = WeakKeyDictionary()


@asynccontextmanager
async def _shared_session(
    settings: HeyGenConnection,
) -> AsyncIterator[tuple[aiohttp.ClientSession, dict[str, Any]]]:
    of_loop = _sessions.setdefault(asyncio.get_running_loop(), {})
    # The credential goes out with each request, so a rotated key needs no new session.
    key = settings.model_dump_json(include={"base_url", "proxies", "verify", "cert", "trust_env"})
    if key not in of_loop:
        try:
            options = await asyncio.to_thread(_aiohttp_options, settings)
        except OSError as error:
            raise HeyGenBadInputError(
                f"The 'verify' or 'cert' file of Airflow connection '{settings.conn_id}': {error}."
            ) from None
        if key not in of_loop:  # another task may have been quicker
            session = aiohttp.ClientSession(
                # Longer than a sensible poll interval: a waiting trigger must not pay for TLS on each look.
                connector=aiohttp.TCPConnector(limit=20, keepalive_timeout=120),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": USER_AGENT},
            )
            # aiohttp would repeat a lost DELETE by itself and give us the 404 of its second attempt.
            session._retry_connection = False
            of_loop[key] = _Shared(session, options)
    shared = of_loop[key]
    shared.users += 1
    try:
        yield shared.session, shared.options
    finally:
        shared.users -= 1
        if not shared.users:
            del of_loop[key]
            await shared.session.close()
