"""Whether two runs of nano on a CPU disturb each other: two side by side against one alone.

    python benchmarks/two_runs.py [--rounds 5] [--size 64*64] [--frame_num 17] [--omp N]

Each round measures one `wanflow generate` alone, then two at once, to the end of both, as whole
commands. `ratio` is the median over rounds of the time of two by that of one: 2.0 is what two cores
give to two that share them fairly, if one alone uses both. `--omp N` sets OMP_NUM_THREADS=N in all
of them, for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from wanflow.hardware import cpu_name, usable_cores

PROMPT = "a red circle moves left on a blue background"


def seconds(count: int, args: argparse.Namespace, folder: Path) -> float:
    """Return how long so many runs at once take, to the end of the last."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.pop(name, None)
    if args.omp is not None:
        environment["OMP_NUM_THREADS"] = str(args.omp)
    command = [sys.executable, "-m", "wanflow", "generate", "--ckpt_dir", "nano", "--quiet"]
    command += ["--size", args.size, "--frame_num", str(args.frame_num), "--device", "cpu"]
    command += ["--prompt", PROMPT, "--overwrite", "--save_file"]
    began = time.perf_counter()
    runs = [
        subprocess.Popen(
            [*command, str(folder / f"{number}.mp4")], env=environment, stdout=subprocess.DEVNULL
        )
        for number in range(count)
    ]
    codes = [run.wait() for run in runs]
    if any(codes):
        raise SystemExit(f"exit codes {codes}")
    return time.perf_counter() - began


def main() -> None:
    """Measure, print a line for each round, and the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="64*64")
    parser.add_argument("--frame_num", type=int, default=17)
    parser.add_argument("--omp", type=int)
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            load = os.getloadavg()[0]
            alone, both = (seconds(count, args, Path(folder)) for count in (1, 2))
            rounds.append({"alone": alone, "both": both, "load": load})
            print(f"alone {alone:.1f} s, two {both:.1f} s, ratio {both / alone:.2f}, load {load}")
    document = {
        "command": " ".join(["python", "benchmarks/two_runs.py", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": [{key: round(value, 2) for key, value in one.items()} for one in rounds],
        "seconds_alone": round(statistics.median(one["alone"] for one in rounds), 2),
        "seconds_two": round(statistics.median(one["both"] for one in rounds), 2),
        "ratio": round(statistics.median(one["both"] / one["alone"] for one in rounds), 2),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
