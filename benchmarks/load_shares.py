"""Measure what one rank reads and holds of an expert whose weights are sharded (`--dit_fsdp`).

Takes a sparse folder in the official layout (tests/helpers/sparse_checkpoint.py writes one; its
values are zeros, its sizes are real). The rank is one of many in PyTorch's fake group: the others'
shards do not exist. Anonymous memory (RssAnon) is read every few milliseconds, bytes read from
/proc/self/io (rchar).

    python tests/helpers/sparse_checkpoint.py /tmp/sparse --no-t5
    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/load_shares.py /tmp/sparse --processes 8

MALLOC_MMAP_THRESHOLD_ lets the C library return freed memory; by default it held 1.6 GB here.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import threading
import time
from datetime import date
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from wanflow.checkpoint.checkpoint import open_checkpoint
from wanflow.checkpoint.load import expert_bytes as whole_bytes
from wanflow.checkpoint.structure import build
from wanflow.loaders.parts import open_expert
from wanflow.loaders.placement import Placement
from wanflow.parallel.groups import Layout, make_groups
from wanflow.parallel.ranks import DistInfo
from wanflow.runtime import Runtime

CPU = torch.device("cpu")


def number(file: str, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/self/{file}").read_text())
    assert found
    return int(found[1])


def anonymous() -> int:
    return number("status", "RssAnon") * 1024


class Peak:
    """The growth of anonymous memory, at its peak."""

    def __init__(self) -> None:
        gc.collect()
        self.base = self.most = anonymous()
        self.going = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while self.going:
            self.most = max(self.most, anonymous())
            time.sleep(0.003)

    def stop(self) -> int:
        self.going = False
        self.thread.join()
        return self.most - self.base


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantize", default="")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    checkpoint = open_checkpoint(args.folder)
    dist.init_process_group("fake", rank=args.rank, world_size=args.processes)
    ctx = make_groups(Layout(ulysses=args.processes), DistInfo(args.rank, args.processes, CPU))
    runtime = Runtime(
        device="cpu",
        dit_fsdp=True,
        quantize=args.quantize,
        quantize_layers="all" if args.quantize else "ffn",
    )
    import_module("torch.distributed.fsdp")  # whose modules are no weights

    peak, read, began = Peak(), number("io", "rchar"), time.monotonic()
    model = open_expert(checkpoint, "high", Placement(dtype, CPU, runtime, ctx))
    seconds, read = time.monotonic() - began, number("io", "rchar") - read
    own = sum(
        value.to_local().nbytes if hasattr(value, "to_local") else value.nbytes
        for value in model.parameters()
    )
    found = {
        "what": "one process of several reads its share of an expert",
        "command": (
            f"python benchmarks/load_shares.py SPARSE --processes {args.processes} --rank"
            f" {args.rank} --dtype {args.dtype}"
            + (f" --quantize {args.quantize}" if args.quantize else "")
        ),
        "layers": checkpoint.spec.dit.num_layers,
        "whole_expert_GB": whole_bytes(checkpoint, dtype) / 1e9,
        "own_weights_GB": own / 1e9,
        "peak_anonymous_GB": peak.stop() / 1e9,
        "read_GB": read / 1e9,
        "file_GB": (
            sum(value.numel() * 4 for value in build(type(model), checkpoint.spec.dit).parameters())
            / 1e9
        ),
        "seconds_beside_other_work": seconds,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": date.today().isoformat(),
    }
    print(
        json.dumps(
            {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in found.items()
            }
        )
    )


if __name__ == "__main__":
    main()
