"""Show a plan: a page for people, a JSON document for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wanflow.plan.cards import Overheads
from wanflow.plan.estimate import Estimate, by_card, by_way
from wanflow.plan.gpus import Machine
from wanflow.plan.phases import Need, Phase
from wanflow.plan.plan import Plan
from wanflow.plan.start import needs_gpu, ways_out
from wanflow.presets import ModelSpec
from wanflow.request import CompleteRequest
from wanflow.sampling.schedule import snr
from wanflow.sampling.timeline import handover, timeline
from wanflow.screen import table_lines
from wanflow.units import duration, file_size, memory_size

MINIATURE = (
    "wanflow generate --ckpt_dir nano --prompt 'a red circle moves left on a blue background'"
)
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


def expert_steps(request: CompleteRequest, spec: ModelSpec) -> dict[str, Any]:
    """Return how many steps each expert takes, and where they hand over."""
    steps = timeline(request, spec)
    counts = Counter(step.expert for step in steps)
    found: dict[str, Any] = {name: counts[name] for name in spec.expert_names}
    found["boundary"] = request.boundary
    after = handover(steps, 0)
    if after is not None:
        before = steps[after.index - 1]
        found["switch"] = {
            "after_step": after.index,
            "timesteps": [before.timestep, after.timestep],
            "snr": [snr(before.sigma), snr(after.sigma)],
            "snr_of_boundary": snr(request.boundary),
        }
    return found


@dataclass(frozen=True)
class Answer:
    """What a reader wants first: whether it runs, how long it takes, and what to type.

    Attributes:
        verdict: in words.
        time: in words.
        command: a line for a shell: what runs it, or else the miniature.
        download: a line that gets the weights, where they are not here.
        instead: what else would help, where it does not run.
    """

    verdict: str
    time: str
    command: str
    download: str = ""
    instead: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yield the lines for the head of the page."""
        yield self.verdict
        yield f"time: {self.time}"
        if self.command:
            yield f"run:  {self.command}"
        if self.download:
            yield f"      the weights, before that: {self.download}"
        yield from (f"instead: {way}" for way in self.instead)


def answer(plan: Plan, time: Estimate | None, command: str, download: str = "") -> Answer:
    """Return the answer of a traced plan.

    Args:
        plan: the plan.
        time: of the machine, if its rates are known.
        command: what runs the plan.
        download: what gets its weights.
    """
    where = plan.machine.words()
    if not plan.fits:
        short = "; ".join(plan.short)
        return Answer(
            f"it does not fit: {short}; on {where}", _time_words(plan, time), "", "", ways_out(plan)
        )
    if plan.kind == "cpu" and needs_gpu(plan.checkpoint):
        ways = ("wanflow plan --gpu rtx4090 says what a machine with that GPU would take",)
        words = "weeks or months" if time is None else _time_words(plan, time)
        words += ": use a GPU, or nano"
        return Answer(f"it would take too long here: {where}", words, MINIATURE, "", ways)
    return Answer(f"it fits: {where}", _time_words(plan, time), command, download)


def _time_words(plan: Plan, time: Estimate | None) -> str:
    if time is not None:
        where = "" if plan.kind == "gpu" else " on this CPU"
        return f"about {_time(time.seconds)}{where}"
    cards = sorted((each.seconds, name) for name, each in by_card(plan).items())
    if cards:
        return f"about {', '.join(f'{_time(each)} on {name}' for each, name in cards)}"
    return "not estimated, since the machine's speed is not known; name a card, as in --gpu rtx3060"


def page(plan: Plan, estimate: Estimate | None, peaks: bool = False) -> Iterator[str]:
    """Yield the lines of a traced plan; `peaks` adds the largest tensors of each phase."""
    needed, request, machine = _need(plan), plan.request, plan.machine
    spec, (width, height) = plan.checkpoint.spec, request.size
    frames = f"{request.frame_num} frame{'s' if request.frame_num > 1 else ''}"
    steps = f"{request.sample_steps} steps ({request.sample_solver})"
    yield f"{spec.name}: {width}*{height}, {frames}, {steps}"
    yield from _expert_lines(request, spec)
    yield ""
    yield "how it runs"
    yield from (f"  {reason}" for reason in plan.reasons)
    yield from (f"  possible: {offer}" for offer in plan.offers)
    yield ""
    yield from _memory_lines(plan, peaks)
    if plan.layout.size > 1:
        yield from _sent_lines(plan)
    yield f"disk: {file_size(needed.disk)}, of {file_size(machine.disk_free)}"
    yield ""
    yield from _work_lines(needed)
    yield from _time_lines(plan, estimate)
    if machine.gpus > plan.layout.size and plan.kind == "gpu":
        yield (
            f"this is for {plan.layout.size} of {machine.gpus} GPUs: --num_gpus plans for more,"
            " and generate --gpus uses them"
        )


def _need(plan: Plan) -> Need:
    assert plan.need is not None
    return plan.need


def _expert_lines(request: CompleteRequest, spec: ModelSpec) -> Iterator[str]:
    found = expert_steps(request, spec)
    if len(spec.expert_names) == 1:
        return  # it makes all steps
    counts = [f"{found[name]} {name}-noise" for name in spec.expert_names]
    yield f"experts: {', '.join(counts)} steps (boundary {request.boundary:g})"
    if "switch" in found:
        switch = found["switch"]
        (t0, t1), (a, b) = switch["timesteps"], switch["snr"]
        yield (
            f"  they change after step {switch['after_step']}: timestep {t0:g} (SNR 1/{1 / a:.0f})"
            f" to {t1:g} (SNR 1/{1 / b:.0f}); the boundary is SNR"
            f" 1/{1 / switch['snr_of_boundary']:.0f}"
        )


def _memory_lines(plan: Plan, peaks: bool) -> Iterator[str]:
    needed, several = _need(plan), plan.layout.size > 1
    title = f"memory{' of each process' if several else ''}, GiB"
    rows = [
        (p.name, *map(_gib, (p.weights, p.activations, p.device, p.ram))) for p in needed.phases
    ]
    rows.append(("at most", "", "", _gib(needed.device.device), _gib(needed.ram.ram)))
    yield from table_lines((title, "weights", "activations", "GPU", "RAM"), rows, "lrrrr")
    machine = plan.machine
    ram_free = f"{memory_size(machine.ram_free)} of RAM free"
    if plan.kind == "gpu":
        each = " on each" if several else ""
        ours = ", and our CUDA context" if machine.holds_context else ""
        free = memory_size(machine.gpu_free or machine.gpu)
        yield f"  here: {free} of GPU memory{each}{ours}, {ram_free}"
        yield f"  {_besides_words(needed.phases, machine.overheads)}"
        yield from pinned_lines(machine, needed.phases)
    else:
        yield f"  here: {ram_free}; files that are read are cache, which can be dropped"
    if several:
        yield f"  RAM: of all {needed.ram.here} processes of a machine"
    if peaks:
        for phase in needed.phases:
            yield f"  largest at the peak of {phase.name}"
            yield from (f"    {storage}" for storage in phase.top[:6])


def pinned_lines(machine: Machine, phases: Sequence[Phase]) -> Iterator[str]:
    """Say what waits in RAM and cannot be pinned."""
    waiting = max(phase.shared for phase in phases)
    if 0 < machine.pinned < waiting:
        yield (
            f"  pinned: {memory_size(machine.pinned)} at most, and {memory_size(waiting)} wait in"
            " RAM; the rest is copied from pageable memory, which takes longer"
        )


def _besides_words(phases: Sequence[Phase], over: Overheads) -> str:
    """Say what GPU memory holds besides tensors, and who says so."""
    parts = [
        f"{memory_size(over.context)} of CUDA's context",
        f"{over.gaps:.0%} of gaps",
        f"{memory_size(over.workspace)} for cuDNN in the VAE",
    ]
    nccl = max(phase.nccl for phase in phases)
    parts += [f"{memory_size(nccl)} for NCCL"] if nccl else []
    return f"besides tensors: {', '.join(parts)} ({over.source})"


def _sent_lines(plan: Plan) -> Iterator[str]:
    yield f"on {plan.layout.size} processes ({plan.layout}), each sends"
    for phase in _need(plan).phases:
        if not phase.sent and not phase.gathered:
            continue
        total, unit = sum(phase.sent.values()), "a step" if phase.expert else "in all"
        parts = [f"{file_size(count)} {SENT.get(what, what)}" for what, count in phase.sent.items()]
        gathered = f"; and gathers {file_size(phase.gathered)} of weights" if phase.gathered else ""
        yield f"  {phase.name}: {file_size(total)} {unit} ({', '.join(parts)}){gathered}"


def _work_lines(needed: Need) -> Iterator[str]:
    total = sum(phase.work.total() * phase.steps for phase in needed.phases)
    yield f"work: {_flops(total)} in all"
    for phase in needed.phases:
        kinds = Counter[str]()
        for (kind, _), flops in phase.work.flops.items():
            kinds[kind] += flops
        parts = [f"{kind} {_flops(flops)}" for kind, flops in kinds.most_common() if flops]
        parts = [", ".join(parts), f"{file_size(phase.work.traffic)} moved by the rest"]
        yield f"  {phase.name}: {_times(phase.steps)}({'; '.join(parts)})"


def _time_lines(plan: Plan, estimate: Estimate | None) -> Iterator[str]:
    if estimate is None:
        return
    yield f"time: about {_time(estimate.seconds)} (rates: {estimate.source})"
    for name, found in by_way(plan).items():
        once = f", {_time(found.compiling)} of it to compile" if found.compiling else ""
        yield f"  {name}: about {_time(found.seconds)}{once}"
    for stage in estimate.stages:
        step = f"{_times(stage.steps)}{_time(stage.step)}"
        send = f", {_time(stage.sending)} of it sending" if stage.sending >= 0.05 else ""
        wait = f", bound by {stage.bound}" if stage.bound != "computing" else ""
        load = f" + {_time(stage.loading)} to read its weights" if stage.loading >= 0.1 else ""
        yield f"  {stage.name}: {step}{send}{wait}{load}"


def _times(steps: int) -> str:
    return f"{steps} x " if steps > 1 else ""


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}" if count else "-"


def _flops(count: float) -> str:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.1f} MFLOP"


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 120 else f"{seconds:.1f} s"


def document(plan: Plan, estimate: Estimate | None, first: Answer) -> dict[str, Any]:
    """Return the answer and everything on the page, for programs: bytes, seconds, FLOPs."""
    needed, checkpoint, spec = _need(plan), plan.checkpoint, plan.checkpoint.spec
    parts = (*spec.expert_names, "t5", "vae")
    return {
        **asdict(first),
        "model": {
            "name": spec.name,
            "parameters": {part: checkpoint.parameters(part) for part in parts},
            "file_bytes": {part: checkpoint.file_bytes(part) for part in parts},
        },
        "request": asdict(plan.request),
        "machine": asdict(plan.machine),
        "fits": plan.fits,
        "short": list(plan.short),
        "runtime": asdict(plan.runtime),
        "layout": asdict(plan.layout) | {"processes": plan.layout.size},
        "reasons": list(plan.reasons),
        "offers": list(plan.offers),
        "experts": expert_steps(plan.request, spec),
        "gpu_bytes": needed.device.device,
        "ram_bytes": needed.ram.ram,
        "disk_bytes": needed.disk,
        "phases": [_phase(phase) for phase in needed.phases],
        "seconds_by_way": {name: each.seconds for name, each in by_way(plan).items()},
        "seconds_by_card": {name: each.seconds for name, each in by_card(plan).items()},
        "estimate": None if estimate is None else {"seconds": estimate.seconds, **asdict(estimate)},
    }


def _phase(phase: Phase) -> dict[str, Any]:
    flops = {
        f"{kind}{'_float32' if in_float32 else ''}": count
        for (kind, in_float32), count in phase.work.flops.items()
    }
    numbers = ("name", "steps", "weights", "activations", "copied", "read", "read_in_step", "alone")
    return {
        **{name: getattr(phase, name) for name in (*numbers, "messages", "gathered", "ram")},
        "workspace": phase.workspace,
        "nccl": phase.nccl,
        "gpu": phase.device,
        "processes_here": phase.here,
        "sent": dict(phase.sent),
        "flops": flops,
        "traffic": phase.work.traffic,
        "kernels": phase.work.kernels,
        "largest": [str(storage).strip() for storage in phase.top[:6]],
    }
