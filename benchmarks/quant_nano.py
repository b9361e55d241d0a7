"""What rounded weights do to nano's videos: how often they show what the prompt said, and how far
they are from bfloat16's.

    python benchmarks/quant_nano.py [--prompts 64] [--workers 2]

The last line of output is JSON. All runs have the same prompts (combinations that nano's training
never showed) and seeds. `psnr` compares the frames of each video with those of the bfloat16 run;
`lost` and `won` count the prompts that were right there and are wrong here, and the other way
round. float32 is among the runs to tell how far any change of rounding takes a video. A GPU also
rounds the tokens that it multiplies (`scaled_mm`, `int_mm`): those runs do the same on the CPU, by
the same code.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import random
import sys
import time
from typing import Any

import numpy as np
import torch

import wanflow
from wanflow.train import adherence, toy
from wanflow.transforms.quant import QuantLinear

RUNS: dict[str, dict[str, str]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
}
for mode, ways in {
    "fp8": ("weight-only", "scaled_mm"),
    "int8": ("weight-only", "int_mm"),
    "nf4": ("weight-only",),
}.items():
    for layers in ("ffn", "all"):
        for way in ways:
            RUNS[f"{mode} {layers} {way}"] = {
                "dtype": "bfloat16",
                "quantize": mode,
                "quantize_layers": layers,
                "way": way,
            }
MEASURED = ("background", "colour", "shape", "motion", "all", "strict")


def load(options: dict[str, str]) -> wanflow.Pipeline:
    """A pipeline whose rounded layers multiply in the way that is asked for."""
    pipe = wanflow.load(
        "nano", device="cpu", **{key: value for key, value in options.items() if key != "way"}
    )
    for which in ("high", "low"):
        found = [
            leaf for leaf in pipe.parts.expert(which).modules() if isinstance(leaf, QuantLinear)
        ]
        assert bool(found) == ("quantize" in options)
        for leaf in found:
            leaf.way = options["way"]
    return pipe


def share(job: tuple[list[int], float]) -> dict[str, list[dict[str, Any]]]:
    """{run: one dict of measurements for each of these prompts}."""
    numbers, began = job
    torch.set_num_threads(1)
    scenes = [toy.sample_scene(random.Random(f"quant/{number}"), unseen=True) for number in numbers]
    first: dict[int, np.ndarray] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    for name, options in RUNS.items():
        pipe = load(options)
        results[name] = []
        for number, scene in zip(numbers, scenes, strict=True):
            frames = pipe.generate(toy.caption(scene), seed=number).frames
            error = frames.astype(np.float64) - first.setdefault(number, frames)
            right = adherence.compare(adherence.read(frames), scene)
            results[name].append(
                {"mse": float(np.square(error).mean()), **{key: right[key] for key in MEASURED}}
            )
        print(f"{time.monotonic() - began:5.0f} s: {name}", file=sys.stderr)
    return results


def psnr(mse: float) -> float:
    """dB of 8-bit values; 99 where nothing differs."""
    return min(99.0, round(10 * math.log10(255**2 / max(mse, 1e-9)), 2))


def summary(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    errors = sorted(row["mse"] for row in rows)
    pairs = [(old["all"], new["all"]) for old, new in zip(base, rows, strict=True)]
    return {
        "adherence": {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in MEASURED},
        "all_95": [
            round(adherence.rate(sum(row["all"] for row in rows), len(rows))[side], 3)
            for side in ("low", "high")
        ],
        "lost": pairs.count((True, False)),
        "won": pairs.count((False, True)),
        "psnr": {"median": psnr(errors[len(errors) // 2]), "worst": psnr(errors[-1])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    began = time.monotonic()
    jobs = [
        (list(range(args.prompts))[worker :: args.workers], began) for worker in range(args.workers)
    ]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        parts = pool.map(share, jobs, chunksize=1)
    joined = {name: [row for part in parts for row in part[name]] for name in RUNS}
    runs = {name: summary(rows, joined["bfloat16"]) for name, rows in joined.items()}
    for name, run in runs.items():
        print(
            f"{name:22} all {run['adherence']['all']:.3f}  -{run['lost']} +{run['won']}  PSNR"
            f" {run['psnr']}"
        )
    result = {
        "command": "python " + " ".join(["benchmarks/quant_nano.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {args.workers} processes of one thread",
        "torch": torch.__version__,
        "prompts": args.prompts,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
