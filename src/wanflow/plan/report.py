"""A plan on a page, and as one JSON document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.plan.estimate import CLAIMED_GB, CLAIMS, WAYS, Estimate, Figure
from wanflow.plan.solve import Plan
from wanflow.presets import ModelSpec
from wanflow.request import CompleteRequest
from wanflow.sampling.schedule import snr
from wanflow.sampling.timeline import handover, timeline

GB = 10**9
SENT = {
    "qkv": "queries, keys and values",
    "out": "attention's results",
    "ring": "keys and values",
    "patches": "patches",
    "velocity": "velocity",
    "halo": "borders of strips",
    "kv": "keys and values",
    "frames": "frames",
}


def split_of(request: CompleteRequest, spec: ModelSpec) -> dict[str, Any]:
    """Return how many steps each expert denoises, and where they change."""
    steps = timeline(request, spec)
    counts = Counter(step.expert for step in steps)
    split: dict[str, Any] = {name: counts[name] for name in spec.expert_names}
    split["boundary"] = request.boundary
    after = handover(steps, 0)
    if after is not None:
        before = steps[after.index - 1]
        split["switch"] = {
            "after_step": after.index,
            "timesteps": [before.timestep, after.timestep],
            "snr": [snr(before.sigma), snr(after.sigma)],
            "snr_of_boundary": snr(request.boundary),
        }
    return split


def page(
    model: Checkpoint,
    request: CompleteRequest,
    plan: Plan,
    estimate: Estimate | None,
    full: bool = False,
) -> Iterator[str]:
    """Lines for a person. full: also what is largest at each peak."""
    assert plan.need is not None
    width, height = request.size
    frames = f"{request.frame_num} frame{'s' if request.frame_num > 1 else ''}"
    yield (
        f"{model.spec.name}: {width}*{height}, {frames}, {request.sample_steps} steps"
        f" ({request.sample_solver})"
    )
    yield f"on {plan.machine.words()}"
    yield ""
    yield from _split_lines(request, model.spec)
    yield ""
    yield "how it runs"
    yield from (f"  {reason}" for reason in plan.reasons)
    yield from (f"  possible: {offer}" for offer in plan.offers)
    yield ""
    yield from _memory_lines(plan, full)
    if plan.layout.size > 1:
        yield from _layout_lines(plan)
    yield f"disk: {plan.need.disk / GB:.0f} GB, of {plan.machine.disk_free / GB:.0f}"
    yield ""
    yield from _work_lines(plan)
    yield from _time_lines(plan, estimate)
    if plan.machine.gpus > plan.layout.size and plan.kind == "gpu":
        yield (
            f"this is for {plan.layout.size} of {plan.machine.gpus} GPUs: --num_gpus plans for"
            " more, and generate --gpus uses them"
        )
    if not plan.fits:
        yield ""
        yield f"it does not fit: {'; '.join(plan.short)}"


def _split_lines(request: CompleteRequest, spec: ModelSpec) -> Iterator[str]:
    split = split_of(request, spec)
    counts = ", ".join(f"{split[name]} {name}-noise" for name in spec.expert_names)
    yield f"steps by expert: {counts} (boundary {request.boundary:g})"
    switch = split.get("switch")
    if switch:
        (t0, t1), (a, b) = switch["timesteps"], switch["snr"]
        yield (
            f"  they change after step {switch['after_step']}: timestep {t0:g} (SNR 1/{1 / a:.0f})"
            f" to {t1:g} (SNR 1/{1 / b:.0f}); the boundary is SNR"
            f" 1/{1 / switch['snr_of_boundary']:.0f}"
        )


def _memory_lines(plan: Plan, full: bool) -> Iterator[str]:
    need = plan.need
    assert need is not None
    several = plan.layout.size > 1
    rows: list[tuple[str, ...]] = [
        (
            f"memory{' of each process' if several else ''}, GB",
            "weights",
            "beside",
            "GPU in all",
            "RAM",
        )
    ]
    rows += [
        (
            phase.name,
            *(
                f"{value / GB:.1f}" if value else "-"
                for value in (phase.weights, phase.beside, phase.device, phase.ram)
            ),
        )
        for phase in need.phases
    ]
    rows.append(
        (
            "at most",
            "",
            "",
            f"{need.device.device / GB:.1f}" if need.device.device else "-",
            f"{need.ram.ram / GB:.1f}",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        yield "  ".join(
            [
                f"{row[0]:<{widths[0]}}",
                *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
    if plan.kind == "gpu":
        each = " on each" if several else ""
        yield (
            f"  here: {plan.machine.gpu_free / GB:.1f} GB of GPU memory{each},"
            f" {plan.machine.ram_free / GB:.1f} GB of RAM free"
        )
    else:
        yield (
            f"  here: {plan.machine.ram_free / GB:.1f} GB of RAM free; files that are read count"
            " only as cache, which can be dropped"
        )
    if several:
        yield f"  RAM: of all {need.ram.here} processes of a machine"
    if full:
        for phase in need.phases:
            yield f"  largest at the peak of {phase.name}"
            yield from (f"    {held}" for held in phase.top[:6])


def _work_lines(plan: Plan) -> Iterator[str]:
    assert plan.need is not None
    total = sum(phase.work.total() * phase.steps for phase in plan.need.phases)
    yield f"work: {_flops(total)} in all"
    for phase in plan.need.phases:
        kinds: dict[str, int] = {}
        for (kind, _), flops in phase.work.flops.items():
            kinds[kind] = kinds.get(kind, 0) + flops
        words = ", ".join(
            f"{kind} {_flops(flops)}"
            for kind, flops in sorted(kinds.items(), key=lambda item: -item[1])
            if flops
        )
        each = f"{phase.steps} x " if phase.steps > 1 else ""
        yield f"  {phase.name}: {each}({words}; {_bytes(phase.work.traffic)} moved by the rest)"


def _flops(count: float) -> str:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.1f} MFLOP"


def _bytes(count: float) -> str:
    if count < 1e8:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e12:.1f} TB" if count >= 1e12 else f"{count / 1e9:.1f} GB"


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def _time_lines(plan: Plan, estimate: Estimate | None) -> Iterator[str]:
    if estimate is None:
        yield "time: not estimated, since the machine's speed is not known"
        return
    yield f"time: about {_time(estimate.seconds)} (rates: {estimate.source})"
    for stage in estimate.stages:
        each = (
            f"{stage.steps} steps of {_time(stage.step)}" if stage.steps > 1 else _time(stage.step)
        )
        wait = f", which wait for {stage.bound}" if stage.bound != "computing" else ""
        send = f", {_time(stage.sending)} of it sending" if stage.sending >= 0.05 else ""
        load = f" + {_time(stage.loading)} to read its weights" if stage.loading >= 0.1 else ""
        yield f"  {stage.name}: {each}{send}{wait}{load}"


def _layout_lines(plan: Plan) -> Iterator[str]:
    """What a process sends in a step of each kind."""
    assert plan.need is not None
    yield f"on {plan.layout.size} processes ({plan.layout}), each sends"
    for phase in plan.need.phases:
        if not phase.sent and not phase.gathered:
            continue
        named = ", ".join(
            f"{_bytes(count)} {SENT.get(what, what)}" for what, count in phase.sent.items()
        )
        gathered = f"; and gets {_bytes(phase.gathered)} of weights" if phase.gathered else ""
        once = "in all" if phase.name == "VAE" else "a step"
        yield f"  {phase.name}: {_bytes(sum(phase.sent.values()))} {once} ({named}){gathered}"


def document(
    model: Checkpoint, request: CompleteRequest, plan: Plan, estimate: Estimate | None
) -> dict[str, Any]:
    """Everything the page says, for programs; bytes, seconds, FLOPs."""
    assert plan.need is not None
    machine = {key: value for key, value in asdict(plan.machine).items() if key != "rates"}
    return {
        "model": {
            "name": model.spec.name,
            "parameters": {part: model.parameters(part) for part in model.sources},
            "file_bytes": {part: model.file_bytes(part) for part in model.sources},
        },
        "request": asdict(request),
        "machine": machine | {"rates": asdict(plan.machine.rates) if plan.machine.rates else None},
        "fits": plan.fits,
        "short": list(plan.short),
        "runtime": asdict(plan.runtime),
        "layout": asdict(plan.layout) | {"processes": plan.layout.size},
        "reasons": list(plan.reasons),
        "offers": list(plan.offers),
        "experts": split_of(request, model.spec),
        "gpu_bytes": plan.need.device.device,
        "ram_bytes": plan.need.ram.ram,
        "disk_bytes": plan.need.disk,
        "phases": [
            {
                "name": phase.name,
                "steps": phase.steps,
                "weights": phase.weights,
                "beside": phase.beside,
                "gpu": phase.device,
                "ram": phase.ram,
                "copied": phase.copied,
                "read": phase.read,
                "read_in_step": phase.read_in_step,
                "flops": {
                    f"{kind}{'_float32' if f32 else ''}": count
                    for (kind, f32), count in phase.work.flops.items()
                },
                "processes_here": phase.here,
                "alone": phase.alone,
                "sent": dict(phase.sent),
                "messages": phase.messages,
                "gathered": phase.gathered,
                "traffic": phase.work.traffic,
                "kernels": phase.work.kernels,
                "largest": [str(held).strip() for held in phase.top[:6]],
            }
            for phase in plan.need.phases
        ],
        "estimate": None if estimate is None else {"seconds": estimate.seconds, **asdict(estimate)},
    }


def figures_page(
    tables: dict[str, list[Figure]], gigabytes: dict[str, tuple[float, float]]
) -> Iterator[str]:
    """The document's figures, and what reaches them. gigabytes: by size, with both experts on the
    GPU and with one.
    """
    yield (
        "what the user's document promises on A100 80 GB: 1280*720, 5 seconds, in 8-12 minutes on"
        " one GPU within 70-75 GB, 3-6 on 2 to 8"
    )
    for size, rows in tables.items():
        yield ""
        head = [f"{size}, 81 frames, minutes", *(f"{row.gpus} x A100" for row in rows)]
        body = [[way.name, *(f"{row.minutes[way.name]:.1f}" for row in rows)] for way in WAYS]
        body.append(
            ["the first at 100 % of the data sheet", *(f"{row.at_peak:.1f}" for row in rows)]
        )
        if size == "1280*720":
            body.append(
                ["the document", *(f"{CLAIMS[row.gpus][0]}-{CLAIMS[row.gpus][1]}" for row in rows)]
            )
        widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
        for line in (head, *body):
            yield "  ".join(
                [
                    f"{line[0]:<{widths[0]}}",
                    *(f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True)),
                ]
            )
        both, one = gigabytes[size]
        yield f"GPU memory: {both:.1f} GB with both experts there, {one:.1f} GB with one at a time"
    yield ""
    for row in tables["1280*720"]:
        yield _verdict(row)
    low, high = CLAIMED_GB
    yield (
        f"{low}-{high} GB: {gigabytes['1280*720'][0]:.1f} GB hold both experts; it runs from 12 GB,"
        " with its blocks streamed"
    )
    yield ""
    yield (
        "Estimated, for a run whose weights are loaded: work by rates, on several GPUs with what"
        " goes over NVLink, and no other loss."
    )
    yield "The lightning LoRAs are distilled: their videos are not the model's own, and move less."


def _verdict(row: Figure) -> str:
    exact, other = row.reached_by(True), row.reached_by(False)
    claim = f"{row.claim[0]}-{row.claim[1]} minutes on {row.gpus} x A100"
    if exact:
        return f"{claim}: reachable with {exact[0]}: {row.minutes[exact[0]]:.1f}"
    impossible = row.at_peak > row.claim[1]
    why = (
        f"impossible in 40 steps ({row.at_peak:.1f} at 100 % of the data sheet)"
        if impossible
        else "not in 40 steps"
    )
    return (
        f"{claim}: {why}; reachable with {other[0]}: {row.minutes[other[0]]:.1f}"
        if other
        else f"{claim}: {why}, and not reachable"
    )
