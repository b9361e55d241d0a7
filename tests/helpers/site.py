"""A whole site of `wanflow serve` and `wanflow worker` processes, to be killed by tests.

Every process carries a mark in its environment, by which it is found, and found to be left over.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import wanflow
from wanflow.clipfiles import read_frames, read_recipe
from wanflow.config import RequestError
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import Job, Store, StoreError
from wanflow.serve.stores import open_store
from wanflow.serve.sweep import FOLDERS, sweep

MARK = "WANFLOW_TEST_SITE"
CLOCK = "WANFLOW_TEST_CLOCK"
# Python's clock of the wall is this machine's plus what a file says; each process reads it anew.
SKEW = f"""
import os, time
_file, _real = os.environ.get("{CLOCK}"), time.time
def _time():
    try:
        with open(_file) as file:
            return _real() + float(file.read() or 0)
    except (OSError, ValueError):
        return _real()
if _file:
    time.time = _time
"""
# Two ranks compute a branch of guidance each; so does one rank, not both in a batch.
SAME_BITS = ["--cfg_batch", "false"]
ALONE = "one process"  # in a recipe
ROUNDING = 8  # levels of 255 between a run on one rank, on two, and on both in turn
PROMPT = "a red circle moves left on a blue background"


class Site:
    """A data folder, its processes, and a view of its jobs.

    Args:
        folder: of everything.
        data: the data folder; it may be a file system of its own.
        db: a database; None: SQLite in the data folder.
    """

    def __init__(self, folder: Path, data: Path, db: str | None = None) -> None:
        self.folder, self.data, self.db = folder, DataFolder(data), db
        self.mark = secrets.token_hex(8)
        self.log = folder / "log"
        self.clock, self.temporary = folder / "clock", folder / "tmp"
        self.temporary.mkdir(parents=True)
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SKEW)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.store: Store = open_store(db, data)
        self._out: list[IO[bytes]] = []

    # Processes

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of wanflow in a session of its own."""
        out = self.log.open("ab")
        self._out.append(out)
        source = Path(wanflow.__file__).parents[1]
        environment = {
            **os.environ,
            MARK: self.mark,
            CLOCK: str(self.clock),
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), str(source)]),
        }
        place = ["--data_dir", str(self.data.path)]
        if self.db is not None:
            place += ["--db", self.db]
        return subprocess.Popen(
            [sys.executable, "-m", "wanflow", *words, "--ckpt_dir", "nano", *SAME_BITS, *place],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def serve(self, *words: str) -> subprocess.Popen[bytes]:
        """Start the supervisor; a full disk is tried, so nothing is refused for it beforehand."""
        return self.start("serve", "--port", str(self.port), "--min_free_gb", "0", *words)

    def processes(self) -> dict[int, str]:
        """Return the living processes of this site, and what each is.

        supervisor, http, worker, gang (one process), agent (of several ranks) or rank.
        """
        found = {}
        mark = f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                inside = (folder / "environ").read_bytes()
            except OSError:
                continue
            if "wanflow.serve.child" in words:
                kind = "http"
            elif "gang" in words:
                ranks = "--gpus" in words
                kind = "rank" if b"\0LOCAL_RANK=" in inside else "agent" if ranks else "gang"
            else:
                kind = next((one for one in ("serve", "worker") if one in words), "other")
                kind = {"serve": "supervisor"}.get(kind, kind)
            found[int(folder.name)] = kind
        return found

    def of(self, kind: str) -> list[int]:
        """Return the processes of one kind."""
        return [pid for pid, found in self.processes().items() if found == kind]

    def end(self, limit_s: float = 30) -> None:
        """End whatever lives."""
        until = time.monotonic() + limit_s
        while (left := self.processes()) and time.monotonic() < until:
            for pid in left:
                kill(pid)
            time.sleep(0.1)
        self.store.close()
        for out in self._out:
            out.close()

    # What a client sees

    def call(
        self, path: str, body: Mapping[str, Any] | None = None, key: str = "", limit_s: float = 20
    ) -> tuple[int, Any]:
        """Return status and JSON of an answer; status 0: there was none."""
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=limit_s) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                try:
                    return error.code, json.loads(error.read() or b"null")
                except (OSError, ValueError):
                    return error.code, None
        except (OSError, ValueError):
            return 0, None

    def ready(self, workers: int = 1) -> bool:
        """Return whether HTTP answers and so many workers can take a job."""
        with suppress(StoreError):
            living = [worker for worker in self.store.workers() if worker.ready]
            return self.call("/readyz", limit_s=2)[0] == 200 and len(living) >= workers
        return False

    def jobs(self) -> dict[str, Job]:
        """Return all jobs; StoreError where the store is away."""
        return {job.id: job for job in self.store.page(limit=2**31 - 1, newest_first=False)}


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_for(true: Any, limit_s: float, what: str, every_s: float = 0.1) -> None:
    """Return when a condition holds; AssertionError after `limit_s`."""
    until = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < until, f"not within {limit_s} s: {what}"
        time.sleep(every_s)


class Client:
    """Submits jobs as a careful client does: with a key, again until there is an answer.

    ids: of the accepted jobs, by their keys. asked: what each asked for. faults: broken promises.
    """

    def __init__(self, site: Site, seed: int, open_jobs: int = 3, kinds: int = 8) -> None:
        self.site, self.random = site, random.Random(seed)
        self.open_jobs, self.kinds = open_jobs, kinds
        self.ids: dict[str, str] = {}
        self.asked: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.tries = self.again = self.cancelled = self.unanswered = 0
        self.statuses: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Submit until asked to stop."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, once the present submission is answered."""
        self._over.set()
        self._thread.join(180)
        assert not self._thread.is_alive()

    def submit(self) -> str:
        """Submit a job, as often as it takes; return its id."""
        kind = self.random.randrange(self.kinds)
        body = {
            "prompt": PROMPT,
            "size": "64x64",
            "num_frames": 5,
            "num_inference_steps": 4 + kind % 5,
            "seed": kind,
        }
        key = f"key-{self.random.getrandbits(64):x}"
        id = self._post(body, key)
        self.ids[key], self.asked[id] = id, body
        if self.random.random() < 0.3:
            self.again += 1
            if (other := self._post(body, key)) != id:
                self.faults.append(f"{key}: {id}, then {other}")
        if self.random.random() < 0.05:
            self.cancelled += self.site.call(f"/v1/videos/{id}/cancel", {})[0] == 200
        return id

    def _post(self, body: Mapping[str, Any], key: str) -> str:
        while True:
            self.tries += 1
            status, answer = self.site.call("/v1/videos", body, key)
            self.statuses[status] = self.statuses.get(status, 0) + 1
            if status == 200:
                return str(answer["id"])
            self.unanswered += status == 0
            if status not in (0, 429, 503):
                self.faults.append(f"{status}: {answer}")
            time.sleep(0.5)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                counts = self.site.store.counts()
            except StoreError:
                time.sleep(0.5)
                continue
            if counts["queued"] + counts["in_progress"] < self.open_jobs:
                self.submit()
            else:
                time.sleep(0.1)


class Undisturbed:
    """Videos as a run that nobody disturbs makes them, one for each request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._pipe: Any = None

    def frames(self, asked: Mapping[str, Any], layout: str) -> Any:
        """Return the frames of a request's file, made by as many ranks as a layout says."""
        alone = layout == ALONE
        file = self.folder / f"{asked['seed']}-{'one' if alone else 'two'}.mp4"
        if not file.exists() and not alone:
            words = ["--prompt", asked["prompt"], "--size", "64*64", "--save_file", str(file)]
            words += ["--frame_num", str(asked["num_frames"]), "--seed", str(asked["seed"])]
            words += ["--sample_steps", str(asked["num_inference_steps"]), "--gpus", "cpu,cpu"]
            command = [sys.executable, "-m", "wanflow", "generate", "--ckpt_dir", "nano", *words]
            subprocess.run([*command, *SAME_BITS], check=True, capture_output=True)
        if not file.exists():
            if self._pipe is None:
                self._pipe = wanflow.load("nano", device="cpu", cfg_batch=False)
            video = self._pipe.generate(
                asked["prompt"],
                size="64*64",
                frame_num=asked["num_frames"],
                sample_steps=asked["num_inference_steps"],
                seed=asked["seed"],
            )
            video.save(file)
        return read_frames(file)[0]


def judge(site: Site, client: Client, undisturbed: Undisturbed) -> dict[str, Any]:
    """Hold a site whose jobs have all ended to its promises; return counts and what is broken."""
    broken = list(client.faults)
    jobs = site.jobs()
    found = dict.fromkeys(("completed", "failed", "cancelled"), 0)
    alone = together = mixed = farthest = 0
    for id, asked in client.asked.items():
        job = jobs.get(id)
        if job is None:
            broken.append(f"{id} is lost")
            continue
        if not job.final:
            broken.append(f"{id} is {job.state}")
            continue
        found[job.state] += 1
        if job.state == "failed" and (job.error or {}).get("code") != "worker_failed":
            broken.append(f"{id} failed: {job.error}")
        if job.state != "completed":
            continue
        try:
            file = site.data.path / "videos" / str(job.result["file"])
            frames, _ = read_frames(file)
            recipe = read_recipe(file)
        except (RequestError, OSError) as error:
            broken.append(f"{id}: its video cannot be read: {error}")
            continue
        if len(frames) != asked["num_frames"] or recipe["request"]["seed"] != asked["seed"]:
            broken.append(f"{id}: {len(frames)} frames, {recipe['request']['seed']}")
        layout = recipe["runtime"]["layout"]
        right = undisturbed.frames(asked, layout)
        if frames.shape == right.shape and (frames == right).all():
            alone, together = alone + (layout == ALONE), together + (layout != ALONE)
            continue
        mixed += 1
        far = int(abs(frames.astype(int) - right).max())
        farthest = max(far, farthest)
        if job.attempts < 2 or far > ROUNDING:
            broken.append(f"{id}: {far} levels from undisturbed, {layout}, {job.attempts} attempts")
    more = sorted(set(jobs) - set(client.asked))
    broken += [f"{id} was never answered for" for id in more]
    return {
        "accepted": len(client.ids),
        "distinct": len(set(client.ids.values())),
        **found,
        "attempts": sum(job.attempts for job in jobs.values()),
        "taken_up_again": sum(job.attempts > 1 for job in jobs.values()),
        "equal_frames_one_rank": alone,
        "equal_frames_two_ranks": together,
        "taken_from_one_rank_by_two_or_back": mixed,
        "farthest_of_those_in_levels": farthest,
        "resubmitted": client.again,
        "requests": client.tries,
        "answers": {str(status): count for status, count in sorted(client.statuses.items())},
        "broken": broken,
    }


def leftovers(site: Site) -> tuple[list[str], list[str]]:
    """Sweep; return what was swept, and what is left beyond results."""
    swept = sweep(site.store, site.data, 0)
    jobs = site.jobs()
    results = {Path(str(job.result.get("file", "-"))).stem for job in jobs.values()}
    left = [
        file.name
        for folder in FOLDERS
        for file in (site.data.path / folder).glob("*")
        if not (folder == "videos" and _stem(file.name) in results) or file.suffix == ".part"
    ]
    videos: dict[str, int] = {}
    for file in files(site, (".mp4", ".png")):
        videos[file.name.split(".")[0]] = videos.get(file.name.split(".")[0], 0) + 1
    left += [f"{id} has {count} videos" for id, count in videos.items() if count > 1]
    return swept, left


def files(site: Site, endings: Iterable[str]) -> list[Path]:
    """Return the files of videos."""
    return [one for one in (site.data.path / "videos").glob("*") if one.suffix in endings]


def _stem(name: str) -> str:
    return ".".join(name.split(".")[:2])
