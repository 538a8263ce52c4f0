"""What can go wrong, by what the caller should do about it.

Two branches matter to Airflow: a :class:`HeyGenTransientError` is worth another try, a
:class:`HeyGenPermanentError` is also an ``AirflowFailException``, so a task that meets one fails at once
instead of burning its retries. Which HTTP answer becomes which is decided in :mod:`.api`.
"""

from __future__ import annotations

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException


class HeyGenError(AirflowException):
    """
    Anything this provider raises about HeyGen.

    The message already says what to do next. The attributes carry what HeyGen said (contract: the
    ``error`` envelope), each ``None`` when it did not.

    :param message: text for people, free of credentials and presigned links.
    :param status_code: HTTP status of the answer; ``None`` when there was none (transport, bad input).
    :param code: HeyGen's machine readable code, an open set, such as ``rate_limit_exceeded``.
    :param param: the request field HeyGen complains about.
    :param doc_url: HeyGen's page about the code.
    :param request_id: the ``X-Request-Id`` to quote to HeyGen's support.
    :param retry_after: seconds HeyGen asked to wait.
    :param outcome_unknown: the request may have taken effect although its answer never arrived or was
        unreadable. Repeating a create is then only safe after a look whether the overdub exists.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        code: str | None = None,
        param: str | None = None,
        doc_url: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        outcome_unknown: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status_code = status_code  # type: ignore[assignment]  # Airflow's own is always 500
        self.code = code
        self.param = param
        self.doc_url = doc_url
        self.request_id = request_id
        self.retry_after = retry_after
        self.outcome_unknown = outcome_unknown


class HeyGenTransientError(HeyGenError):
    """Likely to pass: 429, 5xx, a network fault, an unreadable answer, 409 ``request_in_progress``."""


class HeyGenPermanentError(HeyGenError, AirflowFailException):
    """The same request will fail again: the task fails at once, whatever its ``retries``."""


class HeyGenBadInputError(HeyGenPermanentError, ValueError):
    """Refused on this side, before any request was sent: a field, a file or a connection setting is wrong."""


class HeyGenNotFoundError(HeyGenPermanentError):
    """HTTP 404: no such overdub or asset under this credential."""


class HeyGenOutcomeUnknownError(HeyGenPermanentError):
    """A create may or may not have started an overdub, and sending it again could start a second one."""


class HeyGenOverdubFailedError(HeyGenPermanentError):
    """The overdub ended with status ``failed``; the message carries HeyGen's ``failure_message``."""


class HeyGenOverdubTimeoutError(HeyGenError):
    """We stopped waiting. The overdub itself goes on and may still complete (and be billed)."""


class HeyGenTriggerEventError(HeyGenError):
    """A deferred task was resumed with an event that our trigger never sends."""
