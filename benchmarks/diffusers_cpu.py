"""wanflow beside diffusers on this CPU: one denoising step, plain and compiled, and one VAE decode.
`make bench`; the last line is JSON.

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
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wanflow.checkpoint.key_maps import to_official
from wanflow.config import DiTConfig, VAEConfig
from wanflow.models.dit import WanDiT
from wanflow.models.vae import WanVAE

DIT = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=4)
LATENT, TEXT, VAE_LATENT = (1, 16, 5, 32, 32), (2, 512, 4096), (1, 16, 3, 16, 16)
KINDS = {
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn_linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "convolution": ("convolution", "conv2d", "conv3d"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::constant_pad"),
}


def randomise(module: nn.Module) -> None:
    """Weights of the size that keeps activations near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1 and "modulation" not in name and "gamma" not in name:
                noise *= value[0].numel() ** -0.5
            value.copy_(
                1 + 0.1 * noise
                if "norm" in name or "gamma" in name
                else noise
                if value.ndim > 1
                else 0.1 * noise
            )


def give(kind: str, ours: nn.Module, theirs: nn.Module) -> None:
    """Copy our weights into the peer, in the dtype it holds them in."""
    state = ours.state_dict()
    names = to_official(kind, list(theirs.state_dict()))
    theirs.load_state_dict(
        {
            name: state[names[name]].reshape(value.shape).to(value.dtype)
            for name, value in theirs.state_dict().items()
        }
    )


def rounds(fns: dict[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Seconds of each function, in turn, `count` times, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for number in range(count + 1):
        for name, fn in fns.items():
            began = time.perf_counter()
            fn()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def faster(times: dict[str, list[float]], prefix: str) -> str:
    return min(
        (name for name in times if name.startswith(prefix)),
        key=lambda name: statistics.median(times[name]),
    )


def compared(times: dict[str, list[float]], difference: float) -> dict[str, Any]:
    ours, theirs = faster(times, "wanflow"), faster(times, "diffusers")
    ratio = statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))
    seconds = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return {
        "seconds": seconds,
        "ours": ours,
        "theirs": theirs,
        "ratio": round(ratio, 3),
        "max_difference": difference,
        "rounds": len(times[ours]),
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
    from diffusers import WanTransformer3DModel

    from wanflow.transforms.compile import Compiler

    ours = WanDiT(DIT).eval().requires_grad_(False)
    randomise(ours)
    heads = {
        "num_attention_heads": DIT.num_heads,
        "attention_head_dim": DIT.dim // DIT.num_heads,
        "ffn_dim": DIT.ffn_dim,
    }
    theirs = (
        WanTransformer3DModel(**heads, num_layers=DIT.num_layers, rope_max_seq_len=64)
        .eval()
        .requires_grad_(False)
    )
    # As `from_pretrained(torch_dtype=...)` does: everything in the dtype but the modules that
    # diffusers keeps in float32.
    kept = tuple(theirs._keep_in_fp32_modules or ())
    for name, parameter in theirs.named_parameters():
        if not any(mark in name for mark in kept):
            parameter.data = parameter.data.to(dtype)
    give("dit", ours, theirs)
    for module in ours.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            module.weight.data = module.weight.data.to(dtype)
    generator = torch.Generator().manual_seed(1)
    latent, text = torch.randn(LATENT, generator=generator), torch.randn(TEXT, generator=generator)
    timestep, both = torch.tensor([500.0]), latent.repeat(2, 1, 1, 1, 1)
    states = ours.text_states(text)
    rows = [tuple((k[row : row + 1], v[row : row + 1]) for k, v in states) for row in range(2)]

    def peer(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return theirs(x.to(dtype), t, context.to(dtype), return_dict=False)[0]

    fns = {
        "wanflow, one batch": lambda: ours(both, timestep.expand(2), states),
        "wanflow, two passes": lambda: torch.cat([ours(latent, timestep, row) for row in rows]),
        "diffusers, one batch": lambda: peer(both, timestep.expand(2), text),
        "diffusers, two passes": lambda: torch.cat(
            [peer(latent, timestep, text[row : row + 1]) for row in range(2)]
        ),
    }
    with FlopCounterMode(display=False) as counter:  # it does not see into compiled code
        fns["wanflow, one batch"]()
    if compiled:
        Compiler(torch.device("cpu"), True, None, "benchmark").attach(ours)
        theirs.compile_repeated_blocks(fullgraph=True)
    a, b = fns["wanflow, one batch"](), fns["diffusers, one batch"]().float()
    difference = float((a - b).abs().max() / b.abs().max())
    assert difference < (1e-4 if dtype == torch.float32 else 0.05), difference
    result = compared(rounds(fns, count), difference)
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
    seconds = min(rounds({"matmul": lambda: a @ b}, 5)["matmul"])
    return 2 * 2048**3 / seconds


def vae_pair() -> dict[str, Callable[[], Tensor]]:
    from diffusers import AutoencoderKLWan

    ours = WanVAE(VAEConfig()).eval().requires_grad_(False)
    randomise(ours)
    theirs = (
        AutoencoderKLWan(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
        .eval()
        .requires_grad_(False)
    )
    give("vae", ours, theirs)
    z = torch.randn(VAE_LATENT, generator=torch.Generator().manual_seed(2))
    # Both hand over frames as they come, or whole: diffusers returns the whole video, so ours is
    # asked for it too.
    return {
        "wanflow": lambda: ours.decode(z).clamp_(-1, 1),
        "diffusers": lambda: theirs.decode(z, return_dict=False)[0],
    }


def decode(count: int) -> dict[str, Any]:
    fns = vae_pair()
    a, b = fns["wanflow"](), fns["diffusers"]()
    difference = float((a - b).abs().max())
    assert difference < 1e-4, difference
    result = compared(rounds(fns, count), difference)
    peaks = {}
    for side in fns:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", side], capture_output=True, text=True, check=True
        )
        peaks[side] = float(done.stdout.split()[-1])
    memory = {"peak_mb": peaks, "memory_ratio": round(peaks["wanflow"] / peaks["diffusers"], 3)}
    return result | memory | {"time": where_time_goes(fns["wanflow"])}


def anonymous() -> int:
    """Bytes of anonymous memory of this process (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def peak(side: str) -> float:
    """Megabytes that a decode adds at its peak, sampled every 2 ms; after a tiny decode that fills
    the libraries' own buffers.
    """
    import ctypes

    fn = vae_pair()[side]
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, highest, stop = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    fn()
    stop.set()
    thread.join()
    return (highest - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", choices=("wanflow", "diffusers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.peak:
        print(peak(args.peak))
        return
    import diffusers

    results: dict[str, Any] = {}
    for name, run in {
        "step float32": lambda: step(torch.float32, args.rounds),
        "step bfloat16": lambda: step(torch.bfloat16, args.rounds),
        "step float32 compiled": lambda: step(torch.float32, args.rounds, True),
        "step bfloat16 compiled": lambda: step(torch.bfloat16, args.rounds, True),
        "vae decode float32": lambda: decode(args.rounds),
    }.items():
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
