"""``python -m airflow_provider_heygen.emulator``: serve until SIGINT or SIGTERM."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import sys
import threading

from pydantic import ValidationError

from airflow_provider_heygen.emulator import API_KEY, OAUTH_TOKEN, Behaviour, Emulator


def _port(text: str) -> int:
    if not 0 <= (port := int(text)) < 1 << 16:
        raise ValueError(text)  # argparse's own message names the option
    return port


def main() -> None:
    """Parse the command line, serve, and clean up."""
    parser = argparse.ArgumentParser(
        "python -m airflow_provider_heygen.emulator",
        description="An emulator of HeyGen that runs on your own machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=_port, default=8000, help="0 for a free port")
    parser.add_argument("--api-key", default=API_KEY, help="the API key that it accepts")
    parser.add_argument("--oauth-token", default=OAUTH_TOKEN, help="the OAuth token that it accepts")
    group = parser.add_argument_group("behaviour", "may be changed later by PATCH /emulator/behaviour")
    for name, field in Behaviour.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(field.default, bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, help=field.description, default=field.default)
        elif isinstance(field.default, tuple):
            group.add_argument(flag, nargs="*", help=field.description, default=field.default)
        else:
            group.add_argument(flag, help=field.description, default=field.default)
    options = vars(parser.parse_args())
    server = {name: options.pop(name) for name in ("host", "port", "api_key", "oauth_token")}
    try:
        behaviour = Behaviour.model_validate(options)
    except ValidationError as error:
        sys.exit(str(error))

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    heygen = Emulator(behaviour, **server)
    try:
        heygen.start()
    except OSError as error:
        wrong = "host" if isinstance(error, socket.gaierror) else "port"
        sys.exit(f"{wrong.title()} {server[wrong]}: {error.strerror}. Choose another one with --{wrong}.")
    try:
        print(f"HeyGen emulator: {heygen.url}")
        print(f"Admin: {heygen.url}/emulator/state")
        print(f"Airflow connection: {json.dumps(heygen.connection())}", flush=True)
        stop.wait()
    finally:
        heygen.stop()


if __name__ == "__main__":
    main()
