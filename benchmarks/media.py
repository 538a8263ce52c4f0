"""
Cost of moving 1 GB: upload and download by the hook and by curl, on the same server in the same run.

    python benchmarks/media.py [--megabytes N] [--rounds N]

The server is a separate process on loopback that only moves bytes, so that it limits neither side. The files
are in memory if /dev/shm has room. The provider and curl take turns, and each figure is from the quickest
round, which other work disturbed the least. Each transfer of the provider is a new process that has imported
everything; its memory is the peak of the resident set above the size before the transfer.

HeyGen's direct upload (above 32 MB) requires the file's SHA-256 before the first byte, so the file is read
twice. For "upload", sha256sum runs before curl. For "upload_links", curl downloads the file first.

Exits with an error if the provider has less than 0.8 of curl's throughput or needs more than 64 MiB.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MIN_RATIO = 0.8
MAX_MIB = 64.0


def client(way: str, path: str) -> None:
    """Move the file once; print the seconds and the MiB of memory above the baseline."""
    from airflow.providers.common.compat.sdk import ObjectStoragePath, get_hook_lineage_collector

    from airflow_provider_heygen.hooks.heygen import HeyGenHook
    from airflow_provider_heygen.upload import check_inputs

    def resident(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    hook = HeyGenHook()
    hook.get_overdub("od_1")  # opens the connection
    get_hook_lineage_collector()  # reads Airflow's providers, once per process
    if way != "upload_links":
        ObjectStoragePath(path).exists()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    before, began = resident("VmRSS"), time.perf_counter()
    if way == "download":
        hook.download_overdub("od_1", path)
    else:
        video = path if way == "upload_links" else f"file://{path}"
        (source,) = check_inputs({"video": video}, hook, {}).values()
        hook.upload_asset(source)
    print(json.dumps([time.perf_counter() - began, resident("VmHWM") - before]))


class Server(BaseHTTPRequestHandler):
    """The endpoints of HeyGen and of its storage that the hook calls."""

    protocol_version = "HTTP/1.1"
    source: Path

    def do_GET(self) -> None:
        """Send the file, or an overdub whose video it is."""
        if self.path.startswith("/v3/"):
            self.respond({"id": "od_1", "status": "completed", "video_url": f"{self.url}/file.mp4"})
            return
        with self.source.open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Type", "video/mp4")
            self.send_header("Content-Length", str(self.source.stat().st_size))
            self.end_headers()
            self.wfile.flush()
            self.connection.sendfile(file)

    def do_POST(self) -> None:
        """Begin or complete a direct upload."""
        self.discard_body()
        slot = {"upload_url": f"{self.url}/upload", "upload_headers": {"Content-Type": "video/mp4"}}
        self.respond({"asset_id": "asset_1", "status": "processing", **slot})

    def do_PUT(self) -> None:
        """Read a file and discard it."""
        self.discard_body()
        self.respond({})

    @property
    def url(self) -> str:
        """URL of this server."""
        return f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]

    def discard_body(self) -> None:
        """Read the body and discard it."""
        left = int(self.headers["Content-Length"])
        buffer = memoryview(bytearray(1 << 20))
        while left:
            got = self.rfile.readinto(buffer[: min(left, len(buffer))])
            if not got:
                return
            left -= got

    def respond(self, data: dict[str, object]) -> None:
        """Send a JSON response."""
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Loopback(ThreadingHTTPServer):
    """Does not report a client that disconnects early."""

    def handle_error(self, *arguments: object) -> None:
        """Report any other error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*arguments)  # type: ignore[arg-type]


@contextmanager
def serving(source: Path) -> Iterator[str]:
    """Serve a file on loopback from another process; yield the URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(source), str(port)])
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def curl(*arguments: str) -> float:
    """Run curl; return its own measure of the seconds."""
    command = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "--write-out", "%{time_total}"]
    done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.rpartition("}")[2])


def checksum(path: Path) -> float:
    """Run sha256sum; return the seconds."""
    began = time.perf_counter()
    subprocess.run(["sha256sum", str(path)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def provider(way: str, path: object, env: dict[str, str]) -> list[float]:
    """Run :func:`client` in a new process; return what it prints."""
    command = [sys.executable, "-W", "ignore", __file__, "--client", way, str(path)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"The {way} failed, see above.")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def make(path: Path, size: int) -> None:
    """Write a file that is detected as mp4."""
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        file.write(b"\0\0\0\x14ftypisom\0\0\2\0mp41\0\0\0\x08mdat")
        while file.tell() < size:
            file.write(block[: size - file.tell()])


def main() -> None:
    """Measure, print the table, check the limits."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="transfers each (default: %(default)s)")
    options = parser.parse_args()
    for tool in ("curl", "sha256sum"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is missing: this compares with it.")
    if options.megabytes < 33 or options.rounds < 1:
        parser.error("--megabytes must be at least 33, for a direct upload, and --rounds at least 1")

    size = options.megabytes * 10**6
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and shutil.disk_usage(shared).free > 3 * size
    with tempfile.TemporaryDirectory(prefix="heygen-bench-", dir=shared if in_memory else None) as folder:
        source, target = Path(folder, "source.mp4"), Path(folder, "target.mp4")
        make(source, size)
        with serving(source) as url:
            extra = {"allow_private_hosts": True, "resource": "lipsyncs", "trust_env": False}
            connection = {"conn_type": "heygen", "host": url, "password": "key", "extra": extra}
            env = {
                **os.environ,
                "AIRFLOW_HOME": folder,
                "TMPDIR": folder,
                "AIRFLOW_CONN_HEYGEN_DEFAULT": json.dumps(connection),
                "AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING",
            }
            link = f"{url}/file.mp4"
            named = {"download": target, "upload": source, "upload_links": link}
            times: dict[str, list[float]] = {}
            peaks = dict.fromkeys(named, 0.0)
            for _ in range(options.rounds):
                for way in named:
                    seconds = curl("--output", str(target), link) if way != "upload" else 0.0
                    if way != "download":
                        sent = source if way == "upload" else target
                        seconds += checksum(sent) + curl("--upload-file", str(sent), link)
                    times.setdefault(f"curl {way}", []).append(seconds)
                    target.unlink(missing_ok=True)
                    seconds, peak = provider(way, named[way], env)
                    if way == "download" and not filecmp.cmp(source, target, shallow=False):
                        sys.exit("The downloaded file differs from the one on the server.")
                    target.unlink(missing_ok=True)
                    times.setdefault(way, []).append(seconds)
                    peaks[way] = max(peaks[way], peak)

    best = {name: size / 1e6 / min(found) for name, found in times.items()}
    place = "in memory" if in_memory else "on disk"
    print(f"{options.megabytes} MB {place} on loopback, quickest of {options.rounds}\n")
    print(f"{'':15}  {'curl MB/s':>9}  {'provider MB/s':>13}  {'ratio':>5}  {'peak MiB over baseline':>22}")
    missed = []
    for way, peak in peaks.items():
        ratio = best[way] / best[f"curl {way}"]
        print(f"{way:15}  {best[f'curl {way}']:9.0f}  {best[way]:13.0f}  {ratio:5.2f}  {peak:22.1f}")
        if ratio < MIN_RATIO or peak > MAX_MIB:
            missed.append(way)
    if missed:
        sys.exit(f"MISSED (at least {MIN_RATIO:g} of curl, at most {MAX_MIB:g} MiB): {', '.join(missed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        Server.source = Path(sys.argv[2])
        Loopback(("127.0.0.1", int(sys.argv[3])), Server).serve_forever()
    elif sys.argv[1:2] == ["--client"]:
        client(*sys.argv[2:])
    else:
        main()
