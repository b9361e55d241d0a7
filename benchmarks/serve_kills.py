"""Kill the processes of `wanflow serve` at random moments; hold the site to its promises.

One server with its worker, and a second worker of two ranks, make short videos with nano on the CPU
while a client submits jobs. A seeded sequence of faults falls on them. Then all is left in peace
until every job has ended. The last line is one JSON document.

    make services
    python benchmarks/serve_kills.py --kills 200
    python benchmarks/serve_kills.py --kills 200 --db postgres

As root the data folder is a file system of 256 MB, which the faults fill; else that one is
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.site import Client, Site, Undisturbed, judge, kill, leftovers, wait_for

from wanflow.serve.jobs import StoreError

SIZE_MB = 256  # of the data folder
FROZEN_S = 45.0  # longer than a worker may be silent (30 s) and the next look at that (5 s)
AWAY_S = 10.0
NOTICE_S = 15.0  # to import torch on a busy machine; idle, it takes one
# How often each fault falls, where the sum is the number of kills.
WEIGHTS = {
    "rank": 18,
    "agent": 10,
    "gang": 22,
    "worker of the server": 16,
    "worker of two ranks": 12,
    "HTTP process": 20,
    "supervisor": 20,
    "everything": 14,
    "worker frozen": 5,
    "disk full": 6,
    "clock jumps": 6,
    "database stopped": 6,
    "database killed": 6,
    "database frozen": 3,
}
HELD = {"rank", "agent", "gang", "worker of the server", "worker of two ranks"}


@dataclass
class Struck:
    """A job that was at work when its process died."""

    fault: str
    id: str
    attempts: int
    at: float


class Faults:
    """What falls on a site.

    counts: of faults that fell. resumed: seconds from a fault to the next attempt of a job that it
    struck, or to its end. served: to the next answer of HTTP. ready: of the children's own end.
    """

    def __init__(
        self, site: Site, postgres: Any, mounted: bool, seed: int, names: list[str]
    ) -> None:
        self.site, self.postgres, self.mounted = site, postgres, mounted
        self.random, self.names = random.Random(seed), names
        self.counts: dict[str, int] = {}
        self.resumed: dict[str, list[float]] = {}
        self.served: dict[str, list[float]] = {}
        self.orphaned: list[float] = []  # seconds that children outlive their supervisor
        self.restarts = 0
        self.refused_starts = 0
        self.struck: list[Struck] = []
        self._later: list[threading.Timer] = []
        self._over = threading.Event()
        self._programs: dict[str, subprocess.Popen[bytes] | None] = {"server": None, "second": None}
        self._threads = [
            threading.Thread(target=self._keep_running, daemon=True),
            threading.Thread(target=self._watch, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # What a machine does besides: an init system that starts again what ends

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        if name == "server":
            return self.site.serve("--max_queue", "1000")
        return self.site.start("worker", "--gpus", "cpu,cpu")

    def _keep_running(self) -> None:
        while not self._over.is_set():
            for name, process in self._programs.items():
                if process is None or process.poll() is not None:
                    self.restarts += 1
                    if process is not None and process.returncode not in (-9, 0):
                        self.refused_starts += 1
                        self._over.wait(1.0)
                    self._programs[name] = self._start(name)
            self._over.wait(0.2)

    def _watch(self) -> None:
        """See when struck jobs go on."""
        while not self._over.wait(0.2):
            if not self.struck:
                continue
            with suppress(StoreError):
                jobs = self.site.jobs()
                now = time.monotonic()
                for struck in list(self.struck):
                    job = jobs.get(struck.id)
                    if job is None or job.final or job.attempts > struck.attempts:
                        self.resumed.setdefault(struck.fault, []).append(now - struck.at)
                        self.struck.remove(struck)

    # The faults

    def fall(self) -> None:
        """Let one fault fall at a random moment."""
        names = [name for name in self.names if self._possible(name)]
        name = self.random.choices(names, [WEIGHTS[one] for one in names])[0]
        if name in HELD:
            self._until_busy(name)
        time.sleep(self.random.uniform(0, 2))
        if name == "worker frozen":
            done = self._freeze()
        elif name == "disk full":
            done = self._fill()
        elif name == "clock jumps":
            self.site.clock.write_text(str(self.random.choice([-7200, -60, 60, 7200, 0])))
            done = True
        elif name.startswith("database"):
            done = self._database(name)
        else:
            done = self._kill(name)
        if done:
            self.counts[name] = self.counts.get(name, 0) + 1

    def _possible(self, name: str) -> bool:
        if name == "disk full":
            return self.mounted
        return self.postgres is not None or not name.startswith("database")

    def _targets(self, name: str) -> list[int]:
        found = self.site.processes()
        if name == "everything":
            return list(found)
        kind = {"HTTP process": "http"}.get(name, name.split()[0])
        pids = [pid for pid, one in found.items() if one == kind]
        if name.startswith("worker of"):
            second = self._programs["second"]
            ours = second.pid if second else 0
            pids = [pid for pid in pids if (pid == ours) == (name == "worker of two ranks")]
        return pids

    def _until_busy(self, name: str) -> None:
        """Wait until a job is at work, as it mostly is where a real fault falls."""
        until = time.monotonic() + 15
        while time.monotonic() < until:
            with suppress(StoreError):
                if self._targets(name) and self._at_work(self._owners(name)):
                    return
            time.sleep(0.05)

    def _owners(self, name: str) -> list[str] | None:
        """Return parts of the names of the workers that a fault strikes; None: all."""
        if name in ("rank", "agent", "worker of two ranks"):
            second = self._programs["second"]
            return [f"-{second.pid}-"] if second else []
        if name in ("gang", "worker of the server", "supervisor"):
            second = self._programs["second"]
            found = [f"-{pid}-" for pid in self.site.of("worker")]
            return [one for one in found if not second or one != f"-{second.pid}-"]
        return None

    def _at_work(self, owners: list[str] | None) -> list[Any]:
        return [
            job
            for job in self.site.store.page(limit=100, states=("in_progress",))
            if owners is None or any(one in job.owner for one in owners)
        ]

    def _kill(self, name: str) -> bool:
        pids = self._targets(name)
        if not pids:
            return False
        struck = []
        if name != "HTTP process":
            with suppress(StoreError):
                struck = self._at_work(self._owners(name))
        victims = pids if name == "everything" else [self.random.choice(pids)]
        before = set(self.site.processes())
        now = time.monotonic()
        for pid in victims:
            kill(pid)
        self.struck += [Struck(name, job.id, job.attempts, now) for job in struck]
        if name in ("HTTP process", "supervisor", "everything"):
            threading.Thread(target=self._serves, args=(name, now), daemon=True).start()
        if name == "supervisor":
            second = self._programs["second"]
            theirs = second.pid if second else 0
            family = before & set(self._family()) - {theirs}
            threading.Thread(target=self._outlive, args=(family, now), daemon=True).start()
        return True

    def _family(self) -> list[int]:
        """Return what belongs to the server: not the second worker and its ranks."""
        found = self.site.processes()
        return [pid for pid, kind in found.items() if kind in ("http", "worker", "gang")]

    def _outlive(self, pids: set[int], since: float) -> None:
        while time.monotonic() - since < 60:
            if not any(Path(f"/proc/{pid}").exists() for pid in pids):
                break
            time.sleep(0.05)
        self.orphaned.append(time.monotonic() - since)

    def _serves(self, name: str, since: float) -> None:
        while time.monotonic() - since < 120:
            if self.site.call("/healthz", limit_s=2)[0] == 200:
                break
            time.sleep(0.05)
        self.served.setdefault(name, []).append(time.monotonic() - since)

    def _freeze(self) -> bool:
        pids = self.site.of("worker")
        if not pids:
            return False
        pid = self.random.choice(pids)
        with suppress(StoreError):
            now = time.monotonic()
            for job in self._at_work([f"-{pid}-"]):
                self.struck.append(Struck("worker frozen", job.id, job.attempts, now))
        kill(pid, SIGSTOP)
        self._in(FROZEN_S, lambda: kill(pid, SIGCONT))
        return True

    def _fill(self) -> bool:
        filler = self.site.data.path / "filler"
        if filler.exists():
            return False
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
        self._in(AWAY_S, lambda: filler.unlink(missing_ok=True))
        return True

    def _database(self, name: str) -> bool:
        if self.postgres.process is None or self.postgres.process.poll() is not None:
            return False
        if name == "database frozen":
            self.postgres.freeze()
            time.sleep(AWAY_S)
            self.postgres.freeze(SIGCONT)
            return True
        self.postgres.stop(SIGINT if name == "database stopped" else SIGKILL)
        time.sleep(AWAY_S if name == "database stopped" else 1)
        self.postgres.start()
        return True

    def _in(self, seconds: float, call: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, call)
        timer.daemon = True
        timer.start()
        self._later.append(timer)

    def peace(self) -> None:
        """Wait for what still goes on."""
        for timer in self._later:
            timer.join()
        self.site.clock.unlink(missing_ok=True)

    def stop(self) -> float:
        """Ask all to leave; return how long that took."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        since = time.monotonic()
        for process in self._programs.values():
            if process is not None:
                process.terminate()
        for process in self._programs.values():
            if process is not None:
                process.wait(120)
        return time.monotonic() - since


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return count, median and maximum of each list."""
    return {
        name: {
            "count": len(found),
            "median_s": round(statistics.median(found), 2),
            "max_s": round(max(found), 2),
        }
        for name, found in sorted(times.items())
    }


def mount(folder: Path) -> bool:
    """Give a folder a small file system of its own; return whether that was allowed."""
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "none", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--db", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=WEIGHTS, default=[*WEIGHTS], metavar="NAME")
    parser.add_argument("--kinds", type=int, default=8, help="different requests")
    parser.add_argument("--minutes", type=float, default=600, help="at most, for the kills")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="wanflow-kills-"))
    data = folder / "data"
    data.mkdir()
    mounted, postgres = mount(data), None
    began = time.monotonic()
    try:
        if args.db == "postgres":
            from helpers.postgres import Postgres

            postgres = Postgres()
            postgres.start()
        site = Site(folder, data, postgres.create("kills") if postgres else None)
        faults = Faults(site, postgres, mounted, args.seed, args.faults)
        try:
            found = run(args, site, faults)
        finally:
            site.end()
    finally:
        if postgres is not None:
            postgres.close()
        if mounted:
            subprocess.run(["umount", "-l", str(data)], check=True)
    found |= {
        "command": " ".join(["python", *sys.argv]),
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {os.getloadavg()[2]:.1f} busy",
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began),
        "folder": str(folder),
    }
    print(json.dumps(found))


def run(args: argparse.Namespace, site: Site, faults: Faults) -> dict[str, Any]:
    """Let the faults fall, wait for peace, and judge."""
    wait_for(lambda: site.ready(2), 180, "the site is ready")
    client = Client(site, args.seed, kinds=args.kinds)
    client.start()
    until = time.monotonic() + 60 * args.minutes
    while sum(faults.counts.values()) < args.kills and time.monotonic() < until:
        faults.fall()
        total = sum(faults.counts.values())
        print(f"{total}: {faults.counts}", file=sys.stderr, flush=True)
        if faults.random.random() < 0.7:  # else the next one falls amid recovery
            with suppress(AssertionError):
                wait_for(lambda: site.ready(1), 30, "the site is ready")
    faults.peace()
    client.stop()

    def ended() -> bool:
        with suppress(StoreError):
            counts = site.store.counts()
            return counts["queued"] + counts["in_progress"] == 0
        return False

    broken = []
    try:
        wait_for(ended, 600, "every job has ended", 0.5)
    except AssertionError as error:
        broken.append(str(error))
    with suppress(AssertionError):
        wait_for(lambda: not faults.struck, 10, "every struck job went on")
    stopped_s = faults.stop()
    with suppress(AssertionError):  # a rank that still imports torch notices after it
        wait_for(lambda: not site.processes(), NOTICE_S, "every rank notices")
    left = site.processes()
    found = judge(site, client, Undisturbed(site.folder / "undisturbed"))
    swept, files = leftovers(site)
    again = site.log.read_text(errors="replace")
    return {
        "kills": sum(faults.counts.values()),
        "faults": faults.counts,
        **found,
        "broken": [*broken, *found["broken"]],
        "refused_late_results": again.count("it was given to another worker"),
        "tracebacks": again.count("Traceback (most recent call last)"),
        "resumed": summary(faults.resumed),
        "serves_again": summary(faults.served),
        "children_outlive_supervisor": summary({"all": faults.orphaned} if faults.orphaned else {}),
        "never_resumed": len(faults.struck),
        "starts": faults.restarts,
        "refused_starts": faults.refused_starts,
        "stopped_s": round(stopped_s, 1),
        "orphans": [f"{pid} {kind}" for pid, kind in left.items()],
        "swept": len(swept),
        "left_files": files,
        "temporary_files": sorted(one.name for one in site.temporary.iterdir()),
    }


if __name__ == "__main__":
    main()
