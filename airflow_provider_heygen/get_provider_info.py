"""What Airflow registers: the connection type with its form, and which modules hold what."""

from __future__ import annotations

from typing import Any

_NAME = "HeyGen"


def _modules(*names: str) -> list[dict[str, Any]]:
    return [
        {"integration-name": _NAME, "python-modules": [f"airflow_provider_heygen.{name}" for name in names]}
    ]


def _seconds(label: str, default: int, description: str) -> dict[str, Any]:
    return {
        "label": label,
        "schema": {"type": ["number", "null"], "minimum": 1},
        "description": f"{description} Default: {default}.",
    }


def _choice(label: str, words: dict[str, str], description: str, default: str | None) -> dict[str, Any]:
    """
    Describe a select.

    :param words: what is stored, and how the form names it. ``None`` is not among them, although the form
        stores it when the select is emptied: it would be a choice of its own beside the default.
    """
    schema = {"type": ["string", "null"], "enum": list(words), "values_display": words}
    return {
        "label": label,
        "schema": schema if default is None else {**schema, "default": default},
        "description": description,
    }


def get_provider_info() -> dict[str, Any]:
    """Return the metadata in the form of Airflow's ``provider_info`` schema."""
    return {
        "package-name": "airflow-provider-heygen",
        "name": _NAME,
        "description": "Dub videos with HeyGen: put a new audio track on a video, lips re-synced.",
        "integrations": [
            {
                "integration-name": _NAME,
                "external-doc-url": "https://developers.heygen.com/",
                "tags": ["service"],
            }
        ],
        "hooks": _modules("hooks.heygen"),
        "operators": _modules("operators.overdub", "operators.asset"),
        "sensors": _modules("sensors.overdub"),
        "triggers": _modules("triggers.overdub"),
        "transfers": [
            {
                "source-integration-name": _NAME,
                "target-integration-name": "Common IO",
                "python-module": "airflow_provider_heygen.transfers.heygen_to_object_storage",
            }
        ],
        "extra-links": ["airflow_provider_heygen.plugin.WatchLink"],
        "asset-uris": [
            {
                "schemes": ["heygen"],
                "handler": "airflow_provider_heygen.lineage.sanitize_uri",
                "to_openlineage_converter": "airflow_provider_heygen.lineage.convert_asset",
            }
        ],
        "connection-types": [
            {
                "connection-type": "heygen",
                "hook-class-name": "airflow_provider_heygen.hooks.heygen.HeyGenHook",
                "hook-name": _NAME,
                "ui-field-behaviour": {
                    "hidden-fields": ["login", "schema", "port"],
                    "relabeling": {"host": "Base URL", "password": "API key or OAuth token"},
                    "placeholders": {"host": "https://api.heygen.com"},
                },
                "conn-fields": {
                    "auth_type": _choice(
                        "Auth type",
                        {"api_key": "API key", "oauth": "OAuth access token"},
                        "Which of the two is among the standard fields. An API key is billed to the API"
                        " wallet, an OAuth access token to the web plan.",
                        "api_key",
                    ),
                    "resource": _choice(
                        "Resource",
                        {"overdubs": "overdubs", "lipsyncs": "lipsyncs"},
                        "The name of the resource in HeyGen's API: overdubs became lipsyncs"
                        " in 2026. If empty, the provider finds out.",
                        None,
                    ),
                    "connect_timeout": _seconds("Connect timeout", 10, "Seconds to reach HeyGen."),
                    "read_timeout": _seconds(
                        "Read timeout", 30, "Seconds to wait for the response to a GET request."
                    ),
                    "write_timeout": _seconds(
                        "Write timeout",
                        120,
                        "Seconds to wait for the response to a create request; HeyGen may take 30.",
                    ),
                    "upload_timeout": _seconds(
                        "Upload timeout", 600, "Longest silence during an upload, in seconds."
                    ),
                    "max_requests_per_second": {
                        "label": "Requests per second",
                        # The form knows no exclusive minimum.
                        "schema": {"type": ["number", "null"], "minimum": 0.1},
                        "description": "Maximum number of polls per second of one triggerer, for all waiting"
                        " overdubs. Default: 5.",
                    },
                    "max_concurrent_jobs": {
                        "label": "Concurrent jobs",
                        "schema": {"type": ["integer", "null"], "minimum": 1},
                        "description": "How many jobs HeyGen runs at a time for the account."
                        " Empty: learned from HeyGen's 429 responses.",
                    },
                    "allow_http": {
                        "label": "Allow plain http",
                        "schema": {"type": ["boolean", "null"], "default": False},
                        "description": "Send the credential unencrypted to a host that is not this machine.",
                    },
                    "allow_private_hosts": {
                        "label": "Allow private hosts",
                        "schema": {"type": ["boolean", "null"], "default": False},
                        "description": "Follow result and upload URLs into private networks,"
                        " as with the emulator on this machine.",
                    },
                },
            }
        ],
    }
