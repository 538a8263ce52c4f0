"""What Airflow registers: the connection type with its form, and the modules."""

from __future__ import annotations

from typing import Any

_NAME = "HeyGen"


def _modules(*names: str) -> list[dict[str, Any]]:
    return [
        {"integration-name": _NAME, "python-modules": [f"airflow_provider_heygen.{name}" for name in names]}
    ]


def _field(label: str, kind: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"label": label, "schema": {"type": [kind, "null"], **schema}, "description": description}


def _seconds(label: str, default: int, description: str) -> dict[str, Any]:
    return _field(label, "number", f"{description} Default: {default}.", minimum=1)


def _choice(label: str, names: dict[str, str], description: str, **schema: Any) -> dict[str, Any]:
    # The form stores None for an emptied select. As a member of the enum, it would be a choice of its own.
    return _field(label, "string", description, enum=list(names), values_display=names, **schema)


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
                        "The kind of credential in the standard fields. HeyGen bills an API key to the API"
                        " wallet, and an OAuth access token to the web plan.",
                        default="api_key",
                    ),
                    "resource": _choice(
                        "Resource",
                        {"overdubs": "overdubs", "lipsyncs": "lipsyncs"},
                        "Name of the resource in HeyGen's API: overdubs became lipsyncs"
                        " in 2026. If empty, the provider detects it.",
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
                    "max_requests_per_second": _field(
                        "Requests per second",
                        "number",
                        "Maximum number of polls per second of one triggerer, for all waiting overdubs."
                        " Default: 5.",
                        minimum=0.1,  # the form supports no exclusive minimum
                    ),
                    "max_concurrent_jobs": _field(
                        "Concurrent jobs",
                        "integer",
                        "Maximum number of jobs that HeyGen runs at a time for the account. If empty, learned"
                        " from HeyGen's 429 responses.",
                        minimum=1,
                    ),
                    "allow_http": _field(
                        "Allow plain http",
                        "boolean",
                        "Send the credential unencrypted to a host that is not this machine.",
                        default=False,
                    ),
                    "allow_private_hosts": _field(
                        "Allow private hosts",
                        "boolean",
                        "Follow result and upload URLs into private networks, as with the emulator on this"
                        " machine.",
                        default=False,
                    ),
                },
            }
        ],
    }
