"""How fast is an expert loaded, beside a plain read of its file? What do several ranks take?

Takes a folder of full width with few layers, in float32: holes ("sparse"), then random numbers
("real"). Both are in the page cache. In each round a file is read plainly, into one buffer ("plain
read") and into memory of its own ("fresh read", as loading must), and loaded in bfloat16 and in
float32. Rates are bytes of the file by seconds, each the median of interleaved rounds.

"ranks" reads the sparse folder with 1, 2 and 4 processes: bytes read by all (/proc/self/io, rchar)
by the file's, with resident experts; and the memory of all (Pss, in which a shared page counts
once) by that of one, with streamed experts in float32 after a forward. A process holds 0.24 GB of
Python and PyTorch, and 21 MB a block for the text's keys and values.

    python benchmarks/loading.py [--layers 1] [--ram_layers 5] [--only rates|ranks|memory]

The last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from wanflow.checkpoint.checkpoint import Checkpoint, open_checkpoint
from wanflow.checkpoint.load import load_expert
from wanflow.hardware import usable_cores
from wanflow.loaders.parts import open_expert
from wanflow.loaders.placement import Placement
from wanflow.parallel import ranks
from wanflow.parallel.groups import Layout, make_groups
from wanflow.presets import NANO_FOLDER
from wanflow.runtime import Runtime

CPU = torch.device("cpu")
SPARSE = Path(__file__).parents[1] / "tests" / "helpers" / "sparse_checkpoint.py"
CHUNK = 4 << 20


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def opened(folder: Path) -> Checkpoint:
    """The folder has no tokenizer, and none is used."""
    return open_checkpoint(folder, {"tokenizer": NANO_FOLDER / "google/umt5-xxl/tokenizer.json"})


# rates


def fill(files: list[Path]) -> None:
    """Overwrite the holes with random numbers of a size that weights have."""
    tile = torch.randn(16 << 20).mul_(0.02).numpy().tobytes()
    for path in files:
        with path.open("r+b") as file:
            header = int.from_bytes(file.read(8), "little")
            left = path.stat().st_size - file.seek(8 + header)
            while left:
                left -= file.write(tile[: min(left, len(tile))])


def plain_read(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for path in files:
        with path.open("rb", 0) as file:
            while file.readinto(buffer):
                pass


def fresh_read(files: list[Path]) -> None:
    kept = []
    for path in files:
        kept.append(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy())
        with path.open("rb", 0) as file:
            done = 0
            while count := file.readinto(kept[-1][done : done + CHUNK]):
                done += count


def rates(checkpoint: Checkpoint, rounds: int) -> dict[str, float]:
    """GB/s of each way, and its ratio to the plain reads of the same round."""
    source = checkpoint.source("high")
    files = [path for path in source.files if path.suffix == ".safetensors"]
    ways: dict[str, Callable[[], Any]] = {
        "plain read": lambda: plain_read(files),
        "fresh read": lambda: fresh_read(files),
        "load in bfloat16": lambda: load_expert(checkpoint, "high", torch.bfloat16, "cpu"),
        "load in float32": lambda: load_expert(checkpoint, "high", torch.float32, "cpu"),
    }
    plain_read(files)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way, work in ways.items():
            start = time.perf_counter()
            work()
            seconds[way].append(time.perf_counter() - start)
        last = {way: round(times[-1], 2) for way, times in seconds.items()}
        note(f"round {number + 1} of {rounds}: {last}")
    found = {way: source.nbytes / statistics.median(times) / 1e9 for way, times in seconds.items()}
    for base in ("plain read", "fresh read"):
        for way in ("load in bfloat16", "load in float32"):
            pairs = zip(seconds[base], seconds[way], strict=True)
            found[f"{way} / {base}"] = statistics.median(plain / own for plain, own in pairs)
    return {way: round(value, 3) for way, value in found.items()}


# ranks


def read_so_far() -> int:
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    return int(found[1]) if found else 0


def memory() -> int:
    """Bytes of this process, each page by the number of processes that map it."""
    found = re.search(r"^Pss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@torch.no_grad()
def rank(folder: Path, what: str) -> None:
    """Load as one of the ranks that the environment describes; print what it took."""
    torch.set_num_threads(1)
    info = ranks.join_group(CPU)
    ctx = make_groups(Layout(ulysses=info.world_size), info) if info.world_size > 1 else None
    checkpoint = opened(folder)
    streamed = what == "streamed"
    runtime = Runtime(resident_blocks=0, stream_from="ram") if streamed else Runtime()
    dtype = torch.float32 if streamed else torch.bfloat16  # more weights by the bytes read
    before, start = read_so_far(), time.perf_counter()
    model = open_expert(checkpoint, "high", Placement(dtype, CPU, runtime, ctx))
    found: dict[str, float] = {
        "seconds": time.perf_counter() - start,
        "read": read_so_far() - before,
    }
    if streamed:
        config = checkpoint.spec.dit
        text = torch.zeros(1, 8, config.text_dim)
        out = model(torch.zeros(1, config.in_dim, 1, 8, 8), torch.tensor([900.0]), text)
        found["finite"] = float(out.isfinite().all())
        if ctx is not None:
            ctx.world.all_gather("loaded", torch.zeros(1))
        found["memory"] = memory()
    if ctx is not None:
        ctx.world.all_gather("measured", torch.zeros(1))
    print(json.dumps(found), flush=True)
    ranks.leave_group()


def started(folder: Path, what: str, count: int) -> list[dict[str, float]]:
    """What each of some ranks prints."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--folder", str(folder), "--rank", what],
            env={**environment, "RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"a rank of {count} failed")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def several(folder: Path, counts: tuple[int, ...], ways: tuple[str, ...]) -> dict[str, Any]:
    """Bytes read with resident experts, and memory with streamed ones, by number of ranks."""
    source = opened(folder).source("high")
    found: dict[str, Any] = {"file_gb": round(source.nbytes / 1e9, 2)}
    for what in ways:
        for count in counts:
            printed = started(folder, what, count)
            values = {
                "files_read": round(sum(one["read"] for one in printed) / source.nbytes, 4),
                "seconds": round(max(one["seconds"] for one in printed), 2),
            }
            if what == "streamed":
                values["memory_gb"] = round(sum(one["memory"] for one in printed) / 1e9, 3)
                alone = found.get("streamed, 1", values)["memory_gb"]
                values["memory_by_one"] = round(values["memory_gb"] / alone, 3)
            found[f"{what}, {count}"] = values
            note(f"{what}, {count} ranks: {values}")
    return found


def sparse(folder: Path, layers: int) -> Path:
    command = [sys.executable, str(SPARSE), str(folder), "--layers", str(layers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, help="of the files whose rate is measured")
    parser.add_argument("--ram_layers", type=int, default=5, help="of the file that ranks stream")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("rates", "ranks", "memory"))
    parser.add_argument("--folder", type=Path, help="where files of 5 GB are written")
    parser.add_argument("--rank", choices=("resident", "streamed"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.folder, args.rank)
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        if args.only in (None, "rates"):
            folder = sparse(Path(made) / "rates", args.layers)
            checkpoint = opened(folder)
            found["sparse"] = rates(checkpoint, args.rounds)
            fill([one for one in checkpoint.source("high").files if one.suffix == ".safetensors"])
            found["real"] = rates(opened(folder), args.rounds)
        if args.only != "rates":
            folder = sparse(Path(made) / "ranks", args.ram_layers)
            ways = ("streamed",) if args.only == "memory" else ("resident", "streamed")
            found["ranks"] = several(folder, tuple(args.ranks), ways)
    print(
        json.dumps(
            {
                "what": "loading an expert of full width from a float32 file in the page cache",
                "command": f"python benchmarks/loading.py {' '.join(sys.argv[1:])}".strip(),
                "date": date.today().isoformat(),
                "layers": args.layers,
                "ram_layers": args.ram_layers,
                **found,
                "cores": usable_cores(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
