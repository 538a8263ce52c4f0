"""The calls to HeyGen, synchronous and asynchronous, with retries: :mod:`.api` over :mod:`.transport`."""

from __future__ import annotations

import hashlib
import math
import time
import unicodedata
import uuid
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import tenacity
from airflow.providers.common.compat.sdk import BaseHook, get_hook_lineage_collector
from requests_toolbelt import MultipartEncoder

from airflow_provider_heygen import api, download, lineage, media, transport, upload
from airflow_provider_heygen.compat import finish_despite_cancellation
from airflow_provider_heygen.connection import HeyGenConnection
from airflow_provider_heygen.exceptions import (
    HeyGenError,
    HeyGenGatewayError,
    HeyGenNotFoundError,
    HeyGenOutcomeUnknownError,
    HeyGenPermanentError,
    HeyGenTransientError,
    retry_delay,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
    from os import PathLike

    import requests
    from airflow.providers.common.compat.sdk import ObjectStoragePath

T = TypeVar("T")
_Send: TypeAlias = "Callable[[api.Call[Any]], Awaitable[Any]]"

RESOURCES = ("overdubs", "lipsyncs")  # HeyGen's names for the resource, in the order in which they are tried
# An overdub may appear this long after its create request was sent. HeyGen's p99 is near 31 s
# (contract, x-timing of createOverdub).
SETTLE_SECONDS = 45.0
# A candidate was created within this time of the create request, by HeyGen's clock.
SEARCH_SECONDS = 300.0
# The error of such times: all are whole seconds, and a server under load may send an old Date.
CLOCK_NOISE_SECONDS = 5.0
MAX_SEARCH_PAGES = 18  # for one lost create request, over all passes of the search
MAX_CANDIDATE_GETS = 40  # for one lost create request
MAX_EMPTY_PAGES = 10  # in a row, before a list counts as endless
MAX_LISTED_PAGES = 100  # to find out whether one overdub is in the list
KEY_SECONDS = 23 * 60 * 60  # HeyGen keeps an idempotency key for 24 hours
MAX_UPLOAD_URLS = 3  # for one file, if they expire or are rejected

# HeyGen's name for the resource, as detected, by base URL and credential.
_detected: dict[Any, str] = {}


def _retry_delay(state: tenacity.RetryCallState) -> float:
    return retry_delay(state.attempt_number, state.outcome.exception() if state.outcome else None)


class HeyGenHook(BaseHook):
    """
    Send requests to HeyGen with the credential of an Airflow connection of type ``heygen``.

    ``with`` closes its HTTP session early. In a triggerer, ``async with`` shares one session among all hooks
    with the same settings on the event loop.

    Each method raises :class:`~airflow_provider_heygen.exceptions.HeyGenError`: for bad input and wrong
    settings before a request, for a permanent error at once, for a transient one after ``max_attempts``.

    :param heygen_conn_id: Airflow connection id.
    :param max_attempts: maximum number of attempts per call. The delay between them doubles from 1 to 30 s,
        or is HeyGen's ``Retry-After``.
    :param longest_pause: longest ``Retry-After`` in seconds after which the hook tries again. Above it, the
        error is raised at once, so that the caller can defer. A 429 counts as at least one second.
    """

    conn_name_attr = "heygen_conn_id"
    default_conn_name = "heygen_default"
    conn_type = "heygen"
    hook_name = "HeyGen"

    def __init__(
        self, heygen_conn_id: str = default_conn_name, *, max_attempts: int = 6, longest_pause: float = 60.0
    ) -> None:
        super().__init__()
        self.heygen_conn_id = str(heygen_conn_id)  # native rendering makes a number of "2026"
        self.max_attempts = max_attempts
        self.longest_pause = longest_pause
        self.created_under: str | None = None
        """The name of the resource under which the hook's overdub was created, if known."""
        self._resolved: HeyGenConnection | None = None
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
        Start an overdub and return its id. It costs money when it completes.

        All attempts together start one overdub, because they have the same key. A server may not know the
        key, so after a lost response, the next attempt first searches the list for the ``callback_id``.

        :param request: a :class:`~airflow_provider_heygen.api.CreateOverdubRequest` or a mapping of its
            fields.
        :param idempotency_key: 1 to 255 characters of ``A-Za-z0-9_-:.``, random by default. For 24 hours, the
            same key returns the same overdub, even for another request. Also the ``callback_id``, unless the
            request has one.
        :param before_sending: called before each attempt, for callers that record what may have been sent,
            and when.
        """
        request = api.CreateOverdubRequest.of(request)
        idempotency_key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        if request.callback_id is None:
            request = request.model_copy(update={"callback_id": idempotency_key})
        call = api.create_overdub(request, idempotency_key)
        started_at = sent_at = attempted_at = time.time()
        sent_under = self.resource
        response_lost, only_pages = False, True

        def before() -> None:
            nonlocal attempted_at, sent_under
            if before_sending is not None:
                before_sending()
            attempted_at, sent_under = time.time(), self.resource

        for attempt in self._retrying():
            with attempt:
                try:
                    if response_lost:
                        found = self.find_created(
                            request,
                            idempotency_key,
                            since=started_at,
                            sent_at=sent_at,
                            sent_under=sent_under,
                            only_pages=only_pages,
                        )
                        if found is not None:
                            self.log.info(
                                "The response to the create request was lost, but HeyGen started overdub %s."
                                " Using it.",
                                found.overdub_id,
                            )
                            return found.overdub_id
                    return self._send(call, before=before)
                except HeyGenError as error:
                    if error.outcome_unknown and error.code is None:
                        sent_at = attempted_at  # HeyGen may still process the create request
                    is_page = isinstance(error, HeyGenGatewayError) and error.status_code == 404
                    only_pages = only_pages and (is_page or not error.outcome_unknown)
                    # A later error does not change that a response was lost.
                    response_lost = error.outcome_unknown = response_lost or error.outcome_unknown
                    raise
        raise AssertionError  # for mypy: tenacity returns or raises

    def get_overdub(self, overdub_id: str) -> api.Overdub:
        """Read one overdub. Each response has a new ``video_url``."""
        return self._call(api.get_overdub(overdub_id))

    def list_overdubs(self, limit: int = 10, token: str | None = None) -> api.OverdubPage:
        """List one page of 1 to 100 overdubs; ``token`` is the ``next_token`` of the page before."""
        return self._call(api.list_overdubs(limit, token))

    def iter_overdubs(self, page_size: int = api.MAX_PAGE_SIZE) -> Iterator[api.Overdub]:
        """Yield all overdubs, each once; each page of 1 to 100 overdubs is read when it is needed."""
        ids = set()
        for page in self._pages(page_size):
            for overdub in page.data:
                # A new overdub shifts the pages, so a row may appear on two of them.
                if overdub.overdub_id not in ids:
                    ids.add(overdub.overdub_id)
                    yield overdub

    def _pages(self, page_size: int = api.MAX_PAGE_SIZE) -> Iterator[api.OverdubPage]:
        token: str | None = None
        tokens: set[str | None] = set()
        empty = 0
        while token not in tokens:  # None after the last page; a repeated token would never end
            tokens.add(token)
            page = self.list_overdubs(page_size, token)
            yield page
            empty = 0 if page.data else empty + 1
            if empty > MAX_EMPTY_PAGES:
                raise HeyGenTransientError(f"HeyGen's list does not end: {empty} pages in a row are empty.")
            token = page.next_token
            if page.has_more and token is None:
                raise HeyGenTransientError(
                    "HeyGen's list has more overdubs, but its response has no 'next_token' to read them by."
                )

    def is_listed(self, overdub_id: str) -> bool | None:
        """Return whether the list has an overdub; ``None`` if that cannot be determined."""
        try:
            for page in islice(self._pages(), MAX_LISTED_PAGES):
                if any(overdub.overdub_id == overdub_id for overdub in page.data):
                    return True
                if not page.has_more:
                    return False
        except HeyGenError as error:
            self.log.warning("%s", error)
        return None

    def find_created(
        self,
        request: api.CreateOverdubRequest,
        idempotency_key: str,
        *,
        since: float,
        sent_at: float = 0.0,
        sent_under: str | None = None,
        skew: float = 0.0,
        only_pages: bool = False,
    ) -> api.Overdub | None:
        """
        Find the overdub that a create request with a lost response has started.

        HeyGen's list has no filter, so pages are read until their rows are too old. Rows without a
        ``callback_id`` are read one by one. Only a certain match is returned. If other candidates remain, the
        result is ``None`` on ``lipsyncs`` while HeyGen knows the key, because HeyGen documents that a repeat
        is safe there. Otherwise a repeat could start a second overdub, so this method raises.

        :param request: the create request. An author's own ``callback_id`` may be on several overdubs.
        :param idempotency_key: its key; also its ``callback_id`` unless the author set one.
        :param since: time of the first attempt, in Unix seconds.
        :param sent_at: time of the last attempt without any response, in Unix seconds. The overdub may appear
            late, so the search repeats for some time after it, unless HeyGen knows the key.
        :param sent_under: the name of the resource in that attempt.
        :param skew: seconds by which the clock of the process that sent the request may be wrong.
        :param only_pages: whether the response to each attempt was a gateway's 404 page.
        :returns: the overdub, or ``None`` if the request may be sent again.
        :raises HeyGenOutcomeUnknownError: if there are candidates. Nothing more was sent; a retry searches
            again.
        :raises HeyGenTransientError: if HeyGen cannot be searched now. A retry may succeed.
        """
        sent_under = sent_under or self._fixed_resource or RESOURCES[0]
        search = _Search(self, request, idempotency_key, since - skew, max(sent_at, since))
        settled_at = SETTLE_SECONDS + (time.time() if abs(time.time() - sent_at) < skew else sent_at)
        delay = 5.0
        while True:
            found = search.run()
            if found is not None:
                return found
            # HeyGen knows a key only under the name of the resource that the request had.
            key_is_known = self.resource == sent_under == "lipsyncs" and time.time() - since < KEY_SECONDS
            left = settled_at - time.time()
            if search.candidates or left <= 0 or key_is_known:
                break
            # The last pass must come after the overdub can appear, so enough pages are left for it.
            time.sleep(left if search.pages_left < 2 * search.pages else min(left, delay))
            delay *= 2
        if search.candidates and not key_is_known:
            raise HeyGenOutcomeUnknownError(
                "A create request was sent, its response was lost, and it cannot be determined whether it"
                f" started an overdub (candidates: {', '.join(search.candidates[:5])}). Nothing more was"
                " sent. Check the candidates in HeyGen. If none belongs to this task, clear the task to send"
                " the request again (before Airflow 3.3: run it with durable=False). Leave callback_id unset,"
                " so that the provider sends a unique one by which it can find an overdub.",
                outcome_unknown=True,
            )
        if sent_under == self.resource or not self._is_back(sent_under, only_pages):
            return None
        return self.find_created(request, idempotency_key, since=since, sent_under=sent_under, skew=skew)

    def _is_back(self, name: str, only_pages: bool) -> bool:
        """
        Return whether HeyGen has the resource under a name that returned 404 before.

        :param only_pages: whether a gateway's 404 page proves that it has not: all requests got one.
        """
        try:
            return _run(self._has_collection(name, self._send_attempt, certain=not only_pages))
        except HeyGenError as error:
            raise HeyGenTransientError(str(error), outcome_unknown=True) from None

    def update_overdub(self, overdub_id: str, title: str) -> api.Overdub:
        """Rename an overdub."""
        return self._call(api.update_overdub(overdub_id, title))

    def delete_overdub(self, overdub_id: str) -> None:
        """Delete an overdub and its files."""
        self._delete(api.delete_overdub(overdub_id))

    def get_asset(self, asset_id: str) -> api.Asset:
        """Read a HeyGen asset."""
        return self._call(api.get_asset(asset_id))

    def delete_asset(self, asset_id: str) -> None:
        """Delete a HeyGen asset. The effect on an overdub that still reads it is not documented."""
        self._delete(api.delete_asset(asset_id))

    def _delete(self, call: api.Call[None]) -> None:
        lost: list[bool] = []
        for attempt in self._retrying():
            with attempt, _unless_done(lost):
                self._send(call)

    def upload_asset(
        self,
        path: upload.Source | str | PathLike[str] | ObjectStoragePath,
        *,
        idempotency_key: str | None = None,
    ) -> api.Asset:
        """
        Upload one file for use as ``video`` or ``audio``, streamed.

        HeyGen's API accepts up to 32 MB; a larger file is sent to HeyGen's storage (``lipsyncs`` only).

        :param path: local path, or any URI that Airflow's ObjectStoragePath supports (``file://``,
            ``s3://conn_id@bucket/key``, ``gs://`` ...): mp4, webm, mp3, wav, png or jpeg.
        :param idempotency_key: 1 to 255 characters of ``A-Za-z0-9_-:.``, random by default. For 24 hours, the
            same key returns the same HeyGen asset, even for another file.
        """
        source = upload.Source.of(path, self.settings)
        idempotency_key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        if source.size > api.MAX_MULTIPART_BYTES:
            return self._upload_directly(source, idempotency_key)
        _ = source.digest  # known from here on, so a change while the file is sent creates no asset
        call = api.upload_asset(idempotency_key)
        for attempt in self._retrying():
            with attempt, upload.Announced(source) as file:
                # Streams the file: the encoder reads it as it is sent.
                form = MultipartEncoder({"file": (source.name, file, source.mime_type)})
                return self._send(call, form=form)
        raise AssertionError

    def _upload_directly(self, source: upload.Source, idempotency_key: str) -> api.Asset:
        key = idempotency_key
        for number in range(1, MAX_UPLOAD_URLS + 1):
            destination = self._call(
                api.create_direct_upload(
                    key,
                    filename=source.name,
                    content_type=source.mime_type,
                    size_bytes=source.size,
                    checksum_sha256=source.digest,
                )
            )
            if destination.max_bytes is not None and source.size > destination.max_bytes:
                raise HeyGenPermanentError(
                    f"{source} has {source.size / 2**20:.1f} MiB, HeyGen accepts"
                    f" {destination.max_bytes / 2**20:.1f} MiB. Make it smaller; nothing was uploaded."
                )
            rejection = self._put(source, destination, time.monotonic())
            completion = api.complete_direct_upload(destination.asset_id)
            try:
                # Storage also rejects a URL that an earlier try has used. Then the asset can be completed.
                return self._send(completion) if rejection else self._call(completion)
            except HeyGenGatewayError:
                raise
            except HeyGenError as error:
                if not rejection or error.status_code not in (404, 409):
                    raise
            self.log.info(
                "The upload URL of asset '%s' cannot be used any more (%s). Requesting another one.",
                destination.asset_id,
                rejection,
            )
            # The same key would return the same URL.
            key = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{idempotency_key}/{number}"))
        raise HeyGenTransientError(
            f"HeyGen's storage rejected {MAX_UPLOAD_URLS} upload URLs in a row for {source}: {rejection}."
        )

    def _put(self, source: upload.Source, destination: api.DirectUpload, received_at: float) -> str | None:
        """Send a file to an upload URL; return why the URL cannot be used, or ``None``."""
        lifetime = math.inf if destination.expires_in_seconds is None else destination.expires_in_seconds
        for attempt in self._retrying():
            with attempt:
                if time.monotonic() - received_at >= lifetime:
                    return "it has expired"
                with transport.new_session(self.settings, credential=False) as session:
                    return upload.put_file(source, destination, session=session, settings=self.settings)
        raise AssertionError

    def download_overdub(
        self,
        overdub_id: str,
        destination: str | PathLike[str] | ObjectStoragePath,
        *,
        overwrite: bool = False,
    ) -> int:
        """
        Stream the video of a completed overdub to storage, with as many URLs and connections as necessary.

        :param destination: local path, or any URI that Airflow's ObjectStoragePath supports.
        :param overwrite: whether to replace an existing file. By default, a file of the same size and with
            the same first MiB is kept, and any other file is an error.
        :returns: size in bytes.
        """
        path = media.storage_path(destination, "the destination", written=True)
        return self._download("video", overdub_id, path, overwrite)

    def download_captions(
        self,
        overdub_id: str,
        destination: str | PathLike[str] | ObjectStoragePath,
        *,
        overwrite: bool = False,
    ) -> int:
        """
        Stream the captions of a completed overdub to storage as an SRT file; see :meth:`download_overdub`.

        HeyGen makes them under ``lipsyncs`` only (contract, ``caption_url``).
        """
        path = media.storage_path(destination, "the destination of the captions", written=True)
        return self._download("captions", overdub_id, path, overwrite)

    def _download(self, artifact: str, overdub_id: str, path: ObjectStoragePath, overwrite: bool) -> int:
        call = api.get_overdub(overdub_id)

        def new_url() -> str:
            overdub = self._send(call).raise_for_failure()
            if not overdub.is_completed:
                raise HeyGenError(
                    f"Overdub {overdub_id} is {overdub.status}, there is no video yet."
                    " Wait for it first, with HeyGenOverdubSensor or wait_for_completion."
                )
            url = overdub.video_url if artifact == "video" else overdub.caption_url
            if not url:  # for a short time after completion (third-party report)
                hint = "" if artifact == "video" else ". HeyGen makes captions under resource 'lipsyncs' only"
                raise HeyGenTransientError(
                    f"Overdub {overdub_id} is completed but has no URL of the {artifact} yet{hint}."
                )
            return url

        size = self._save(new_url, path, artifact, overwrite)
        self._report_lineage(lineage.overdub_uri(overdub_id), media.plain_uri(path))
        return size

    def _save(
        self,
        new_url: Callable[[], str],
        path: ObjectStoragePath,
        artifact: str,
        overwrite: bool,
        max_bytes: int | None = None,
    ) -> int:
        with transport.new_session(self.settings, credential=False) as session:
            return download.save(
                new_url,
                path,
                artifact=artifact,
                overwrite=overwrite,
                max_bytes=max_bytes,
                attempts=self._retrying(),
                session=session,
                settings=self.settings,
                log_info=self.log.info,
            )

    def fetch(self, url: str, path: ObjectStoragePath, artifact: str, max_bytes: int) -> int:
        """Stream the file of a URL to storage, without the credential; see :func:`.download.save`."""
        return self._save(lambda: url, path, artifact, True, max_bytes)

    def peek(self, url: str, artifact: str) -> tuple[bytes, int | None, tuple[str, str] | None]:
        """Read the beginning of the file of a URL, without the credential; see :func:`.download.peek`."""
        with transport.new_session(self.settings, credential=False) as session:
            return download.peek(
                url, artifact, attempts=self._retrying(), session=session, settings=self.settings
            )

    def _report_lineage(self, source: str, destination: str) -> None:
        try:
            collector = get_hook_lineage_collector()
            collector.add_input_asset(context=self, uri=source)
            collector.add_output_asset(context=self, uri=destination)
        except Exception as error:  # for example, Airflow rejects a name of over 1,500 characters
            self.log.warning(
                "Could not report %s to Airflow's hook lineage: %s. The file was saved.", destination, error
            )

    def test_connection(self) -> tuple[bool, str]:
        """List one overdub and read the API key, free of charge, for Airflow's *Test* button."""
        try:
            page = self._send(api.list_overdubs(1, None))
        except Exception as error:
            # The web UI tests a connection under a random id.
            name = f"Airflow connection '{self.heygen_conn_id}'"
            return False, str(error).replace(name, "this connection")
        credential = "OAuth token" if self.settings.auth_type == "oauth" else "API key"
        count = f"{self.resource}." if page.data else f"no {self.resource} yet."
        sentences = [f"HeyGen accepts the {credential}.", f"There are {count}"]
        with suppress(HeyGenError):  # an older server, an OAuth token, or a key without that scope
            sentences += self._send(api.get_api_key()).limits()
        return True, " ".join(sentences)

    async def aget_overdub(self, overdub_id: str) -> api.Overdub:
        """Read one overdub; see :meth:`get_overdub`."""
        return await self._acall(api.get_overdub(overdub_id))

    async def alist_overdubs(self, limit: int = 10, token: str | None = None) -> api.OverdubPage:
        """List one page of overdubs; see :meth:`list_overdubs`."""
        return await self._acall(api.list_overdubs(limit, token))

    async def adelete_overdub(self, overdub_id: str) -> None:
        """Delete an overdub and its files."""
        call, lost = api.delete_overdub(overdub_id), list[bool]()
        async for attempt in self._retrying(tenacity.AsyncRetrying):
            with attempt, _unless_done(lost):
                await self.asend(call)

    # --- Sending --------------------------------------------------------------------------------------

    @property
    def settings(self) -> HeyGenConnection:
        """The connection's settings, read once per hook."""
        if self._resolved is None:
            self._resolved = HeyGenConnection.from_airflow(self.get_connection(self.heygen_conn_id))
        return self._resolved

    def forget_settings(self) -> None:
        """Read the Airflow connection again before the next call: its key may have been replaced."""
        self.close()
        self._resolved = None

    async def asettings(self) -> HeyGenConnection:
        """Return :attr:`settings` without blocking the event loop."""
        if self._resolved is None:
            self._resolved = await finish_despite_cancellation(self._resolve_connection())
        return self._resolved

    async def _resolve_connection(self) -> HeyGenConnection:
        from airflow.providers.common.compat.connection import get_async_connection

        return await HeyGenConnection.afrom_airflow(
            await get_async_connection(self.heygen_conn_id, hook=self)
        )

    @property
    def known_resource(self) -> str | None:
        """HeyGen's name for the resource: of the create request, of the connection, or as detected."""
        return self._fixed_resource or _detected.get(self._account)

    @property
    def _fixed_resource(self) -> str | None:
        return self.created_under or self.settings.resource

    @property
    def resource(self) -> str:
        """HeyGen's name for the resource, ``overdubs`` unless another one is known. Sends no request."""
        return self.known_resource or RESOURCES[0]

    def assume_resource(self, name: str | None) -> None:
        """Use a name for the resource that another process has detected, unless one is known."""
        if name and self.known_resource is None:
            _detected[self._account] = name

    @property
    def _account(self) -> tuple[object, ...]:
        return (self.settings.base_url, self.settings.auth_header)

    @property
    def account(self) -> str:
        """A digest of the host and the credential, too short to tell anything about them."""
        return hashlib.sha256(repr(self._account).encode()).hexdigest()[:8]

    def __enter__(self) -> HeyGenHook:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the HTTP session; the next call opens another one."""
        session = self.__dict__.pop("_session", None)
        if session is not None:
            session.close()

    async def __aenter__(self) -> HeyGenHook:
        stack = AsyncExitStack()
        await stack.enter_async_context(transport.shared_session(await self.asettings()))
        self._aclosing.append(stack)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._aclosing.pop().aclose()

    def get_conn(self) -> requests.Session:
        """
        Return a session with the connection's proxies and TLS settings, for HeyGen's other endpoints.

        It sends the credential to the connection's own scheme, host and port only.
        """
        return transport.new_session(self.settings, credential=True)

    @cached_property
    def _session(self) -> requests.Session:
        return self.get_conn()

    def _retrying(self, kind: Callable[..., Any] | None = None) -> Any:
        return (kind or tenacity.Retrying)(
            retry=tenacity.retry_if_exception(self._is_retryable),
            wait=_retry_delay,
            stop=tenacity.stop_after_attempt(self.max_attempts),
            before_sleep=self._log_retry,
            reraise=True,
        )

    def _is_retryable(self, error: BaseException) -> bool:
        if not isinstance(error, HeyGenTransientError):
            return False
        asked = max(error.retry_after or 0.0, 1.0 if error.status_code == 429 else 0.0)
        # After a gateway's page in response to a create request, no caller defers.
        is_page = isinstance(error, HeyGenGatewayError) and error.outcome_unknown and error.status_code != 429
        return asked <= max(self.longest_pause, 30.0 if is_page else 0.0)

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        delay, attempt = state.upcoming_sleep, state.attempt_number + 1
        self.log.warning(
            "%s Trying again in %.0f s (attempt %d of %d).", error, delay, attempt, self.max_attempts
        )

    def _call(self, call: api.Call[T]) -> T:
        result: T = self._retrying()(self._send, call)
        return result

    def _send(
        self,
        call: api.Call[T],
        *,
        form: MultipartEncoder | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> T:
        """Send one call once; ``before`` is called before each request that is not a GET."""

        async def send(call: api.Call[Any]) -> Any:
            if call.writes:
                before()
            return await self._send_attempt(call, form)

        return _run(self._send_under_name(call, send))

    async def _send_attempt(self, call: api.Call[Any], form: MultipartEncoder | None = None) -> Any:
        return transport.send(self._session, call, self.settings, form)

    async def _acall(self, call: api.Call[T]) -> T:
        result: T = await self._retrying(tenacity.AsyncRetrying)(self.asend, call)
        return result

    async def asend(self, call: api.Call[T]) -> T:
        """Send one call once, for callers that repeat it themselves."""
        settings = await self.asettings()
        return await self._send_under_name(call, lambda call: transport.asend(call, settings))

    # --- HeyGen's name for the resource ---------------------------------------------------------------

    async def _send_under_name(self, call: api.Call[T], send: _Send) -> T:
        """Send a call under the name of the resource; after a 404, detect the name."""
        name = self.resource
        try:
            result: T = await send(call.under(name))
        except HeyGenError as error:
            if not call.is_renamed or error.status_code != 404:
                raise
            # Another call may have detected it in the meantime.
            if self.resource == name and not await self._detects_other_name(call, name, error, send):
                raise
            return await send(call.under(self.resource))  # type: ignore[no-any-return]
        if call.is_renamed and self.known_resource is None:
            _detected[self._account] = name
        return result

    async def _detects_other_name(
        self, call: api.Call[Any], name: str, error: HeyGenError, send: _Send
    ) -> bool:
        """
        Return whether HeyGen has the resource under the other name, and remember that name.

        A gateway's 404 proves nothing: a create request may have taken effect, and for any other call, the
        list endpoint must return 404, too.
        """
        is_heygens = isinstance(error, HeyGenNotFoundError)
        of_collection = is_heygens and call.is_collection
        if self.settings.resource or (self.known_resource and not of_collection):
            return False
        if call.method == "POST":
            of_content = error.param or error.code == "asset_not_found"
            if self.known_resource or of_content or not is_heygens:
                return False
        elif not of_collection and await self._has_collection(name, send):
            return False
        if await self._has_collection(RESOURCES[1 - RESOURCES.index(name)], send, certain=is_heygens):
            return True
        error.message += (
            " Neither 'overdubs' nor 'lipsyncs', HeyGen's names for the resource, is known at"
            f" {self.settings.base_url}. Check the host of Airflow connection '{self.heygen_conn_id}'."
        )
        error.args = (error.message,)
        return False

    async def _has_collection(self, name: str, send: _Send, *, certain: bool = False) -> bool:
        """
        Return whether HeyGen has a collection of that name, and remember the name.

        :param certain: raise the error if a gateway, and not HeyGen, returns 404.
        """
        try:
            await send(api.list_overdubs(1, None).under(name))
        except HeyGenError as error:
            if error.status_code != 404 or (certain and isinstance(error, HeyGenGatewayError)):
                raise
            return False
        _detected[self._account] = name
        self.created_under = self.created_under and name
        return True


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits for an event loop, so that worker and triggerer share its code."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError


@contextmanager
def _unless_done(lost: list[bool]) -> Iterator[None]:
    """Make one attempt to delete; after a lost response, a 404 means that an attempt succeeded."""
    try:
        yield
    except HeyGenError as error:
        if not (any(lost) and isinstance(error, HeyGenNotFoundError)):
            lost.append(error.outcome_unknown)
            raise


def _falls(times: list[float]) -> bool:
    return times == sorted(times, reverse=True) and math.inf > times[0] > times[-1]


class _Search:
    """
    The search for the overdub of a create request whose response was lost, in several passes.

    :ivar candidates: ids of overdubs that it may be, or why that cannot be determined.
    :ivar pages: number of pages that the last pass has read.
    :ivar pages_left: number of pages that further passes may read.
    """

    def __init__(
        self, hook: HeyGenHook, request: api.CreateOverdubRequest, key: str, first: float, last: float
    ) -> None:
        self.hook, self.title, self.first, self.last = hook, request.title, first, last
        self.callback_id = request.callback_id or key
        self.is_unique = self.callback_id == key
        self.candidates: list[str] = []
        self.pages, self.pages_left, self.gets_left = 0, MAX_SEARCH_PAGES, MAX_CANDIDATE_GETS
        self._overdubs: dict[str, api.Overdub] = {}

    def run(self) -> api.Overdub | None:
        """Read the list, and each possible overdub without a ``callback_id``; return a certain match."""
        self.candidates, self.pages = [], 0
        try:
            return self._run()
        except HeyGenPermanentError as error:
            self.candidates = [f"the list cannot be read: {error}"]
            return None

    def _run(self) -> api.Overdub | None:
        unnamed = {}
        for row, created_at, distance in self._rows():
            if self._is_match(row):
                return row
            if row.callback_id is None and distance is not None:
                unnamed[row.overdub_id] = (distance, -created_at, row.overdub_id)
        # The nearest to the time of sending comes first. If several are equally near, it is the newest.
        for *_, overdub_id in sorted(unnamed.values(), key=lambda candidate: candidate[:2]):
            overdub = self._get(overdub_id)
            if overdub is not None and self._is_match(overdub):
                return overdub
            # HeyGen may choose the title of an overdub whose request has none.
            if overdub is None or (overdub.callback_id is None and self._has_title(overdub.title)):
                self.candidates.append(overdub_id)
        return None

    def _rows(self) -> Iterator[tuple[api.Overdub, float, float | None]]:
        """
        Yield the rows of the list until all further ones are too old.

        :returns: row, time of creation, and distance from the last attempt in seconds (``None``: too old).
        """
        times: list[float] = []
        for page in self.hook._pages():
            self.pages, self.pages_left = self.pages + 1, self.pages_left - 1
            # HeyGen's clock may differ widely from this machine's.
            offset = 0.0 if page.server_time is None else page.server_time - time.time()
            any_old = False
            for row in page.data:
                created_at = math.inf if row.created_at is None else row.created_at
                times.append(created_at)
                # Old by both clocks, because one of them may have been set in the meantime.
                is_old = created_at < self.first + min(offset, 0.0) - SEARCH_SECONDS
                any_old = any_old or is_old
                distance = max(0.0, abs(created_at - self.last - offset) - CLOCK_NOISE_SECONDS)
                yield row, created_at, None if is_old else distance
            # HeyGen does not document the order. A full page of falling times is sufficient evidence.
            is_full = len(page.data) >= api.MAX_PAGE_SIZE
            if not page.has_more or (is_full and any_old and _falls(times)):
                return
            if self.pages_left <= 0:
                break
            self._keep_to_rate()
        self.candidates.append("further overdubs, the list is too long to be read to its end")

    def _is_match(self, overdub: api.Overdub) -> bool:
        """Return whether this is certainly the overdub; if its ``callback_id`` is not unique, note it."""
        if overdub.callback_id != self.callback_id:
            return False
        if not self.is_unique:
            self.candidates.append(overdub.overdub_id)
        return self.is_unique

    def _has_title(self, title: str | None) -> bool:
        """Return whether a title may be that of the request; HeyGen may have trimmed or shortened it."""
        wanted, found = (
            " ".join(unicodedata.normalize("NFC", text or "").split()) for text in (self.title, title)
        )
        return not wanted or bool(found and (wanted.startswith(found) or found.startswith(wanted)))

    def _get(self, overdub_id: str) -> api.Overdub | None:
        if overdub_id not in self._overdubs and self.gets_left > 0:
            self.gets_left -= 1
            self._keep_to_rate()
            try:
                self._overdubs[overdub_id] = self.hook.get_overdub(overdub_id)
            except HeyGenNotFoundError as error:
                # The overdub is too new, or was deleted after the list was read.
                raise HeyGenTransientError(str(error), outcome_unknown=True) from None
        return self._overdubs.get(overdub_id)

    def _keep_to_rate(self) -> None:
        time.sleep(1 / self.hook.settings.max_requests_per_second)
