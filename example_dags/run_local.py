"""
Run the example DAGs on this machine, with the emulator instead of HeyGen: `make demo` and `make ui`.

All files are in the folder `.local`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_provider_heygen.emulator import Behaviour, Emulator
from airflow_provider_heygen.emulator.media import decode_audio, decode_frames, make_audio, make_video, probe

if TYPE_CHECKING:
    from collections.abc import Iterator

DAGS = Path(__file__).resolve().parent
HOME = DAGS.parent / ".local"
MEDIA = HOME / "media"
DEMO_DAG = "example_heygen_overdub"
LANGUAGES = {"de": 880, "fr": 990, "es": 1170}  # a tone for each, in Hz

SHOWN_STATES = {
    "deferred": "waits in the triggerer, no worker is held",
    "success": "",
    "up_for_retry": "",
    "failed": "",
}
ENDED = {"success", "failed"}


def environment(port: int) -> dict[str, str]:
    """Return the environment of an Airflow whose files are in the folder."""
    return {
        # Without the settings of another Airflow, such as its database.
        **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")},
        # `airflow standalone` starts its components by the name `airflow`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "AIRFLOW_HOME": str(HOME / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        # On a slow machine, Airflow's default of 5 s is too short at the start.
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "30",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
        "HEYGEN_EXAMPLE_MEDIA": str(MEDIA),
    }


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def make_inputs() -> None:
    """Make a video with a tone, and another tone for each language."""
    MEDIA.mkdir(parents=True, exist_ok=True)
    make_video(MEDIA / "talk.mp4", seconds=4, hz=440)
    for language, hz in LANGUAGES.items():
        make_audio(MEDIA / f"talk.{language}.mp3", seconds=4, hz=hz)


def airflow(env: dict[str, str], *arguments: str) -> None:
    """Run one of Airflow's commands; show its output only if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "airflow", *arguments], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"airflow {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def prepare(env: dict[str, str], heygen: Emulator) -> None:
    """Make the inputs, and a database with the example DAGs and a connection to the emulator."""
    make_inputs()
    airflow(env, "db", "migrate")
    connections = HOME / "connections.json"
    connections.write_text(json.dumps({"heygen_default": heygen.connection()}))
    airflow(env, "connections", "import", "--overwrite", str(connections))
    airflow(env, "dags", "reserialize")


@contextmanager
def running_airflow(env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run scheduler, triggerer, DAG processor and API server; stop all of them at the end."""
    command = [sys.executable, "-m", "airflow", "standalone"]
    with log.open("wb") as output:
        standalone = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield standalone
    finally:
        standalone.terminate()
        with suppress(subprocess.TimeoutExpired):
            standalone.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(standalone.pid, signal.SIGKILL)
        standalone.wait()


def is_healthy(port: int) -> bool:
    """Return whether every component of Airflow is healthy."""
    with suppress(OSError, ValueError):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/monitor/health", timeout=5) as response:
            parts = json.load(response)
        return all(part["status"] == "healthy" for part in parts.values())
    return False


def states_of_run() -> tuple[str, dict[str, str]]:
    """Return the states of the newest DAG run and of its tasks, from Airflow's database."""
    query = """
        SELECT run.state, task.task_id, task.state FROM dag_run AS run
        LEFT JOIN task_instance AS task ON task.dag_id = run.dag_id AND task.run_id = run.run_id
        WHERE run.id = (SELECT MAX(id) FROM dag_run WHERE dag_id = ?)
    """
    with closing(sqlite3.connect(f"file:{HOME / 'airflow' / 'airflow.db'}?mode=ro", uri=True)) as database:
        rows = database.execute(query, (DEMO_DAG,)).fetchall()
    return rows[0][0] if rows else "", {task: state or "waiting" for _, task, state in rows if task}


def follow(heygen: Emulator, standalone: subprocess.Popen[bytes]) -> dict[str, str]:
    """Print the progress of the newest DAG run until it ends; return the last states of its tasks."""
    began = time.monotonic()
    shown: dict[str, str] = {}
    last_status = ""
    while time.monotonic() - began < 300 and standalone.poll() is None:
        run, states = states_of_run()
        for task, state in states.items():
            if state in SHOWN_STATES and shown.get(task) != state:
                shown[task] = state
                print(f"\r   {task:<13} {state:<9} {SHOWN_STATES[state]:<40}", flush=True)
        if run in ENDED:
            return states
        if sys.stdout.isatty():
            status = f", HeyGen: {heygen.jobs[-1].status}" if heygen.jobs else ""
            print(f"\r   ... {time.monotonic() - began:3.0f} s{status:<30}", end="", flush=True)
        elif heygen.jobs and heygen.jobs[-1].status != last_status:
            last_status = heygen.jobs[-1].status
            print(f"   ... {time.monotonic() - began:3.0f} s, HeyGen: {last_status}", flush=True)
        time.sleep(0.5)
    return {}


def demo() -> None:
    """Dub one video, and check that the result is the video with the new audio."""
    result = MEDIA / "talk.dubbed.mp4"
    result.unlink(missing_ok=True)
    log = HOME / "demo.log"
    with Emulator(Behaviour(pending_seconds=3, running_seconds=7)) as heygen:
        print(f"1. The HeyGen emulator listens at {heygen.url}.", flush=True)
        env = environment(free_port())
        print("2. Make a test video, a new audio track and Airflow's database.", flush=True)
        prepare(env, heygen)
        print("3. Start Airflow with all components.", flush=True)
        with running_airflow(env, log) as standalone:
            print(f"4. Run the DAG {DEMO_DAG} (Airflow's log: {log}).")
            airflow(env, "dags", "trigger", DEMO_DAG)
            states = follow(heygen, standalone)
        if set(states.values()) != {"success"}:
            sys.exit(f"The DAG did not succeed; see {log} and {HOME / 'airflow' / 'logs'}")

    made = probe(result)
    sound, frames = decode_audio(result), decode_frames(result)
    print("5. Check the result:")
    print(f"   {made.duration} s, {made.width}x{made.height}, {made.video_codec} and {made.audio_codec}")
    new_sound = sound == decode_audio(MEDIA / "talk.de.mp3") and sound != decode_audio(MEDIA / "talk.mp4")
    original = decode_frames(MEDIA / "talk.mp4")
    length = min(len(frames), len(original))
    same_picture = length > 0 and frames[:length] == original[:length]
    print(f"   audio: {'the uploaded one, sample by sample' if new_sound else 'NOT the uploaded one'}")
    print(f"   picture: {'that of the video, frame by frame' if same_picture else 'NOT that of the video'}")
    if not (new_sound and same_picture):
        sys.exit("The result is not the dubbed video.")
    print(f"\nDubbed: {result}")


def ui(port: int) -> None:
    """Serve Airflow's web UI with the example DAGs, until Ctrl-C."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        sys.exit(f"Port {port}: {os.strerror(error.errno or 0)}. Choose another one: make ui PORT={port + 1}")
    log = HOME / "ui.log"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), Emulator(Behaviour(pending_seconds=5, running_seconds=15)) as heygen:
        print(f"HeyGen emulator: {heygen.url}, its state: {heygen.url}/emulator/state", flush=True)
        print(f"Airflow starts within about half a minute. Its output: {log}", flush=True)
        env = environment(port)
        prepare(env, heygen)
        with running_airflow(env, log) as standalone:
            while standalone.poll() is None and not is_healthy(port):
                time.sleep(1)
            if standalone.poll() is None:
                print(
                    f"Ready: http://127.0.0.1:{port} (no login). Ctrl-C ends Airflow and emulator.",
                    flush=True,
                )
            standalone.wait()
        sys.exit(f"Airflow has ended; see {log}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["demo", "ui"])
    parser.add_argument("--port", type=int, default=8080, help="port of the web UI")
    arguments = parser.parse_args()
    demo() if arguments.command == "demo" else ui(arguments.port)
