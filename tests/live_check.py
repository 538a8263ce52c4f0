"""
A check against HeyGen itself: one short overdub, from upload to deletion.

    HEYGEN_API_KEY=... make live-check VIDEO=talk.mp4 AUDIO=talk.de.mp3

The video must show a speaker. A few seconds are enough: every second costs money. The check asks before it
uploads anything, prints each step, saves the result as `.local/live-check.mp4`, and deletes
the overdub and the assets. All other tests use the emulator.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

RESULT = Path(".local/live-check.mp4")


def main() -> int:
    """Ask, then run each step and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("audio", type=Path)
    parser.add_argument("--host", help="an emulator to rehearse on")
    parser.add_argument("--poke-interval", type=float, default=10.0)
    arguments = parser.parse_args()
    if not (key := os.environ.get("HEYGEN_API_KEY")):
        parser.error("set HEYGEN_API_KEY to an API key of HeyGen")
    connection = {"conn_type": "heygen", "password": key, "host": arguments.host}
    if arguments.host:
        connection["extra"] = {"allow_http": True, "allow_private_hosts": True}
    os.environ["AIRFLOW_CONN_HEYGEN_DEFAULT"] = json.dumps(connection)
    from airflow_provider_heygen.hooks.heygen import HeyGenHook  # reads Airflow's settings

    with HeyGenHook() as hook:
        well, message = hook.test_connection()
        print(message)
        if not well:
            return 1
        question = f"Dub {arguments.video} with {arguments.audio}? HeyGen charges for each second. [y/N] "
        if input(question).strip().lower() != "y":
            print("Nothing was uploaded, and no overdub was started.")
            return 1
        assets = {name: hook.upload_asset(getattr(arguments, name).resolve()) for name in ("video", "audio")}
        print("Uploaded", ", ".join(f"{name} {asset.asset_id}" for name, asset in assets.items()))
        media = {name: {"type": "asset_id", "asset_id": asset.asset_id} for name, asset in assets.items()}
        overdub_id = hook.create_overdub({**media, "title": "airflow-provider-heygen live check"})
        print(f"Started overdub {overdub_id} under the name '{hook.resource}'")
        began = time.monotonic()
        time.sleep(arguments.poke_interval)  # a new overdub may be a 404 for a moment
        while not (overdub := hook.get_overdub(overdub_id)).is_final:
            print(f"  {overdub.status} after {time.monotonic() - began:.0f} s", flush=True)
            time.sleep(arguments.poke_interval)
        print(f"  {overdub.status} after {time.monotonic() - began:.0f} s: {overdub.details()}")
        overdub.raise_for_failure()
        RESULT.parent.mkdir(exist_ok=True)
        hook.download_overdub(overdub_id, RESULT.resolve(), overwrite=True)
        print(f"Saved {RESULT} ({RESULT.stat().st_size} bytes). Listed: {hook.is_listed(overdub_id)}")
        print("Renamed:", hook.update_overdub(overdub_id, "airflow-provider-heygen live check, done").title)
        hook.delete_overdub(overdub_id)
        for asset in assets.values():
            hook.delete_asset(asset.asset_id)
        print("Deleted the overdub and both assets. The live check passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
