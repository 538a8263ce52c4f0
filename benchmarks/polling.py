"""
Cost of waiting in the triggerer: this provider's trigger and those of other providers on one server.

    python benchmarks/polling.py [--only TEXT] [--plot PATH]

Each case is N triggers of one kind in a process of its own (:mod:`polling_client`), all in one event loop as
in Airflow's triggerer; N = 1 is measured on 41 loops with one trigger each. The server
(:mod:`polling_server`) is another process, uses TLS and responds after 20 ms. Peers poll every 5 s and keep
their other defaults:

- HttpSensorTrigger polls a URL that returns 404 until the job has completed;
- DbtCloudRunJobTrigger, FivetranTrigger and AnthropicBatchTrigger poll a run, a connector and a batch. The
  URL of Fivetran's API is a class attribute, which is set; the other URLs are in the Airflow connection.

All clients trust only the server's certificate. That favours AnthropicBatchTrigger, which has a client for
each job: with the usual bundle of 130 certificates, each takes half a MB and some 30 ms to start.

A case has three phases:

- *join*: the triggers start, evenly over 5 s, so that their polls are spread as well; a peer has up to 25 s
  until each of its triggers has polled once;
- *hold*: no job completes for 5 or 10 s. Requests, connections, CPU and memory are measured here. A
  **job-poll** is one poll of one job; N x seconds / poll interval of them are due. A peer that sends
  clearly less than one request per job-poll is overloaded; its CPU is divided by the polls it made;
- *finish*: up to 500 jobs complete, evenly over 5 s, the others keep running. **Notice** is the time from
  completion to the trigger's event. A job not noticed before the end of the case counts as the time until
  then (``>``).

**KB per trigger** is the growth of resident memory, **stall** how much longer than 10 ms a 10 ms sleep on
the event loop takes, in join and finish. Compare only ratios within one run: other machines, and other work
on this one, change all figures. Exits with an error if a target is missed. Some targets assume that the peers
are overloaded; where they are not, a target may be below what is possible at all (the poll interval, the bare
trigger). It is then listed as such and not checked.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LATENCY = 0.02
JOIN = 5.0
FINISH = 5.0
FINISHING = 500
PATIENCE = 25.0
NOISE = 1.05  # a limit that is another's figure
GOLDEN = (math.sqrt(5) - 1) / 2

PEERS = {
    "http": ("HttpSensorTrigger", "apache-airflow-providers-http"),
    "dbt": ("DbtCloudRunJobTrigger", "apache-airflow-providers-dbt-cloud"),
    "fivetran": ("FivetranTrigger", "airflow-provider-fivetran-async"),
    "anthropic": ("AnthropicBatchTrigger", "apache-airflow-providers-anthropic"),
}


@dataclass(frozen=True, eq=False)
class Case:
    """
    One line of the table.

    :param kind: ``heygen``, ``idle`` or a peer.
    :param n: how many triggers.
    :param interval: poll interval in seconds.
    :param extra: what the Airflow connection says beyond the defaults.
    :param jobs: what else there is in the account, see :class:`polling_server.Jobs`.
    """

    kind: str
    n: int
    note: str = ""
    interval: float = 5.0
    extra: dict[str, Any] = field(default_factory=dict)
    jobs: dict[str, Any] = field(default_factory=dict)
    join: float = JOIN
    finish: float = FINISH
    drain: float = 12.0

    @property
    def name(self) -> str:
        """The name of the case in the table."""
        if self.kind == "idle":
            return "idle trigger"
        name = PEERS[self.kind][0] if self.kind in PEERS else "HeyGenOverdubTrigger"
        return ", ".join(filter(None, [name, f"{self.interval:g} s", self.note]))

    @property
    def hold(self) -> float:
        """Seconds of the hold phase: whole intervals, enough of them for a good mean."""
        return 5.0 if self.interval == 1.0 or (self.n >= 1000 and self.kind in PEERS) else 10.0

    @property
    def asks_for_each(self) -> bool:
        """Whether a request is one job-poll."""
        return self.kind in PEERS or self.jobs.get("listed") is False

    @property
    def loops(self) -> int:
        """How many event loops there are: a lonely trigger is measured more than once."""
        return 41 if self.n == 1 else 1


def capped(rate: float, **more: Any) -> dict[str, Any]:
    """Return the extra of a connection that allows so many requests per second."""
    return {"max_requests_per_second": rate, **more}


# The rate cap binds no peer. Where a case is about the cost of GETs, ours must be free to make as many.
FREE = 1000
OURS_5 = {n: Case("heygen", n) for n in (1, 100, 1000, 3000)}
OURS_1 = {
    n: Case("heygen", n, f"cap {cap}/s", interval=1.0, extra=capped(cap))
    for n, cap in {1000: 20, 3000: 40}.items()
}
# As many as the peers cannot cope with on a quick machine, either.
CROWD = Case("heygen", 6000, "cap 20/s", extra=capped(20), join=10.0)
MANY = Case("heygen", 10_000, "cap 20/s", extra=capped(20), join=10.0)
GETS = Case("heygen", 1000, "list unusable", extra=capped(FREE), jobs={"listed": False})
IDLE = Case("idle", 1000)
FOREIGN_GETS = Case("heygen", 200, "list unusable", extra=capped(FREE), jobs={"listed": False})
FOREIGN = {
    others: Case("heygen", 200, f"{others} foreign each", extra=capped(FREE), jobs={"foreign": others})
    for others in (1, 9, 99)
}
BULK = Case(
    "heygen", 200, "99 foreign each, lipsyncs", extra=capped(FREE, resource="lipsyncs"), jobs={"foreign": 99}
)
OLD = Case("heygen", 200, "20,000 old ones", jobs={"finished": 20_000})


def peers_at(n: int) -> list[Case]:
    """Return the peers' cases for one N."""
    return [Case(kind, n) for kind in PEERS]


# Those that cost next to nothing go side by side, each with its own server; all others go alone.
GROUPS = [
    [OURS_5[1], *peers_at(1)],
    [OURS_5[100], *peers_at(100)],
    [FOREIGN_GETS, *FOREIGN.values(), BULK, OLD],
    *([case] for case in [IDLE, OURS_5[1000], OURS_1[1000], GETS, *peers_at(1000)]),
    *([case] for case in [OURS_5[3000], OURS_1[3000], *peers_at(3000)]),
    *([case] for case in [CROWD, *peers_at(6000)]),
    [MANY],
]


@dataclass(frozen=True)
class Figures:
    """
    What one case gave.

    :param requests: per job-poll.
    :param connections: new ones per job-poll, while nothing starts or ends.
    :param opened: all connections of the case.
    :param cpu: seconds per 1,000 job-polls.
    :param memory: KB per trigger; ``None`` where there are too few to tell.
    :param notice_50: seconds from a completion to the event, median; ``notice_99`` the 99th percentile.
    :param unnoticed: how many were not noticed at the end.
    :param stall_99: seconds; ``stall_max`` the longest.
    :param peak: most requests within any one second.
    :param server: share of one core the server took.
    """

    requests: float
    connections: float
    opened: int
    cpu: float
    memory: float | None
    notice_50: float = math.nan
    notice_99: float = math.nan
    unnoticed: int = 0
    stall_99: float = math.nan
    stall_max: float = math.nan
    peak: int = 0
    server: float = 0.0


def percentile(values: list[float], share: float) -> float:
    """Return the value that a share of all values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else math.nan


def completions(case: Case, waiting: int, at: float) -> list[float | None]:
    """
    Say when which job completes.

    The jobs that complete are spread over all that wait. Their times follow the golden ratio, so they are
    even among any of them, such as those of one page or those whose triggers poll together.
    """
    if case.kind == "idle":
        return [None] * waiting
    ending = min(waiting, FINISHING)
    found: list[float | None] = [None] * waiting
    for turn in range(ending):
        found[turn * waiting // ending] = at + turn * GOLDEN % 1.0 * case.finish
    return found


def client(*args: Any) -> None:
    """Run as the client process of a case."""
    import polling_client  # Airflow and all peers; the process was forked from one that has them already

    polling_client.run(*args)


class Running:
    """A running case: its server and its client."""

    def __init__(self, case: Case, certificate: Path, context: Any, stack: ExitStack) -> None:
        self.case, self.waiting = case, max(case.n, case.loops)
        settings = {
            "jobs": {"awaited": self.waiting, **case.jobs},
            "latency": LATENCY,
            "certificate": str(certificate),
        }
        self.server = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(HERE / "polling_server.py"), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        port = int(self.server.stdout.readline())
        what = {"kind": case.kind, "n": self.waiting, "loops": case.loops, "interval": case.interval}
        self.pipe, theirs = context.Pipe()
        self.client = context.Process(
            target=client, args=({**what, "extra": case.extra}, port, theirs), daemon=True
        )
        self.client.start()
        theirs.close()

    def _tell(self, command: Any) -> None:
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()

    def _ask(self, command: str) -> Any:
        self._tell(command)
        return json.loads(self.server.stdout.readline())

    def begin(self) -> None:
        """Start the triggers."""
        self.pipe.recv()  # warm
        self.before = self._ask("seen")
        self.join = time.monotonic()
        self.pipe.send({"join": self.join, "join_seconds": self.case.join})

    def schedule(self) -> None:
        """Set the times at which hold and all that follows begin."""
        time.sleep(max(0.0, self.join + self.case.join + 1.0 - time.monotonic()))
        while self.case.kind in PEERS and time.monotonic() < self.join + PATIENCE:
            if self._ask("count") - len(self.before["requests"]) >= self.waiting:
                break
            time.sleep(0.5)
        # This provider polls when the clock is a multiple of the interval; the window must not cut a tick.
        interval = self.case.interval
        self.hold = (math.ceil((time.monotonic() + 0.2) / interval - 0.5) + 0.5) * interval
        self.finish = self.hold + self.case.hold
        self.done_at = completions(self.case, self.waiting, self.finish)
        self.finishing = sum(at is not None for at in self.done_at)
        self._tell(self.done_at)
        end = self.finish + self.case.finish + self.case.drain
        times = {"hold": self.hold, "finish": self.finish, "end": end, "finishing": self.finishing}
        self.pipe.send(times)

    def figures(self) -> Figures:
        """Wait for the end and count."""
        got = self.pipe.recv()
        seen = self._ask("seen")
        case = self.case
        if got["wrong"]:
            sys.exit(
                f"{case.name}: {len(got['wrong'])} triggers ended wrong, the first with {got['wrong'][0]}"
            )
        due = self.waiting * case.hold / case.interval
        held = {
            kind: bisect_left(seen[kind], self.finish) - bisect_left(seen[kind], self.hold)
            for kind in ("requests", "connections")
        }
        waits = [
            got["ended"].get(number, got["end"]) - at
            for number, at in enumerate(self.done_at, start=1)
            if at is not None
        ]
        after_warm = seen["requests"][len(self.before["requests"]) :]
        return Figures(
            requests=held["requests"] / due,
            connections=held["connections"] / due,
            opened=len(seen["connections"]) - len(self.before["connections"]),
            cpu=got["cpu"] / (held["requests"] if case.asks_for_each else due) * 1000,
            memory=got["memory"] / 1024 / got["started"] if case.n >= 1000 else None,
            notice_50=percentile(waits, 0.5),
            notice_99=percentile(waits, 0.99),
            unnoticed=self.finishing - len(got["ended"]),
            stall_99=percentile(got["stalls"], 0.99),
            stall_max=max(got["stalls"]),
            peak=max((bisect_left(after_warm, at + 1) - i for i, at in enumerate(after_warm)), default=0),
            server=(seen["cpu"] - self.before["cpu"]) / (got["end"] - self.join),
        )


def measure(group: list[Case], certificate: Path, context: Any) -> dict[Case, Figures]:
    """Run some cases side by side."""
    with ExitStack() as stack:
        running = [Running(case, certificate, context, stack) for case in group]
        for each in running:
            each.begin()
        for each in running:
            each.schedule()
        found = {each.case: each.figures() for each in running}
        for each in running:
            each.server.stdin.close()
    return found


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """Create a certificate for localhost; return its path, and the path of certificate and key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        # Python 3.13 and newer insist on what RFC 5280 does.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(*(use in (0, 5) for use in range(9))), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    trusted, own = directory / "trusted.pem", directory / "own.pem"
    trusted.write_bytes(pem)
    own.write_bytes(pem + secret)
    return trusted, own


HEADER = (
    f"{'trigger':44} {'N':>6} {'requests':>9} {'new TLS':>8} {'CPU s per':>9} {'KB per':>8}"
    f" {'notice, s':>15} {'stall, ms':>13} {'opened':>7} {'peak':>6} {'server':>7}\n"
    f"{'':44} {'':>6} {'per poll':>9} {'per poll':>8} {'1k polls':>9} {'trigger':>8}"
    f" {'p50':>7} {'p99':>7} {'p99':>6} {'max':>6} {'in all':>7} {'req/s':>6} {'CPU':>7}"
)


def line(case: Case, found: Figures) -> str:
    """Return a line of the table."""
    memory = "" if found.memory is None else f"{found.memory:.1f}"
    late = f"{'>' if found.unnoticed else ''}{found.notice_99:.2f}"
    return (
        f"{case.name:44} {case.n:6} {found.requests:9.3f} {found.connections:8.3f} {found.cpu:9.3f}"
        f" {memory:>8} {found.notice_50:7.2f} {late:>7} {found.stall_99 * 1000:6.0f}"
        f" {found.stall_max * 1000:6.0f} {found.opened:7} {found.peak:6} {found.server:7.0%}"
    )


COLUMNS = ("requests", "connections", "cpu", "memory", "notice_50", "notice_99", "stall_99", "stall_max")


class Results(dict[Case, Figures]):
    """The figures of all cases that ran."""

    def best(self, n: int, column: str) -> float:
        """Return the best figure of any peer."""
        peers = [found for case, found in self.items() if case.kind in PEERS and case.n == n]
        figures = [getattr(found, column) for found in peers]
        # To make few requests because one does not keep up is no merit.
        return max(figures) if column in ("requests", "connections") else min(figures)

    def has_peers(self, case: Case) -> bool:
        """Check whether a peer ran that a case can be compared with."""
        return any(other.kind in PEERS and other.n == case.n for other in self)

    def ratios(self, case: Case) -> dict[str, float]:
        """Divide each figure by the best peer's."""
        ours = self[case]
        return {
            column: getattr(ours, column) / self.best(case.n, column)
            for column in COLUMNS
            if getattr(ours, column) is not None
        }


def targets(results: Results) -> list[tuple[str, float, float, float]]:
    """Give what is aimed at, what was reached, the limit, and the least that is possible in this run."""
    found = []

    def at_most(limit: float, what: str, figure: float, least: float = 0.0) -> None:
        found.append((what, figure, limit, least))

    def ratio(case: Case, column: str, limit: float, what: str, least: float = 0.0) -> None:
        if case in results and results.has_peers(case):
            least /= results.best(case.n, column)
            at_most(limit, f"{case.name}, N = {case.n}: {what}", results.ratios(case)[column], least)

    case = OURS_5[1000]
    ratio(case, "requests", 0.02, "requests")
    ratio(case, "cpu", 0.02, "CPU")
    ratio(case, "memory", 0.4, "memory", results[IDLE].memory if IDLE in results else 0.0)
    ratio(case, "notice_50", NOISE, "notice p50")
    ratio(case, "notice_99", NOISE, "notice p99")
    if case in results:
        ours = results[case]
        at_most(2, f"{case.name}, N = 1000: connections in all", ours.opened)
        at_most(0, f"{case.name}, N = 1000: new connections after start", ours.connections)
        at_most(0.05, f"{case.name}, N = 1000: longest stall, s", ours.stall_max)
        if IDLE in results:
            more = ours.memory - results[IDLE].memory
            at_most(2, f"{case.name}, N = 1000: KB more than an idle trigger", more)
    case = OURS_1[1000]
    ratio(case, "notice_99", 0.3, "notice p99")
    if case in results and results.has_peers(case):
        # Five times as many job-polls are due in the same time.
        per_second = results[case].requests / case.interval / (results.best(1000, "requests") / 5.0)
        at_most(0.06, f"{case.name}, N = 1000: requests in the same time", per_second)
    ratio(GETS, "cpu", 0.3, "CPU")
    for case in (OURS_5[3000], CROWD):
        ratio(case, "notice_99", 0.5, "notice p99", 0.99 * case.interval)
    ratio(OURS_1[3000], "notice_99", 1 / 6, "notice p99", 0.99)
    case = OURS_5[1]
    ratio(case, "cpu", 0.4, "CPU")
    # No worse, as far as can be measured: the moments of our polls are random, which leaves the median of 41
    # waits a standard deviation of 15 %.
    for column in ("requests", "connections", "notice_50", "notice_99"):
        ratio(case, column, 1.3 if column == "notice_50" else NOISE, column)
    if MANY in results:
        sweep = MANY.n / 100 / MANY.extra["max_requests_per_second"]
        at_most(0.2, f"{MANY.name}, N = 10000: longest stall, s", results[MANY].stall_max)
        at_most(1.3, f"{MANY.name}, N = 10000: notice p99 in sweeps", results[MANY].notice_99 / sweep)
    for case in (OURS_5[1000], OURS_1[1000], OURS_1[3000], CROWD, MANY):
        if case in results:
            # One more than the cap arrives within a second when the first of them took longer on its way.
            cap = case.extra.get("max_requests_per_second", 5)
            at_most(cap + 1, f"{case.name}, N = {case.n}: requests in any second", results[case].peak)
    for case in (*FOREIGN.values(), BULK, OLD):
        if case in results and FOREIGN_GETS in results:
            # GETs come in bursts; the due ones are the fair base.
            ours, gets = results[case], results[FOREIGN_GETS]
            at_most(NOISE, f"{case.name}: requests to those of GET each", ours.requests)
            at_most(NOISE, f"{case.name}: CPU to that of GET each", ours.cpu / gets.cpu)
            at_most(0, f"{case.name}: completions not noticed", ours.unnoticed)
    return found


def plot(results: Results, path: Path) -> None:
    """Draw how the figures grow with N."""
    from matplotlib import pyplot

    series: dict[str, list[tuple[Case, Figures]]] = {}
    for case, found in sorted(results.items(), key=lambda item: item[0].n):
        if not case.jobs and case.kind != "idle":
            series.setdefault(f"{case.name.split(',')[0]}, {case.interval:g} s", []).append((case, found))

    def per_second(case: Case, found: Figures, figure: float) -> float:
        made = found.requests if case.asks_for_each else 1.0
        return figure * made * case.n / case.interval

    panels = {
        "requests per second": lambda case, found: found.requests * case.n / case.interval,
        "CPU, ms per second": lambda case, found: per_second(case, found, found.cpu),
        "notice p99, s": lambda _, found: found.notice_99,
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 4.5), layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for name, points in sorted(series.items(), key=lambda item: "HeyGen" not in item[0]):
            ours = "HeyGen" in name
            axis.plot(
                [case.n for case, _ in points],
                [value(case, found) for case, found in points],
                marker="o",
                linewidth=2.5 if ours else 1,
                linestyle="-" if ours else "--",
                label=name,
            )
        axis.set(title=title, xlabel="waiting triggers", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"\nPlotted to {path}")


def main() -> None:
    """Measure, print table and ratios, judge."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in 'N=... name'")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw it, as SVG or PNG (needs matplotlib)")
    arguments = parser.parse_args()

    results = Results()
    with tempfile.TemporaryDirectory() as directory:
        trusted, certificate = make_certificate(Path(directory))
        # aiohttp and httpx read the one, requests and our hook the other.
        os.environ |= {
            "SSL_CERT_FILE": str(trusted),
            "REQUESTS_CA_BUNDLE": str(trusted),
            "AIRFLOW_HOME": directory,
            "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
            "PYTHONWARNINGS": "ignore",
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["polling_client"])
        print(f"Airflow {version('apache-airflow')}, Python {sys.version.split()[0]}", end="")
        print("".join(f", {package} {version(package)}" for _, package in PEERS.values()))
        print(f"\n{HEADER}")
        for group in GROUPS:
            if group := [case for case in group if arguments.only in f"N={case.n} {case.name}"]:
                for case, found in measure(group, certificate, context).items():
                    results[case] = found
                    print(line(case, found), flush=True)

    print("\nTo the best peer of the same N:")
    for case in results:
        if case.kind == "heygen" and results.has_peers(case):
            ratios = "  ".join(f"{name} {ratio:.3f}" for name, ratio in results.ratios(case).items())
            print(f"{case.name:44} {case.n:6}  {ratios}")
    if arguments.plot:
        plot(results, arguments.plot)
    print("\nTargets:")
    missed = 0
    for what, figure, limit, least in targets(results):
        word = "met" if figure <= limit else "MISSED" if least <= limit else "beyond"
        missed += word == "MISSED"
        possible = f"; {least:.3g} is the least that is possible here" if word == "beyond" else ""
        print(f"{word:6}  {what}: {figure:.3g} (at most {limit:.3g}{possible})")
    if missed:
        sys.exit(f"MISSED {missed} targets")


if __name__ == "__main__":
    main()
