"""Submit jobs to a server from many clients at once, and time /healthz meanwhile.

    python benchmarks/serve_load.py [--jobs 500] [--clients 50] [--workers 2]

Starts `wanflow serve --ckpt_dir nano` in a folder of its own, and ends it. The last line of output
is one JSON document.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from threading import Event, Thread
from typing import Any

from wanflow.hardware import cpu_name, usable_cores
from wanflow.serve.local import LocalStore

PROMPT = "a red circle moves left on a blue background"
BODY = json.dumps({"prompt": PROMPT, "num_inference_steps": 2, "num_frames": 5})


def ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def watch(port: int, over: Event, times: list[float]) -> None:
    while not over.is_set():
        began = time.perf_counter()
        assert ask(port, "GET", "/healthz")[0] == 200
        times.append(time.perf_counter() - began)
        time.sleep(0.01)


def share(times: list[float], per_cent: int) -> float:
    """Return milliseconds that so many per cent of the requests did not exceed."""
    return round(statistics.quantiles(times, n=100)[per_cent - 1] * 1000, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0, help="that work meanwhile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--ckpt_dir", "nano", "--port", "0", "--data_dir", folder, "--max_queue", "10000"]
        command = [sys.executable, "-m", "wanflow", "serve", *words]
        if not args.workers:
            command.append("--no_worker")
        second = [sys.executable, "-m", "wanflow", "worker", *words[:2], "--data_dir", folder]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        others = list[subprocess.Popen[bytes]]()
        try:
            assert server.stderr is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)", server.stderr.readline())
            assert found is not None, "the server did not start"
            Thread(target=lambda: [None for _ in server.stderr or ()], daemon=True).start()
            others = [
                subprocess.Popen(second, stderr=subprocess.DEVNULL) for _ in range(args.workers - 1)
            ]
            document = load(int(found[1]), args.jobs, args.clients, args.workers, Path(folder))
            document |= {
                "command": " ".join(["python", *sys.argv]),
                "date": str(date.today()),
                "machine": f"{cpu_name()}, {usable_cores()} cores, {os.getloadavg()[0]:.1f} busy",
            }
            print(json.dumps(document))
        finally:
            for process in (server, *others):
                process.terminate()
            for process in (server, *others):
                process.wait(60)


def load(port: int, jobs: int, clients: int, workers: int, folder: Path) -> dict[str, Any]:
    until, store = time.monotonic() + 120, LocalStore(folder)
    while (
        ask(port, "GET", "/healthz")[0] != 200
        or sum(one.ready for one in store.workers()) < workers
    ):
        assert time.monotonic() < until
        time.sleep(0.2)
    over, health, took = Event(), list[float](), list[float]()

    def submit(_: int) -> int:
        began = time.perf_counter()
        status, _answer = ask(port, "POST", "/v1/videos", BODY)
        took.append(time.perf_counter() - began)
        return status

    watching = Thread(target=watch, args=(port, over, health))
    watching.start()
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        statuses = list(pool.map(submit, range(jobs)))
    seconds = time.perf_counter() - began
    completed = store.counts()["completed"]
    over.set()
    watching.join()
    store.close()
    return {
        "jobs": jobs,
        "clients": clients,
        "workers": workers,
        "completed_meanwhile": completed,
        "accepted": statuses.count(200),
        "seconds": round(seconds, 2),
        "submissions_a_second": round(jobs / seconds, 1),
        "submit_ms": {"p50": share(took, 50), "p99": share(took, 99)},
        "healthz": len(health),
        "healthz_ms": {"p50": share(health, 50), "p99": share(health, 99)},
    }


if __name__ == "__main__":
    main()
