"""Choose every open setting: the fastest that fits, with the reasons in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import TypeVar

import torch

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.choices import with_defaults
from wanflow.geometry import geometry_of
from wanflow.plan.cards import GB, capability_of
from wanflow.plan.gpus import Machine
from wanflow.plan.phases import (
    Need,
    Phase,
    decode_phase,
    expert_phases,
    need,
    on_device,
    streamed_bytes,
    text_phase,
)
from wanflow.plan.plan import Plan, set_up
from wanflow.plan.traces import Traces
from wanflow.request import CompleteRequest
from wanflow.runtime import Runtime
from wanflow.transforms.ways import Gpu
from wanflow.units import file_size, memory_size

T = TypeVar("T")

# Tokens: enough rows for a matmul at full speed, and few enough that attention stays the peak at
# 720p.
CHUNK = 8192
TILES = (512, 384, 256, 192)  # pixels
# The share of RAM that weights may take on a CPU, for a model that does not fit. The rest is the
# system's cache, through which the files are read.
CPU_SHARE, CPU_LEAST = 1 / 3, 8 * 10**9
MANY_PIXELS = 4096**2  # above, a plan with tiles takes seconds
SPARE = 0.02  # of free memory: what other programs may take during a run


def solve(
    checkpoint: Checkpoint,
    request: CompleteRequest,
    runtime: Runtime,
    machine: Machine,
    processes: int = 1,
    per_machine: int | None = None,
    report: Callable[[str], object] = str,
) -> Plan:
    """Return a traced plan in which no setting is open; set ones stay, even if they do not fit.

    `report` is called with what is planned next. The other arguments and errors are those of
    `set_up`.
    """
    plan = set_up(checkpoint, request, runtime, machine, processes, per_machine)
    return completed_plan(plan, report)


def completed_plan(plan: Plan, report: Callable[[str], object] = str) -> Plan:
    """Return a plan that `set_up` began, traced and without an open setting."""
    on_gpu_here = plan.kind == "gpu" and not plan.machine.described
    device = torch.device((plan.machine.device or "cuda") if on_gpu_here else "cpu")
    capability = capability_of(plan.machine.gpu_name) if plan.kind == "gpu" else None
    gpu = Gpu(capability) if capability and plan.machine.described else None
    how = plan.dtype, device, plan.layout, plan.here, report, gpu, plan.machine
    traces = Traces(plan.checkpoint, plan.request, *how)
    if not plan.small:
        return _Solver(plan, traces).solved()
    open_tile = plan.runtime.vae_tile is None
    return _Solver(plan.all_resident(), traces).all_resident(open_tile)


class _Solver:
    """Chooses the settings of a model on one machine."""

    def __init__(self, begun: Plan, traces: Traces) -> None:
        machine = begun.machine
        self.begun, self.traces, self.kind = begun, traces, begun.kind
        self.layers, self.experts = traces.layers, traces.experts
        self.two_experts = len(traces.spec.expert_names) > 1
        self.gpu = round(machine.gpu_room * (1 - SPARE))
        self.ram = round(machine.ram_free * (1 - SPARE)) if machine.ram_free else 1 << 62
        self.several = traces.layout.size > 1
        self.reasons: list[str] = list(begun.reasons)

    def solved(self) -> Plan:
        runtime = self._choose_text(self.begun.runtime)
        runtime = self._choose_experts(runtime)
        runtime = self._choose_vae(runtime)
        return self._plan(runtime, self._offers)

    def all_resident(self, open_tile: bool) -> Plan:
        """Return the plan of a small model; only the tiles of its VAE are chosen."""
        runtime = self.begun.runtime
        if open_tile and not self.several and self._few_pixels():
            before = tuple(self.reasons)
            tiled = self._choose_vae(replace(runtime, vae_tile=None))
            if self._has_room(decode_phase(self.traces, tiled, self.kind)):
                runtime = tiled
            else:  # and full frames take less work
                self.reasons = list(before)
        return self._plan(runtime, self._smaller)

    def _plan(self, runtime: Runtime, offers: Callable[[Runtime, bool], Iterator[str]]) -> Plan:
        """Return the plan of a runtime; `offers` gets it, and whether something does not fit."""
        needed = need(self.traces, runtime, self.kind)
        short = tuple(self._short(needed))
        return replace(
            self.begun,
            runtime=runtime,
            reasons=(*self.reasons, *self._quantised_words(runtime)),
            need=needed,
            short=short,
            offers=tuple(offers(runtime, bool(short))),
        )

    def _quantised_words(self, runtime: Runtime) -> Iterator[str]:
        """Say how quantised layers multiply."""
        for way in self.traces.ways(runtime) if runtime.quantize else ():
            rounded = f"tokens are rounded to 8 bits too ({way}), which saves time"
            unpacked = f"{runtime.quantize} weights are unpacked for each product ({way})"
            yield unpacked if way == "weight-only" else rounded

    def _few_pixels(self) -> bool:
        return math.prod(self.traces.request.size) <= MANY_PIXELS

    def _short(self, needed: Need) -> Iterator[str]:
        """Yield what does not fit, in words."""
        gpu, ram, machine = needed.device, needed.ram, self.begun.machine
        if self._lacks_bfloat16():
            yield f"bfloat16, in which {machine.gpu_name} does not compute"
        if gpu.device > self.gpu:
            each = " on each GPU" if self.several else ""
            yield (
                f"{memory_size(gpu.device)} of GPU memory{each} ({gpu.name});"
                f" {memory_size(self.gpu)} can be used"
            )
        if ram.ram > self.ram:
            ranks = f" for {self.traces.here} processes" if self.traces.here > 1 else ""
            yield (
                f"{memory_size(ram.ram)} of RAM{ranks} ({ram.name});"
                f" {memory_size(self.ram)} can be used"
            )
        if machine.described and needed.disk > machine.disk_free:  # here weights may be on the disk
            yield f"{file_size(needed.disk)} of disk; there are {file_size(machine.disk_free)}"

    # each setting

    def _choose_text(self, runtime: Runtime) -> Runtime:
        if self.kind == "cpu" or runtime.t5_cpu is not None:
            return with_defaults(runtime, t5_cpu=True)
        phase = text_phase(self.traces, replace(runtime, t5_cpu=False), self.kind)
        runtime = replace(runtime, t5_cpu=phase.device > self.gpu)
        who = ", by the first process for all" if self.several else ""
        device = "CPU" if runtime.t5_cpu else "GPU"
        self.reasons.append(
            f"the text encoder's blocks are read and run one by one, on the {device}{who}"
        )
        return runtime

    def _choose_experts(self, runtime: Runtime) -> Runtime:
        for candidate in self._candidates(runtime):
            chosen, reason = candidate
            if self._fits(chosen):
                break
        self.reasons.append(reason)
        if chosen.chunk_tokens:
            self.reasons.append(
                f"MLP and projections run in chunks of {chosen.chunk_tokens} tokens, which takes"
                " less memory"
            )
        return self._choose_prefetch(chosen) if chosen.prefetch is None else chosen

    def _candidates(self, runtime: Runtime) -> Iterator[tuple[Runtime, str]]:
        """Yield ways to hold the experts, the fastest first and the last resort at the end."""
        on_cpu = self.kind == "cpu"
        chunks = [0, CHUNK] if self.traces.own_tokens > CHUNK else [0]
        keeps, sources = [True, False], ["ram", "disk"]
        if on_cpu:  # RAM is worth most as the cache of the files
            chunks, keeps, sources = chunks[-1:], [False], ["disk"]
        chunks = _unless_set(runtime.chunk_tokens, chunks)
        keeps = _unless_set(runtime.keep_experts, keeps)
        sources = _unless_set(runtime.stream_from, sources)
        all_resident = runtime.resident_blocks in (None, self.layers)
        # Shards need all-gathers, so they come after complete experts. They take no RAM, so they
        # come before streamed blocks.
        shards = [False, True] if self.several and not on_cpu and all_resident else [False]
        shards = _unless_set(runtime.dit_fsdp, shards)
        for sharded, keep, chunk in product(shards, keeps, chunks):
            if sharded or all_resident:
                way = with_defaults(
                    runtime,
                    dit_fsdp=sharded,
                    keep_experts=keep,
                    resident_blocks=self.layers,
                    chunk_tokens=chunk,
                    stream_from=sources[0],
                )
                yield way, self._resident_words(way, runtime.dit_fsdp is None)
        if runtime.dit_fsdp or runtime.resident_blocks == self.layers:
            return
        for source in sources:
            way = with_defaults(
                runtime,
                dit_fsdp=False,
                keep_experts=keeps[-1],
                chunk_tokens=chunks[-1],
                stream_from=source,
            )
            if way.resident_blocks is None:
                way = replace(way, resident_blocks=self._most_resident(way))
            yield way, self._streaming_words(way)

    def _resident_words(self, way: Runtime, chosen: bool) -> str:
        size = memory_size(on_device(self.traces, self.experts[0], way))
        if not self.two_experts:
            held, words = f"the transformer ({size})", "is in memory"
            words += " until the VAE decodes" if not way.keep_experts else ", also for later videos"
            complete = f"the complete transformer {words} ({size})"
        elif way.keep_experts:
            held = f"both experts ({size} each)"
            complete = f"both experts stay in memory ({size} each)"
        else:
            held = f"one expert ({size})"
            complete = f"one complete expert at a time is in memory ({size})"
        if not way.dit_fsdp:
            return complete
        words = f"each process holds a shard of {held}, and gathers each block one ahead"
        if not chosen:
            return words
        full = max(self.traces.expert(expert, way).total for expert in self.experts)
        return (
            f"{words}; a complete one takes {memory_size(full)}, and streaming takes RAM on each"
            " process"
        )

    def _most_resident(self, way: Runtime) -> int:
        """Return how many blocks fit besides a step's other needs: at least none, never all."""
        bare = replace(way, resident_blocks=0)
        phases = expert_phases(self.traces, bare, self.kind)
        block = max(max(self.traces.expert(expert, bare).blocks) for expert in self.experts)
        if way.keep_experts:
            block *= len(self.experts)
        if self.kind == "cpu":
            room = min(self.ram, max(CPU_LEAST, round(self.ram * CPU_SHARE)))
            room -= max(phase.ram for phase in phases)
            count = room // (block * self.traces.here)
        else:
            room = self.gpu - max(phase.device for phase in phases)
            count = int(room / (block * (1 + self.begun.machine.overheads.gaps)))
        return max(0, min(self.layers - 1, count))

    def _streaming_words(self, way: Runtime) -> str:
        streamed = self.layers - (way.resident_blocks or 0)
        source = "RAM" if way.stream_from == "ram" else "their files"
        size = memory_size(streamed_bytes(self.traces, self.experts[0], way))
        whose = "an expert's" if self.two_experts else "the"
        return (
            f"{way.resident_blocks} of {whose} {self.layers} blocks stay resident, {streamed}"
            f" ({size}) are streamed from {source}"
        )

    def _choose_prefetch(self, runtime: Runtime) -> Runtime:
        """Prefetch the next expert into RAM where there is one, and room for it."""
        if self.kind == "cpu" or runtime.dit_fsdp or len(self.experts) < 2:
            return replace(runtime, prefetch=False)
        ahead = replace(runtime, prefetch=True)
        fits = max(phase.ram for phase in expert_phases(self.traces, ahead, self.kind)) <= self.ram
        self.reasons.append(
            "the next expert is prefetched into RAM while the current one runs"
            if fits
            else "the next expert is read when its steps begin: RAM is too small to prefetch it"
        )
        return replace(runtime, prefetch=fits)

    def _choose_vae(self, runtime: Runtime) -> Runtime:
        if runtime.vae_tile is not None:
            return runtime
        full = decode_phase(self.traces, replace(runtime, vae_tile=0), self.kind)
        if self._has_room(full):
            return replace(runtime, vae_tile=0)
        for side in TILES:
            tiled = replace(runtime, vae_tile=side)
            if self._has_room(decode_phase(self.traces, tiled, self.kind)):
                break
        self.reasons.append(
            f"the VAE decodes in tiles of {side} pixels: full frames would take"
            f" {memory_size(full.tensors)}"
        )
        return tiled

    # fits

    def _fits(self, runtime: Runtime) -> bool:
        weights = [on_device(self.traces, expert, runtime) for expert in self.experts]
        least = sum(weights) if runtime.keep_experts else max(weights)  # known without a trace
        if least > (self.gpu if self.kind == "gpu" else self.ram // self.traces.here):
            return False
        phases = expert_phases(self.traces, runtime, self.kind)
        # Strips are the only way of several; and experts that stay must leave room for the VAE.
        if self.several or (runtime.keep_experts and self.kind == "gpu"):
            phases.append(decode_phase(self.traces, runtime, self.kind))
        return all(self._has_room(phase) for phase in phases)

    def _has_room(self, phase: Phase) -> bool:
        return phase.device <= self.gpu and phase.ram <= self.ram

    def _offers(self, runtime: Runtime, short: bool) -> Iterator[str]:
        streams = (runtime.resident_blocks or 0) < self.layers
        helps = streams or (short and runtime.dit_fsdp)
        if helps and self.kind == "gpu" and not runtime.quantize:
            size = self._size_in_fp8(runtime)
            if size * (1 + self.begun.machine.overheads.gaps) + GB < self.gpu:
                yield (
                    f"--quantize fp8 --quantize_layers all would keep {self._one()} in memory"
                    f" ({memory_size(size)}), and changes the video"
                )
        if self._lacks_bfloat16():
            yield "--dtype auto takes float16 there"
        width, height = self.traces.request.size
        fitting = list(self._fitting(runtime)) if short else []
        yield from (f"{one} fits" for one in fitting)
        if short and not fitting and width * height > 832 * 480:
            yield "--size 832*480 needs less"

    def _one(self) -> str:
        return "an expert" if self.two_experts else "the transformer"

    def _lacks_bfloat16(self) -> bool:
        lacks = self.kind == "gpu" and not self.begun.machine.bfloat16
        return lacks and self.begun.dtype == torch.bfloat16

    def _smaller(self, runtime: Runtime, short: bool) -> Iterator[str]:
        """Yield what would fit, in words: tiles of the VAE, and a smaller or shorter video."""
        if not short:
            return
        tiled = replace(runtime, vae_tile=TILES[-2])
        full = not runtime.vae_tile and not self.several and self._few_pixels()
        if full and not any(self._short(need(self.traces, tiled, self.kind))):
            yield f"vae_tile {tiled.vae_tile}"
        yield from self._fitting(runtime)

    def _fitting(self, runtime: Runtime) -> Iterator[str]:
        """Yield a smaller or shorter video that fits, in words, where there is one."""
        traces = self.traces
        for _ in range(4):
            needed = need(traces, runtime, self.kind)
            width, height = traces.request.size
            if not any(self._short(needed)):
                yield f"size {width}*{height} with frame_num {traces.request.frame_num}"
                return
            smaller = self._shrunk(needed, traces)
            if smaller is None:
                return
            traces = traces.of(smaller)

    def _shrunk(self, needed: Need, traces: Traces) -> CompleteRequest | None:
        """Return a request that should fit, by the share of what grows with it; None: none does."""
        request, geometry = traces.request, geometry_of(traces.spec)
        phase = needed.device if needed.device.device > self.gpu else needed.ram
        if phase is needed.device:
            over, grows = phase.device - self.gpu, phase.activations
        else:
            over, grows = phase.ram - self.ram, phase.frames + phase.activations
        share = 0.9 * (1 - over / grows) if grows else 0
        if share <= 0 or over <= 0:  # nothing but weights, or the disk
            return None
        if request.frame_num > 1 and (phase.expert or phase.frames > phase.activations):
            return replace(request, frame_num=geometry.longest(int(share * request.frame_num)))
        step = geometry.size_multiple
        width, height = (max(1, int(share**0.5 * side) // step) * step for side in request.size)
        return replace(request, size=(width, height))

    def _size_in_fp8(self, runtime: Runtime) -> int:
        """Return the bytes of an expert in fp8 with its activations."""
        fp8 = replace(
            runtime,
            quantize="fp8",
            quantize_layers="all",
            resident_blocks=self.layers,
            keep_experts=False,
        )
        phases = expert_phases(self.traces, runtime, self.kind)
        activations = max(phase.activations for phase in phases)
        if runtime.dit_fsdp:  # two gathered blocks are among them, which shrink too
            now, then = (self.traces.expert(self.experts[0], each) for each in (runtime, fp8))
            activations -= 2 * (now.gathered - then.gathered)
        return activations + max(on_device(self.traces, expert, fp8) for expert in self.experts)


def _unless_set(value: T | None, choices: list[T]) -> list[T]:
    return choices if value is None else [value]
