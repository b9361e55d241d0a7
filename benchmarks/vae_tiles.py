"""What decoding in tiles saves and costs on this CPU: anonymous memory and seconds, whole frames
against tiles. The last line is JSON.

The VAE has the published shape and random weights. Each decode runs in a process of its own, in
turn, round after round, so that what else the machine does hits all alike; `cpu_seconds` count only
what the process itself had of the CPUs. Its memory is the most that it adds, sampled every 2 ms,
after a tiny decode that fills the libraries' own buffers. Every tiled video is compared with the
whole decode's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanflow.config import VAEConfig
from wanflow.models.vae import WanVAE
from wanflow.pipeline import to_uint8
from wanflow.transforms import vae_tiling as tiling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def anonymous() -> int:
    """Bytes of anonymous memory of this process (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def decode(vae: WanVAE, latent: torch.Tensor, tile: int) -> np.ndarray:
    if tile:
        return np.concatenate(list(tiling.decode_frames(vae, latent, tile, to_uint8)))
    with torch.no_grad():
        return np.concatenate([to_uint8(part) for part in vae.decode_frames(latent)])


def one(args: argparse.Namespace, tile: int, out: Path) -> dict[str, float]:
    """A decode in this process: seconds, and the megabytes it adds at its peak."""
    import ctypes

    torch.manual_seed(0)
    vae = WanVAE(VAEConfig()).to(DTYPES[args.dtype]).requires_grad_(False)
    width, height = map(int, args.size.split("*"))
    latent = torch.randn(1, 16, (args.frames - 1) // 4 + 1, height // 8, width // 8)
    decode(vae, latent[..., :2, :8, :8], 64 if tile else 0)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, highest, stop = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    began, used = time.perf_counter(), time.process_time()
    video = decode(vae, latent, tile)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    stop.set()
    thread.join()
    np.save(out, video)
    return {"seconds": seconds, "cpu_seconds": used, "peak_mb": (highest - before) / 1e6}


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Largest difference of two videos in steps of 1/255, how many values differ, and PSNR in dB
    (null where they are equal).
    """
    apart = np.abs(a.astype(np.int16) - b)
    error = float((apart.astype(np.float64) ** 2).mean())
    psnr = round(10 * math.log10(255**2 / error), 1) if error else None
    return {"max_difference": int(apart.max()), "differ": float((apart > 0).mean()), "psnr": psnr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="832*480")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, metavar=("TILE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args, int(args.one[0]), Path(args.one[1]))))
        return
    width, height = map(int, args.size.split("*"))
    sizes = [0, *args.tiles]
    found: dict[int, list[dict[str, float]]] = {tile: [] for tile in sizes}
    differences: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for tile in sizes:
                out = Path(folder, f"{tile}.npy")
                command = [sys.executable, __file__, *sys.argv[1:], "--one", str(tile), str(out)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[tile].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"tile {tile}: {found[tile][-1]}", flush=True)
        whole = np.load(Path(folder, "0.npy"))
        differences = {
            tile: difference(np.load(Path(folder, f"{tile}.npy")), whole) for tile in args.tiles
        }
    results: dict[str, Any] = {}
    for tile in sizes:
        entry: dict[str, Any] = {
            name: [round(run[name], 1) for run in found[tile]] for name in found[tile][0]
        }
        if tile:
            ratios = {
                name: [
                    mine[name] / base[name]
                    for mine, base in zip(found[tile], found[0], strict=True)
                ]
                for name in found[0][0]
            }
            entry |= {
                "tiles": len(tiling.tiles(VAEConfig(), height, width, tile)),
                **differences[tile],
            }
            entry |= {
                f"{name}_ratio": round(statistics.median(values), 3)
                for name, values in ratios.items()
            }
        results[str(tile) if tile else "whole frames"] = entry
    with open("/proc/cpuinfo") as file:
        cpu = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), ""
        )
    about = {
        "cpu": cpu,
        "threads": args.threads,
        "torch": torch.__version__,
        "size": args.size,
        "frames": args.frames,
        "dtype": args.dtype,
    }
    print(
        json.dumps(
            {
                "command": " ".join(["python benchmarks/vae_tiles.py", *sys.argv[1:]]),
                **about,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
