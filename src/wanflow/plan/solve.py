"""Every open setting is settled: what fits, in the order of what is fastest, with the reasons in
words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from wanflow.assemble import refuse_together
from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.parallel.groups import Layout
from wanflow.plan.gpus import Machine
from wanflow.plan.layout import layout_reasons, settle_layout, used_here
from wanflow.plan.model import small
from wanflow.plan.need import (
    SCATTER,
    Kind,
    Need,
    Phase,
    decode_phase,
    expert_phases,
    need,
    on_device,
    streamed_bytes,
    text_phase,
)
from wanflow.plan.phases import Traces
from wanflow.request import CompleteRequest
from wanflow.runtime import Runtime, choose_device, choose_dtype

GB = 10**9
# tokens: rows enough for a matmul to be as fast as with all, and so few that attention, not these
# parts, is the peak at 720p
CHUNK = 8192
TILES = (512, 384, 256, 192)  # pixels
# Of RAM, on a CPU: what stays in memory beside a model that does not fit. The rest is the system's,
# whose cache the files are read through.
CPU_SHARE, CPU_LEAST = 1 / 3, 8 * 10**9
SPARE = 0.02  # of what is free: what other programs take while a run goes on
ONE = Layout()


@dataclass(frozen=True)
class Plan:
    """How a request will be run on a machine, and why.

    runtime: nothing in it is open. need: None for a small model, of which nothing was traced.
        short: what does not fit, in words.
    offers: settings that would help and change the result, or the request. layout: how processes
        share it.
    """

    runtime: Runtime
    machine: Machine
    kind: Kind
    need: Need | None
    reasons: tuple[str, ...]
    short: tuple[str, ...] = ()
    offers: tuple[str, ...] = ()
    layout: Layout = ONE

    @property
    def fits(self) -> bool:
        return not self.short


def kind_of(runtime: Runtime, machine: Machine) -> Kind:
    """Where it is to work: on a described machine's GPU if it has one, here where the runtime
    says.
    """
    if machine.described:
        return "gpu" if machine.gpu and runtime.device != "cpu" else "cpu"
    return "gpu" if choose_device(runtime.device).type == "cuda" else "cpu"


def dtype_of(model: Checkpoint, runtime: Runtime, kind: Kind) -> torch.dtype:
    """Return the experts' dtype, without needing the device."""
    return choose_dtype(runtime.dtype, kind == "cpu", model.parameters("high") * 4)


def traces_of(
    model: Checkpoint,
    request: CompleteRequest,
    runtime: Runtime,
    machine: Machine,
    layout: Layout = ONE,
    per_machine: int = 1,
) -> Traces:
    """What a plan is traced with."""
    kind = kind_of(runtime, machine)
    device = torch.device("cuda" if kind == "gpu" and not machine.described else "cpu")
    return Traces(model, request, dtype_of(model, runtime, kind), device, layout, per_machine)


def solve(
    model: Checkpoint,
    request: CompleteRequest,
    runtime: Runtime,
    machine: Machine,
    trace_small: bool = False,
    processes: int = 1,
    per_machine: int | None = None,
) -> Plan:
    """A plan in which every setting is settled. Settings that are set already stay as they are,
    also where they do not fit.

    Args:
        trace_small: also trace models so small that nothing needs to be chosen (it takes seconds,
            which a run of them does not).
        processes: how many share the video, each with a GPU of its own.
        per_machine: how many of them one machine has, whose RAM they share; None: up to 8.

    Raises:
        RequestError: for a layout that is not one of so many processes, and for settings that
            cannot go together on them.
    """
    kind, per_machine = kind_of(runtime, machine), used_here(processes, per_machine)
    refuse_together(runtime, model.spec.dit.num_layers, processes)
    runtime, layout = settle_layout(model, request, runtime, processes, per_machine)
    told = layout_reasons(model, request, layout)
    if processes > 1:
        runtime = filled(runtime, vae_tile=0)  # strips
    if not small(model, dtype_of(model, runtime, kind)):
        plan = _Choice(
            traces_of(model, request, runtime, machine, layout, per_machine), machine, kind
        ).plan(runtime)
        return replace(plan, reasons=(*told, *plan.reasons))
    layers = model.spec.dit.num_layers
    runtime = filled(
        runtime,
        t5_cpu=False,
        keep_experts=True,
        prefetch=False,
        resident_blocks=layers,
        chunk_tokens=0,
        vae_tile=0,
    )
    runtime = filled(runtime, stream_from="disk" if kind == "cpu" else "ram", dit_fsdp=False)
    made = (
        need(traces_of(model, request, runtime, machine, layout, per_machine), runtime, kind)
        if trace_small
        else None
    )
    return Plan(
        runtime,
        machine,
        kind,
        made,
        (*told, "the model is small: all of it stays in memory"),
        layout=layout,
    )


def filled(runtime: Runtime, **values: object) -> Runtime:
    """With these values where nothing is set."""
    open_ones = {name: value for name, value in values.items() if getattr(runtime, name) is None}
    return replace(runtime, **open_ones)  # type: ignore[arg-type]


class _Choice:
    """The way from a runtime with open settings to one without, on one machine, for a model that is
    not small.
    """

    def __init__(self, traces: Traces, machine: Machine, kind: Kind) -> None:
        self.traces, self.machine, self.kind = traces, machine, kind
        self.layers = traces.model.spec.dit.num_layers
        self.room = round((machine.gpu_free or machine.gpu) * (1 - SPARE))
        self.ram = round(machine.ram_free * (1 - SPARE)) if machine.ram_free else 1 << 62
        self.several = traces.layout.size > 1

    def plan(self, runtime: Runtime) -> Plan:
        reasons: list[str] = []
        runtime = self._video(self._experts(self._text(runtime, reasons), reasons), reasons)
        made = need(self.traces, runtime, self.kind)
        short = []
        if made.device.device > self.room:
            each = " on each GPU" if self.several else ""
            short.append(
                f"{made.device.device / GB:.1f} GB of GPU memory{each} ({made.device.name});"
                f" {self.room / GB:.1f} GB can be used"
            )
        if made.ram.ram > self.ram:
            all_ = f" for {self.traces.here} processes" if self.traces.here > 1 else ""
            short.append(
                f"{made.ram.ram / GB:.1f} GB of RAM{all_} ({made.ram.name}); {self.ram / GB:.1f} GB"
                " can be used"
            )
        if (
            self.machine.described and made.disk > self.machine.disk_free
        ):  # on one that is here the weights may lie there already
            short.append(
                f"{made.disk / GB:.0f} GB of disk; there are {self.machine.disk_free / GB:.0f} GB"
            )
        offers = tuple(self._offers(runtime, bool(short)))
        return Plan(
            runtime,
            self.machine,
            self.kind,
            made,
            tuple(reasons),
            tuple(short),
            offers,
            self.traces.layout,
        )

    # each setting

    def _text(self, runtime: Runtime, reasons: list[str]) -> Runtime:
        if self.kind == "cpu" or runtime.t5_cpu is not None:
            return filled(runtime, t5_cpu=True)
        there = text_phase(self.traces, replace(runtime, t5_cpu=False), self.kind)
        runtime = replace(runtime, t5_cpu=there.device > self.room)
        who = ", by the first process, which tells the others" if self.several else ""
        device = "CPU" if runtime.t5_cpu else "GPU"
        reasons.append(
            f"the text encoder's blocks are read and used one after the other, on the {device}{who}"
        )
        return runtime

    def _experts(self, runtime: Runtime, reasons: list[str]) -> Runtime:
        tried: list[tuple[Runtime, str]] = []
        for way in self._ways(runtime):
            tried.append(way)
            if self._fits(way[0]):
                break
        chosen, why = tried[-1]
        reasons.append(why)
        if chosen.chunk_tokens:
            reasons.append(
                f"{chosen.chunk_tokens} tokens at a time go through all that is not attention,"
                " which takes less memory"
            )
        return self._prefetch(chosen, reasons) if chosen.prefetch is None else chosen

    def _ways(self, runtime: Runtime) -> Iterator[tuple[Runtime, str]]:
        """Ways to hold the experts, the best first and the last resort at the end; what is set
        already is kept.
        """
        on_cpu = self.kind == "cpu"
        chunks = [0, CHUNK] if self.traces.own_tokens() > CHUNK else [0]
        keeps = (
            [True, False]
            if runtime.keep_experts is None and not on_cpu
            else [bool(runtime.keep_experts)]
        )
        sources = ["disk"] if on_cpu else ["ram", "disk"]
        if (
            on_cpu
        ):  # where a larger cache of files is worth more than anything else that RAM could hold
            chunks = chunks[-1:]
        chunks = chunks if runtime.chunk_tokens is None else [runtime.chunk_tokens]
        sources = sources if runtime.stream_from is None else [runtime.stream_from]
        all_there = runtime.resident_blocks in (None, self.layers)
        # Shares come after whole experts, which need nobody to work, and before blocks that are
        # streamed: what is gathered takes no RAM.
        sharing = [False, True] if self.several and not on_cpu and all_there else [False]
        sharing = sharing if runtime.dit_fsdp is None else [runtime.dit_fsdp]
        for shared, keep, chunk in product(sharing, keeps, chunks):
            if shared or all_there:
                way = filled(
                    runtime,
                    dit_fsdp=shared,
                    keep_experts=keep,
                    resident_blocks=self.layers,
                    chunk_tokens=chunk,
                    stream_from=sources[0],
                )
                yield way, self._resident_words(way, runtime.dit_fsdp is None)
        for source in (
            sources if not runtime.dit_fsdp and runtime.resident_blocks != self.layers else ()
        ):
            way = filled(
                runtime,
                dit_fsdp=False,
                keep_experts=keeps[-1],
                chunk_tokens=chunks[-1],
                stream_from=source,
            )
            way = (
                way
                if way.resident_blocks is not None
                else replace(way, resident_blocks=self._most_resident(way))
            )
            yield way, self._streaming_words(way)

    def _resident_words(self, way: Runtime, chosen: bool) -> str:
        size = f"{on_device(self.traces, self.traces.working[0], way) / GB:.1f} GB"
        if not way.dit_fsdp:
            return (
                f"both experts stay in memory ({size} each)"
                if way.keep_experts
                else f"one expert at a time is in memory, whole ({size})"
            )
        held = f"both experts ({size} each)" if way.keep_experts else f"the expert at work ({size})"
        whole = max(self.traces.expert(which, way).total for which in set(self.traces.working)) / GB
        why = (
            f"; whole, one would take {whole:.1f} GB, and streamed, RAM for each process"
            if chosen
            else ""
        )
        return (
            f"each process keeps a share of {held}, and a block is put together while the one"
            f" before it works{why}"
        )

    def _most_resident(self, way: Runtime) -> int:
        """How many blocks fit beside what a step needs; at least none, and never all."""
        bare = replace(way, resident_blocks=0)
        block = max(
            max(self.traces.expert(which, bare).blocks) for which in set(self.traces.working)
        ) * (2 if way.keep_experts else 1)
        phases = expert_phases(self.traces, bare, self.kind)
        if self.kind == "cpu":
            room = min(self.ram, max(CPU_LEAST, round(self.ram * CPU_SHARE)))
            return max(
                0,
                min(
                    self.layers - 1,
                    (room - max(phase.ram for phase in phases)) // (block * self.traces.here),
                ),
            )
        return max(
            0,
            min(
                self.layers - 1,
                int((self.room - max(phase.device for phase in phases)) / (block * (1 + SCATTER))),
            ),
        )

    def _streaming_words(self, way: Runtime) -> str:
        streamed, source = (
            self.layers - (way.resident_blocks or 0),
            "RAM" if way.stream_from == "ram" else "their files",
        )
        size = streamed_bytes(self.traces, self.traces.working[0], way) / GB
        return (
            f"{way.resident_blocks} of an expert's {self.layers} blocks stay in memory, {streamed}"
            f" ({size:.1f} GB) come from {source}"
        )

    def _prefetch(self, runtime: Runtime, reasons: list[str]) -> Runtime:
        """Read the next expert into RAM meanwhile, where there is a next one, and RAM for it."""
        if self.kind == "cpu" or runtime.dit_fsdp or len(set(self.traces.working)) < 2:
            return replace(runtime, prefetch=False)
        ahead = replace(runtime, prefetch=True)
        fits = max(phase.ram for phase in expert_phases(self.traces, ahead, self.kind)) <= self.ram
        reasons.append(
            "the next expert is read into RAM while the first one works"
            if fits
            else "the next expert is read when it is wanted: RAM does not hold it beside the rest"
        )
        return replace(runtime, prefetch=fits)

    def _video(self, runtime: Runtime, reasons: list[str]) -> Runtime:
        if runtime.vae_tile is not None:
            return runtime
        whole = decode_phase(self.traces, replace(runtime, vae_tile=0), self.kind)
        if self._has_room(whole):
            return replace(runtime, vae_tile=0)
        ways = [replace(runtime, vae_tile=side) for side in TILES]
        way = next(
            (way for way in ways if self._has_room(decode_phase(self.traces, way, self.kind))),
            ways[-1],
        )
        reasons.append(
            f"the VAE decodes in tiles of {way.vae_tile} pixels: whole frames would take"
            f" {whole.tensors / GB:.1f} GB"
        )
        return way

    # fits

    def _fits(self, runtime: Runtime) -> bool:
        held = [on_device(self.traces, which, runtime) for which in set(self.traces.working)]
        least = sum(held) if runtime.keep_experts else max(held)  # known without tracing a step
        if least > (self.room if self.kind == "gpu" else self.ram // self.traces.here):
            return False
        phases = expert_phases(self.traces, runtime, self.kind)
        if self.several:  # strips are all there is; one process has tiles yet
            phases.append(decode_phase(self.traces, runtime, self.kind))
        return all(self._has_room(phase) for phase in phases)

    def _has_room(self, phase: Phase) -> bool:
        return phase.device <= self.room and phase.ram <= self.ram

    def _offers(self, runtime: Runtime, short: bool) -> Iterator[str]:
        if (
            self.kind == "gpu"
            and not runtime.quantize
            and ((runtime.resident_blocks or 0) < self.layers or (short and runtime.dit_fsdp))
        ):
            smaller = replace(
                runtime,
                quantize="fp8",
                quantize_layers="all",
                resident_blocks=self.layers,
                keep_experts=False,
            )
            beside = max(phase.beside for phase in expert_phases(self.traces, runtime, self.kind))
            if runtime.dit_fsdp:  # two of its blocks are whole, which would be smaller too
                first = self.traces.working[0]
                beside -= 2 * (
                    self.traces.expert(first, runtime).gathered
                    - self.traces.expert(first, smaller).gathered
                )
            size = (
                max(on_device(self.traces, which, smaller) for which in set(self.traces.working))
                + beside
            )
            if size * (1 + SCATTER) + GB < self.room:
                yield (
                    "--quantize fp8 --quantize_layers all would keep an expert in memory"
                    f" ({size / GB:.1f} GB), and changes the video"
                )
        if short and self.traces.request.size[0] * self.traces.request.size[1] > 832 * 480:
            yield "--size 832*480 needs less"
