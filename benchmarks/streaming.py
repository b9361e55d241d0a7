"""Is reading hidden behind the work? A step of one expert at full width with its blocks resident,
streamed, and streamed in line.

Blocks are read from a float32 file and rounded to bfloat16 in every pass, as on a machine whose RAM
holds no expert. One thread computes and one reads. "In line" is the same with the reading in the
computing thread: what nothing hides. All give the same numbers, which is checked.

    python benchmarks/streaming.py [--layers 3] [--size 256*256] [--frame_num 17] [--rounds 5]

The last line of output is one JSON document: seconds by way, each the median of interleaved rounds,
and their ratios to "resident".
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from wanflow.checkpoint.load import load_module
from wanflow.checkpoint.source import OfficialSource, official, open_source
from wanflow.checkpoint.structure import expert_structure
from wanflow.config import DiTConfig
from wanflow.geometry import parse_size
from wanflow.loaders.streamed import block_reader
from wanflow.models.dit import WanDiT
from wanflow.runtime import Runtime
from wanflow.transforms.block_streaming import Streaming, SyncExecutor, matmul_leaves

CPU = torch.device("cpu")


def write_expert(path: Path, config: DiTConfig) -> None:
    """Random weights of a size that keeps activations in range."""
    with torch.device("meta"):
        model = WanDiT(config)
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            name: torch.randn(p.shape, generator=generator).mul_(0.02)
            for name, p in model.named_parameters()
        },
        path,
    )


def laid_out(config: DiTConfig, source: OfficialSource) -> WanDiT:
    return expert_structure(config, source, Runtime(), torch.bfloat16, CPU)


def streamed(config: DiTConfig, source: OfficialSource, worker: SyncExecutor | None) -> Streaming:
    model = laid_out(config, source)
    fetch = block_reader(model, source, {})
    names = {
        f"blocks.{n}.{path.rpartition('.')[0]}.weight"
        for n, block in enumerate(model.blocks)
        for path in matmul_leaves(block)
    }
    load_module(model, source, CPU, skip=names)
    return Streaming(model, fetch, (), CPU, worker=worker)


@torch.no_grad()
def measure(args: argparse.Namespace, path: Path) -> dict[str, object]:
    config = DiTConfig(num_layers=args.layers)
    write_expert(path, config)
    source = official("dit", open_source(path))
    resident = laid_out(config, source)
    load_module(resident, source, CPU)
    ways = {
        "resident": resident,
        "streamed": streamed(config, source, None),
        "in line": streamed(config, source, SyncExecutor()),
    }
    width, height = args.size
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(
        1, 16, (args.frame_num - 1) // 4 + 1, height // 8, width // 8, generator=generator
    )
    text = resident.text_states(torch.randn(1, 512, 4096, generator=generator))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    expected = None
    for number in range(args.rounds + 1):
        for way, model in ways.items():
            start = time.perf_counter()
            out = model(latent, torch.tensor([900.0]), text)
            if number:  # the first round warms up
                seconds[way].append(time.perf_counter() - start)
            expected = out if expected is None else expected
            if not torch.equal(out, expected):
                sys.exit(f"{way} gave other numbers")
            print(
                f"round {number} of {args.rounds}, {way}: {time.perf_counter() - start:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "what": "one expert's step, bfloat16, full width, blocks from a float32 file",
        "layers": args.layers,
        "size": f"{width}*{height}",
        "frames": args.frame_num,
        "tokens": latent[0, 0].numel() // 4,
        "seconds": medians,
        "ratio": {way: value / medians["resident"] for way, value in medians.items()},
        "spread": {way: [min(times), max(times)] for way, times in seconds.items()},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--size", type=parse_size, default=(256, 256))
    parser.add_argument("--frame_num", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the file of 5 GB is written (a temporary folder)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(
            json.dumps(
                {
                    "command": f"python benchmarks/streaming.py {' '.join(sys.argv[1:])}".strip(),
                    **measure(args, Path(folder) / "expert.safetensors"),
                }
            )
        )
