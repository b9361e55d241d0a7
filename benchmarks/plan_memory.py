"""Compare the plan's memory with the peak anonymous memory of real runs at real widths, on a CPU.

Each case runs in a process of its own, through the pipeline's own code: random weights of the
published widths (A14B: dim 5120, feed-forward 13824, 40 heads; text encoder 4096; VAE 96; TI2V-5B
with its own), one to three layers. RssAnon is read every 2 ms, less its value before the weights
were made. The prediction is that of the plan's tensors. MALLOC_MMAP_THRESHOLD_ lets the C library
return freed memory, of which it may otherwise hold a few hundred MB.

Cases of several processes use gloo. The prediction is for the rank with the most to do, the last
one (in a decode one in the middle). The rank with the highest peak is compared. The bytes that the
last rank sent in a step must match exactly.

    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py [--only NAME]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wanflow.checkpoint.checkpoint import published
from wanflow.checkpoint.load import is_sharded
from wanflow.checkpoint.structure import build, expert_structure, vae_of
from wanflow.conditioning import clip_parts, conditioning_of, encoded_shape
from wanflow.loaders.velocity import make_velocity
from wanflow.lora.reader import read_adapter
from wanflow.lora.stack import shapes_of
from wanflow.models.umt5 import UMT5Encoder
from wanflow.parallel import vae_parallel as strips
from wanflow.parallel.cfg import split_guidance
from wanflow.parallel.fsdp import shard_blocks
from wanflow.parallel.groups import Layout, ParallelContext, make_groups, simulated_groups
from wanflow.parallel.ranks import DistInfo
from wanflow.parallel.sequence import connect, sharded
from wanflow.pipeline import to_frames
from wanflow.plan.phases import (
    READING,
    Phase,
    decode_phase,
    expert_phases,
    picture_phase,
    text_phase,
)
from wanflow.plan.plan import with_defaults
from wanflow.plan.traces import KERNEL, FakeParts, Traces
from wanflow.presets import I2V_A14B, T2V_A14B, TI2V_5B, ModelSpec
from wanflow.request import CompleteRequest, PictureRecord, Request
from wanflow.runtime import Runtime
from wanflow.sampling.solvers import SolverState, advance
from wanflow.sampling.timeline import schedule_of
from wanflow.transforms import vae_tiling as tiling
from wanflow.transforms.block_streaming import BlockBuffers, Streaming, evenly_spaced_resident
from wanflow.transforms.lora import Adapters
from wanflow.transforms.quant import NF4

ALLOWED, ALLOWED_MB = 0.05, 200  # CLARIFICATIONS: within 5 % plus 200 MB
INTERVAL = 0.002


@dataclass(frozen=True)
class Case:
    """One run: a stage, and how it runs."""

    name: str
    stage: str = "denoise"
    model: ModelSpec = T2V_A14B
    picture: bool = False
    layers: int = 2
    size: str = "192*192"
    frames: int = 17
    dtype: str = "bfloat16"
    cfg: float = 4.0
    rank: int = 0
    runtime: dict[str, Any] = field(default_factory=dict)
    layout: Layout = Layout()  # noqa: RUF009 (it is frozen)


TWO, GUIDED, THREE = Layout(ulysses=2), Layout(cfg=2), Layout(ulysses=3)
SHARED: dict[str, Any] = {"dit_fsdp": True}
CASES = (
    Case("bf16, two passes", runtime={"cfg_batch": False}),
    Case("bf16, one batch of two", runtime={"cfg_batch": True}),
    Case("bf16, without guidance", cfg=1.0),
    Case("float32, two passes", dtype="float32", layers=1, runtime={"cfg_batch": False}),
    Case("bf16, three layers", layers=3, cfg=1.0),
    Case(
        "float32, 480p, 5 frames (3,120 tokens)",
        dtype="float32",
        layers=1,
        size="832*480",
        frames=5,
        cfg=1.0,
    ),
    Case(
        "the same, 1,024 tokens at a time",
        dtype="float32",
        layers=1,
        size="832*480",
        frames=5,
        cfg=1.0,
        runtime={"chunk_tokens": 1024},
    ),
    Case("streamed, none of three resident", layers=3, cfg=1.0, runtime={"resident_blocks": 0}),
    Case("streamed, one of three resident", layers=3, cfg=1.0, runtime={"resident_blocks": 1}),
    Case("fp8, feed-forward", cfg=1.0, runtime={"quantize": "fp8"}),
    Case("int8, all", cfg=1.0, runtime={"quantize": "int8", "quantize_layers": "all"}),
    Case(
        "nf4, all, one of three resident",
        layers=3,
        cfg=1.0,
        runtime={"quantize": "nf4", "quantize_layers": "all", "resident_blocks": 1},
    ),
    Case("LoRA of rank 64, live", rank=64, cfg=1.0),
    Case("text encoder, two layers", stage="text"),
    Case("VAE, 320*320, 9 frames", stage="decode", size="320*320", frames=9),
    Case(
        "VAE, 320*320, 9 frames, tiles of 160",
        stage="decode",
        size="320*320",
        frames=9,
        runtime={"vae_tile": 160},
    ),
    Case("2 processes, cfg 2", runtime={"cfg_batch": False}, layout=GUIDED),
    Case(
        "2 processes, ulysses 2, float32, 3,120 tokens",
        dtype="float32",
        layers=1,
        size="832*480",
        frames=5,
        cfg=1.0,
        layout=TWO,
    ),
    Case(
        "2 processes, ring 2, float32, 3,120 tokens",
        dtype="float32",
        layers=1,
        size="832*480",
        frames=5,
        cfg=1.0,
        layout=Layout(ring=2),
    ),
    Case(
        "2 processes, ulysses 2, dit_fsdp, three layers",
        layers=3,
        cfg=1.0,
        runtime=SHARED,
        layout=TWO,
    ),
    Case("2 processes, cfg 2, dit_fsdp, three layers", layers=3, runtime=SHARED, layout=GUIDED),
    Case(
        "3 processes, ulysses 3, dit_fsdp, four layers",
        layers=4,
        cfg=1.0,
        runtime=SHARED,
        layout=THREE,
    ),
    Case(
        "2 processes, ulysses 2, dit_fsdp, int8, all",
        layers=3,
        cfg=1.0,
        runtime={**SHARED, "quantize": "int8", "quantize_layers": "all"},
        layout=TWO,
    ),
    Case(
        "2 processes, VAE in strips, 320*320, 9 frames",
        stage="decode",
        size="320*320",
        frames=9,
        layout=TWO,
    ),
    Case(
        "3 processes, VAE in strips, 480*320, 9 frames",
        stage="decode",
        size="480*320",
        frames=9,
        layout=THREE,
    ),
    Case("I2V-A14B: bf16, two passes", model=I2V_A14B, runtime={"cfg_batch": False}),
    Case(
        "I2V-A14B: float32, 480p, 5 frames (3,120 tokens)",
        model=I2V_A14B,
        dtype="float32",
        layers=1,
        size="832*480",
        frames=5,
        cfg=1.0,
    ),
    Case("I2V-A14B: pictures, 320*320, 17 frames", stage="encode", model=I2V_A14B, size="320*320"),
    Case("TI2V-5B: bf16, two passes", model=TI2V_5B, runtime={"cfg_batch": False}),
    Case(
        "TI2V-5B: float32, 704p, 13 frames (3,520 tokens)",
        model=TI2V_5B,
        dtype="float32",
        layers=1,
        size="1280*704",
        frames=13,
        cfg=1.0,
    ),
    Case(
        "the same, with a picture",
        model=TI2V_5B,
        picture=True,
        dtype="float32",
        layers=1,
        size="1280*704",
        frames=13,
        cfg=1.0,
    ),
    Case("TI2V-5B: picture, 640*640", stage="encode", model=TI2V_5B, size="640*640"),
    Case(
        "TI2V-5B: VAE, 320*320, 9 frames", stage="decode", model=TI2V_5B, size="320*320", frames=9
    ),
    Case(
        "TI2V-5B: VAE, 320*320, 9 frames, tiles of 160",
        stage="decode",
        model=TI2V_5B,
        size="320*320",
        frames=9,
        runtime={"vae_tile": 160},
    ),
    Case(
        "2 processes, TI2V-5B: VAE in strips, 320*320, 9 frames",
        stage="decode",
        model=TI2V_5B,
        size="320*320",
        frames=9,
        layout=TWO,
    ),
    # What `make test` takes as well.
    Case(
        "quick: TI2V-5B with a picture, one layer",
        model=TI2V_5B,
        picture=True,
        layers=1,
        size="256*256",
        cfg=1.0,
    ),
    Case(
        "quick: I2V-A14B, pictures, 192*192, 9 frames",
        stage="encode",
        model=I2V_A14B,
        size="192*192",
        frames=9,
    ),
    Case(
        "quick: TI2V-5B, VAE, 192*192, 5 frames",
        stage="decode",
        model=TI2V_5B,
        size="192*192",
        frames=5,
    ),
    Case(
        "quick: 2 processes, ulysses 2, dit_fsdp, one layer",
        layers=1,
        size="64*64",
        cfg=1.0,
        runtime=SHARED,
        layout=TWO,
    ),
    Case("quick: bf16, one layer", layers=1, size="64*64", cfg=1.0),
    Case(
        "quick: streamed, none of two resident",
        size="64*64",
        cfg=1.0,
        runtime={"resident_blocks": 0},
    ),
    Case("quick: VAE, 192*192, 5 frames", stage="decode", size="192*192", frames=5),
)


class Peak:
    """The most anonymous memory of this process since `reset`, read by a thread."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(INTERVAL)

    def reset(self) -> None:
        self.most = anonymous()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.most


def anonymous() -> int:
    """RssAnon of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:", 1)[1].split()[0]) * 1024


# the case


def preset_of(case: Case) -> ModelSpec:
    return replace(
        case.model,
        dit=replace(case.model.dit, num_layers=case.layers),
        text=replace(case.model.text, num_layers=2),
    )


def request_of(case: Case, folder: Path) -> CompleteRequest:
    lora = (str(folder / "lora.safetensors"),) if case.rank else None
    request = Request(
        "a",
        size=case.size,
        frame_num=case.frames,
        cfg_high=case.cfg,
        cfg_low=case.cfg,
        seed=1,
        sample_steps=8,
        lora=lora,
    )
    complete = request.complete(preset_of(case))
    if case.picture or case.model.conditioning == "channels" or case.stage == "encode":
        complete = replace(complete, image=PictureRecord("0" * 64, *complete.size))
    return complete


def runtime_of(case: Case) -> Runtime:
    runtime = Runtime(dtype=case.dtype, device="cpu", **case.runtime)
    return with_defaults(
        runtime,
        t5_cpu=True,
        keep_experts=False,
        prefetch=False,
        resident_blocks=case.layers,
        stream_from="disk",
        chunk_tokens=0,
        vae_tile=0,
        dit_fsdp=False,
        cfg_parallel=case.layout.cfg == 2,
        ring_size=case.layout.ring,
        ulysses_size=case.layout.ulysses,
    )


def predicted(case: Case, folder: Path) -> Phase:
    runtime, dtype = runtime_of(case), getattr(torch, case.dtype)
    traces = Traces(
        published(preset_of(case)),
        request_of(case, folder),
        dtype,
        torch.device("cpu"),
        case.layout,
        case.layout.size,
    )
    if case.stage == "text":
        return text_phase(traces, runtime, "cpu")
    if case.stage == "encode":
        return picture_phase(traces, "cpu")
    return (
        decode_phase(traces, runtime, "cpu")
        if case.stage == "decode"
        else expert_phases(traces, runtime, "cpu")[0]
    )


# what really happens


def noise(dtype: torch.dtype) -> Tensor:
    """A million values of a weight's size, to be repeated: drawing a gigabyte of them takes
    minutes.
    """
    values = torch.randn(1 << 20) * 0.02
    return (
        torch.randint(0, 256, (1 << 20,), dtype=torch.uint8).view(dtype)
        if not dtype.is_floating_point
        else values.to(dtype)
    )


def fill(value: Tensor) -> Tensor:
    """Every page of it is written to, or it would take no memory."""
    flat, pattern = value.view(-1).view(torch.uint8), noise(value.dtype).view(torch.uint8)
    for start in range(0, len(flat), len(pattern)):
        part = flat[start : start + len(pattern)]
        part.copy_(pattern[: len(part)])
    return value


def load(module: nn.Module, but: set[str] = set()) -> None:  # noqa: B006
    for name, parameter in list(module.named_parameters()):
        if any(name.endswith(f".{end}") for end in but):
            continue
        if is_sharded(parameter):
            local = cast(Any, parameter).to_local()
            local.fill_(0.01) if name.endswith("scale") else fill(local)
            continue
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(parameter.shape, dtype=parameter.dtype)
        value = (
            torch.tensor(NF4)
            if leaf == "levels"
            else value.fill_(0.01)
            if leaf == "scale"
            else fill(value)
        )
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def denoise(case: Case, folder: Path, peak: Peak, ctx: ParallelContext) -> None:
    """One step of the middle, where all there is of the solver's state is there; several processes
    make two and count the second.
    """
    preset, request, runtime = preset_of(case), request_of(case, folder), runtime_of(case)
    dtype = getattr(torch, case.dtype)
    plain = expert_structure(preset.dit, None, runtime, dtype, "cpu")
    model: Any = plain
    resident = evenly_spaced_resident(case.layers, runtime.resident_blocks or 0)
    if len(resident) < case.layers:
        load(plain, set(BlockBuffers(next(iter(plain.blocks))).leaves))

        def fetch(_: int, views: Any) -> None:
            for name, view in views.items():
                view.copy_(torch.tensor(NF4)) if name.endswith("levels") else fill(view)

        model = Streaming(plain, fetch, resident, torch.device("cpu"))
    else:
        if runtime.dit_fsdp:
            shard_blocks(plain, ctx)
        load(plain)
    connect(plain, ctx, KERNEL.attend, KERNEL.with_lse)
    if case.rank:
        Adapters(plain).attach(
            "lora",
            read_adapter(
                folder / "lora.safetensors", shapes_of(build(type(plain), preset.dit))
            ).changes["high"],
        )
    gc.collect()
    peak.reset()
    parts = FakeParts(preset, model, torch.bfloat16)
    schedule = schedule_of(request)
    encoded = torch.randn(encoded_shape(preset, request)) if request.image else None
    conditioning = conditioning_of(preset, request, encoded)
    velocity = make_velocity(
        parts,
        request,
        2,
        runtime.cfg_batch,
        sharded(ctx),
        split_guidance(ctx),
        conditioning=conditioning,
    )
    first, second, x, origin = (conditioning.start(request.seed, "cpu") for _ in range(4))
    state = SolverState(2, x, (first, second), origin)
    # Buffers for streamed blocks are memory only from when they are first written to, late in the
    # first pass.
    for _ in range(2 if len(resident) < case.layers or case.layout.size > 1 else 1):
        # the first step also makes keys and values of the text, for which shares are put together
        # once more
        ctx.stats.reset()
        conditioning.held(advance(schedule, state, velocity).x)


def text(case: Case, folder: Path, peak: Peak, ctx: ParallelContext) -> None:
    encoder = build(UMT5Encoder, preset_of(case).text).to(torch.bfloat16)
    load(encoder)
    peak.reset()
    ids = torch.randint(0, 1000, (1, 512))
    encoder(ids, torch.ones_like(ids))


def decode(case: Case, folder: Path, peak: Peak, ctx: ParallelContext) -> None:
    vae = vae_of(case.model.vae)
    load(vae)
    peak.reset()
    request, runtime = request_of(case, folder), runtime_of(case)
    latent = conditioning_of(preset_of(case), request).start(request.seed, "cpu")
    if ctx.layout.size > 1:
        frames = strips.decode_frames(vae, latent, ctx, to_frames)
    elif runtime.vae_tile:
        frames = tiling.decode_frames(vae, latent, runtime.vae_tile, to_frames)
    else:
        frames = map(to_frames, vae.decode_frames(latent))
    for _ in frames:
        pass


def encode(case: Case, folder: Path, peak: Peak, ctx: ParallelContext) -> None:
    vae = vae_of(case.model.vae)
    load(vae)
    peak.reset()
    preset, request = preset_of(case), request_of(case, folder)
    width, height = request.size
    pictures = {"first": torch.rand(3, height, width)}
    vae.encode_parts(clip_parts(preset, request, pictures))


def write_lora(case: Case, file: Path) -> None:
    """A LoRA on every matmul of the blocks, as it comes in files."""
    from safetensors.torch import save_file

    dit = preset_of(case).dit
    tensors = {}
    for block in range(dit.num_layers):
        sides = {
            f"{kind}.{leaf}": (dit.dim, dit.dim)
            for kind in ("self_attn", "cross_attn")
            for leaf in "qkvo"
        }
        for leaf, (out, inner) in {
            **sides,
            "ffn.0": (dit.ffn_dim, dit.dim),
            "ffn.2": (dit.dim, dit.ffn_dim),
        }.items():
            name = f"diffusion_model.blocks.{block}.{leaf}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(case.rank, inner).bfloat16() * 0.01
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, case.rank).bfloat16() * 0.01
    save_file(tensors, file)


def joined(layout: Layout, number: int, folder: Path) -> ParallelContext:
    """This process' ctx, which meets in the folder."""
    if layout.size == 1:
        return simulated_groups(layout)
    # Where the benchmark's processes meet is no description by torchrun, so `mesh.start` cannot be
    # asked.
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), layout.size),
        rank=number,
        world_size=layout.size,
    )
    ctx = make_groups(layout, DistInfo(number, layout.size, torch.device("cpu")))
    ctx.world.all_gather("first", torch.zeros(1))  # what talking takes at all
    return ctx


def child(case: Case, folder: Path, number: int) -> None:
    """Run the case in this process and print what it took."""
    if case.rank:
        write_lora(case, folder / "lora.safetensors")
    ctx = joined(case.layout, number, folder)
    with torch.no_grad():
        torch.randn(64, 64) @ torch.randn(64, 64)
        gc.collect()
        before = anonymous()
        peak = Peak()
        began = time.monotonic()
        stages = {"denoise": denoise, "text": text, "decode": decode, "encode": encode}
        stages[case.stage](case, folder, peak, ctx)
        most = peak.stop()
    sent = {what: count for what, count in ctx.stats.sent.items() if count}
    print(
        json.dumps(
            {
                "measured": most - before,
                "before": before,
                "seconds": time.monotonic() - began,
                "sent": sent,
            }
        )
    )


def compare(case: Case) -> dict[str, Any]:
    """Prediction and measurement of one case, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", case.name, "--folder", folder]
        # The C library keeps freed memory for itself where pieces are below a bound that moves up
        # to 32 MB; with the bound fixed, what is freed is given back, as a GPU's allocator gives it
        # to the next tensor.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        if case.layout.size > 1:  # which share the cores
            env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // case.layout.size))
        numbers = range(case.layout.size)
        started = [
            subprocess.Popen(
                [*command, "--number", str(number)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
            for number in numbers
        ]
        finished = [process.communicate() for process in started]
        for process, (_, error) in zip(started, finished, strict=True):
            if process.returncode:
                raise RuntimeError(f"{case.name}: {error[-2000:]}")
        each = [json.loads(out.splitlines()[-1]) for out, _ in finished]
        phase = predicted(case, Path(folder))
    want, got = (
        (phase.tensors + tiled_host(case, phase)) / 1e6,
        max(one["measured"] for one in each) / 1e6,
    )
    row: dict[str, Any] = {
        "case": case.name,
        "predicted_mb": round(want),
        "measured_mb": round(got),
        "ratio": round(want / got, 3),
        "within": abs(want - got) <= ALLOWED * got + ALLOWED_MB,
        "weights_mb": round(phase.weights / 1e6),
        "seconds": round(max(one["seconds"] for one in each), 1),
    }
    if case.layout.size > 1:
        row["each_mb"] = [round(one["measured"] / 1e6) for one in each]
    if case.layout.size > 1 and case.stage == "denoise":
        sent = {**phase.sent, **({"weights": phase.gathered} if phase.gathered else {})}
        row |= {"sent": sent, "sent_as_predicted": each[-1]["sent"] == sent}
    return row


def tiled_host(case: Case, phase: Phase) -> int:
    """On a CPU the features and the frames of a tiled decode lie in the same memory."""
    return phase.host - READING if case.stage == "decode" and runtime_of(case).vae_tile else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(
            next(case for case in CASES if case.name == args.child), args.folder, args.number
        )
    rows = []
    for case in CASES:
        if args.only is None or args.only in case.name:
            row = compare(case)
            rows.append(row)
            line = (
                f"{case.name:50} predicted {row['predicted_mb']:6} MB  measured"
                f" {row['measured_mb']:6} MB  ratio {row['ratio']:.3f}"
            )
            sent = "" if row.get("sent_as_predicted", True) else ", and it SENT OTHERWISE"
            print(
                f"{line}  {row['seconds']:5.1f} s "
                f" {'within' if row['within'] else 'OUTSIDE'}{sent}",
                flush=True,
            )
    machine = {
        "cpu": processor(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(
        json.dumps(
            {
                "what": "the plan's memory against anonymous memory measured on a CPU",
                "date": str(date.today()),
                "machine": machine,
                "command": (
                    "OMP_NUM_THREADS=1 python benchmarks/plan_memory.py"
                    + (f" --only {args.only!r}" if args.only else "")
                ),
                "allowed": f"{ALLOWED:.0%} and {ALLOWED_MB} MB",
                "within": sum(row["within"] for row in rows),
                "of": len(rows),
                "rows": rows,
            }
        )
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


if __name__ == "__main__":
    main()
