"""Whether the memory of a gang grows over many jobs: its resident bytes after each of them.

    python benchmarks/serve_memory.py [--jobs 200]

A worker makes short jobs of nano, of five kinds in turn; a client cancels some of them.
`growth_mb` is the mean of the last quarter of the jobs minus that of the second quarter; the first
is left out, since kernels, codecs and caches are loaded then.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from wanflow.hardware import cpu_name, usable_cores
from wanflow.serve.jobs import Job, new_id
from wanflow.serve.local import LocalStore

PROMPT = "a red circle moves left on a blue background"
SIZES = ([64, 64], [96, 64], [64, 64], [64, 96], [64, 64])
FRAMES = (5, 5, 9, 5, 13)
CANCELLED = 10  # each tenth job


def resident(pid: int) -> int:
    """Return the resident bytes of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def child(pid: int) -> int:
    """Return the process that a process has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])


def main() -> None:
    """Measure, print a line for each quarter, and the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = LocalStore(Path(name))
        command = [sys.executable, "-m", "wanflow", "worker", "--ckpt_dir", "nano"]
        worker = subprocess.Popen([*command, "--data_dir", name, "--quiet", "--save_s", "0"])
        began, readings = time.monotonic(), []
        for number in range(args.jobs):
            kind = number % len(SIZES)
            asked = {"size": SIZES[kind], "frame_num": FRAMES[kind], "seed": number}
            job = Job(new_id(), {"prompt": PROMPT, "sample_steps": 2, **asked})
            store.submit(job)
            while not (now := store.get(job.id)).final:  # type: ignore[union-attr]
                time.sleep(0.02)
                if number % CANCELLED == 1 and now.state == "in_progress":  # type: ignore[union-attr]
                    store.cancel(job.id)
            readings.append(resident(child(worker.pid)) / 1e6)
        spent, counts = time.monotonic() - began, store.counts()
        worker.send_signal(signal.SIGTERM)
        worker.wait()
        store.close()
    quarter = len(readings) // 4
    means = [statistics.mean(readings[n * quarter : (n + 1) * quarter]) for n in range(4)]
    print("MB by quarter:", *(f"{mean:.1f}" for mean in means))
    document = {
        "command": " ".join(["python", "benchmarks/serve_memory.py", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "jobs": counts,
        "seconds": round(spent, 1),
        "mb_by_quarter": [round(mean, 1) for mean in means],
        "growth_mb": round(means[3] - means[1], 1),
        "mb": [round(reading, 1) for reading in readings],
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
