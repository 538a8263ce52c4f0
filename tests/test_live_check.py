"""`make live-check`, rehearsed on the emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from airflow_provider_heygen.emulator.media import make_audio, make_video

SCRIPT = Path(__file__).with_name("live_check.py")


@pytest.mark.parametrize("reply", ["y", "n", ""])
def test_it_asks_and_leaves_nothing_behind(heygen, tmp_path, reply):
    make_video(tmp_path / "v.mp4", seconds=1)
    make_audio(tmp_path / "a.mp3", seconds=1)
    heygen.behaviour.get_lag = 0.3
    command = [sys.executable, SCRIPT, "v.mp4", "a.mp3", "--host", heygen.url, "--poke-interval", "0.5"]
    env = {**os.environ, "HEYGEN_API_KEY": heygen.connection()["password"]}
    done = subprocess.run(
        command, input=f"{reply}\n", env=env, cwd=tmp_path, text=True, capture_output=True, check=False
    )
    costs = [request.path for request in heygen.requests if request.method == "POST"]
    if reply != "y":
        assert (done.returncode, costs) == (1, []), done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert costs == ["/v3/assets", "/v3/assets", "/v3/overdubs"]
    assert (heygen.assets, [job.deleted for job in heygen.jobs]) == ([], [True])
    assert (tmp_path / ".local" / "live-check.mp4").stat().st_size > 0
    assert env["HEYGEN_API_KEY"] not in done.stdout + done.stderr
