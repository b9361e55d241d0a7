"""wanflow beside diffusers on this CPU: one denoising step, plain and compiled, and a decode of
each VAE. `make bench`; the last line is JSON.

Both sides hold the same random weights and run in one process, in turn, so that what else the
machine does hits both alike. A denoising step is both branches of guidance. Each side takes the
faster of its two ways (two passes, or one batch of two); wanflow prepares the text states once per
prompt, as its pipeline does, and that is not part of a step. Compiled are wanflow's blocks as by
`--compile on`, and diffusers' by its `compile_repeated_blocks`. Ratios are medians of per-round
ratios. Peak memory is measured in processes of their own: the most anonymous memory during a
decode, less what was there before it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from wanflow.bench.against import compared, decode_calls, give, rounds, step_calls, transformer
from wanflow.bench.stages import anonymous, watching
from wanflow.bench.tools import Scale, distance, random_expert
from wanflow.config import DiTConfig
from wanflow.presets import T2V_A14B, TI2V_5B

CPU = torch.device("cpu")
DIT = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=4)
LATENT, TEXT = (1, 16, 5, 32, 32), (2, 512, 4096)
VAES = {
    "vae decode float32": (T2V_A14B, (1, 16, 3, 16, 16)),
    "vae 2.2 decode float32": (TI2V_5B, (1, 48, 3, 20, 20)),
}
KINDS = {
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn_linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "convolution": ("convolution", "conv2d", "conv3d"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::constant_pad"),
}


def where_time_goes(fn: Callable[[], Any]) -> dict[str, float]:
    """Share of each kind of operation in the time of a call."""
    with torch.profiler.profile() as profile:
        fn()
    spent = dict.fromkeys([*KINDS, "elementwise and the rest"], 0.0)
    for event in profile.key_averages():
        kind = next(
            (kind for kind, marks in KINDS.items() if any(mark in event.key for mark in marks)),
            "elementwise and the rest",
        )
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: round(value / total, 3) for kind, value in spent.items()}


def step(dtype: torch.dtype, count: int, compiled: bool = False) -> dict[str, Any]:
    from wanflow.transforms.compile import Compiler

    torch.manual_seed(0)
    scale = Scale(CPU, replace(T2V_A14B, dit=DIT), dtype, (LATENT[1:],), (), 0)
    ours, theirs = random_expert(scale, DIT.num_layers), transformer(DIT, dtype, CPU)
    give("dit", ours, theirs)
    fns = step_calls(ours, theirs, torch.randn(LATENT), torch.randn(TEXT), dtype)
    with FlopCounterMode(display=False) as counter:  # it does not see into compiled code
        fns["wanflow, one batch"]()
    if compiled:
        Compiler(CPU, True, None, "benchmark").attach(ours)
        theirs.compile_repeated_blocks(fullgraph=True)
    a, b = fns["wanflow, one batch"](), fns["diffusers, one batch"]().float()
    difference = distance(a, b)
    assert difference < (1e-4 if dtype == torch.float32 else 0.05), difference
    result = compared(rounds(fns, count, CPU), difference)
    best = fns[result["ours"]]
    rate = counter.get_total_flops() / result["seconds"][result["ours"]]
    machine = matmul_rate(dtype)
    return result | {
        "share_of_matmul_rate": round(rate / machine, 3),
        "matmul_gflops": round(machine / 1e9),
        "time": where_time_goes(best),
    }


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matmul on this machine."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    seconds = min(rounds({"matmul": lambda: a @ b}, 5, CPU)["matmul"])
    return 2 * 2048**3 / seconds


def vae_pair(name: str) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    spec, latent = VAES[name]
    return decode_calls(Scale(CPU, spec, torch.float32, (), latent, 0))


def decode(name: str, count: int) -> dict[str, Any]:
    fns = vae_pair(name)
    a, b = fns["wanflow"](), fns["diffusers"]()
    difference = float((a - b).abs().max())
    assert difference < 1e-4, difference
    result = compared(rounds(fns, count, CPU), difference)
    peaks = {}
    for side in fns:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", side, name],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[side] = float(done.stdout.split()[-1])
    memory = {"peak_mb": peaks, "memory_ratio": round(peaks["wanflow"] / peaks["diffusers"], 3)}
    return result | memory | {"time": where_time_goes(fns["wanflow"])}


def peak(side: str, name: str) -> float:
    """Megabytes that a decode adds at its peak."""
    import ctypes

    fn = vae_pair(name)[side]
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = anonymous()
    with watching(CPU) as watched:
        fn()
    return (watched.peak - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="part of the names of what to measure")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.peak:
        print(peak(*args.peak))
        return
    import diffusers

    results: dict[str, Any] = {}
    for name, run in {
        "step float32": lambda: step(torch.float32, args.rounds),
        "step bfloat16": lambda: step(torch.bfloat16, args.rounds),
        "step float32 compiled": lambda: step(torch.float32, args.rounds, True),
        "step bfloat16 compiled": lambda: step(torch.bfloat16, args.rounds, True),
        **{name: partial(decode, name, args.rounds) for name in VAES},
    }.items():
        if args.only not in name:
            continue
        results[name] = run()
        print(f"{name}: {results[name]}", flush=True)
    with open("/proc/cpuinfo") as file:
        cpu = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")),
            platform.processor(),
        )
    about = {
        "cpu": cpu,
        "threads": args.threads,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    print(
        json.dumps(
            {
                "command": "python benchmarks/diffusers_cpu.py " + " ".join(sys.argv[1:]),
                **about,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
