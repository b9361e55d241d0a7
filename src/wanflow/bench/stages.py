"""Measure the stages of a run: seconds, work and memory, each beside what the plan expects."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from wanflow.conditioning import TextToVideo
from wanflow.front import Pipeline
from wanflow.pipeline import Progress, Run
from wanflow.plan.estimate import Estimate
from wanflow.plan.phases import Need, Phase
from wanflow.presets import title
from wanflow.request import Request
from wanflow.sampling.timeline import timeline
from wanflow.transforms.attention import installed, synchronize

Show = Callable[[str, int, int, str], object]  # what, done, total, the word before the numbers
SAMPLE = 0.002  # seconds between two looks at this process' memory
STATUS = Path("/proc/self/status")
ENCODER = "VAE encoder"  # the plan's phase of the pictures


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        seconds: the median of its repetitions.
        planned: seconds that the plan expects; None where it does not say.
        flops: of one repetition.
        peak: bytes of the device's memory, or of RAM on a CPU; None where unknown.
        planned_peak: bytes of tensors that the plan expects.
        reserved: bytes that PyTorch keeps on a GPU.
        times: seconds of each repetition.
    """

    name: str
    seconds: float
    planned: float | None = None
    flops: int = 0
    peak: int | None = None
    planned_peak: int | None = None
    reserved: int | None = None
    times: tuple[float, ...] = ()

    @property
    def rate(self) -> float | None:
        """FLOP/s."""
        return self.flops / self.seconds if self.flops and self.seconds > 0 else None

    @property
    def share(self) -> float | None:
        """The share of the plan's rate that it reached."""
        return self.planned / self.seconds if self.planned and self.seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**vars(self), "flops_per_second": self.rate, "share_of_plan": self.share}


@dataclass
class Watched:
    """The most memory that a block took, known at its end."""

    peak: int | None = None
    reserved: int | None = None


@contextmanager
def watching(device: torch.device) -> Iterator[Watched]:
    """Yield the peak memory of the block: of a GPU's tensors, or this process' own RAM."""
    watched = Watched()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield watched
        watched.peak = torch.cuda.max_memory_allocated(device)
        watched.reserved = torch.cuda.max_memory_reserved(device)
        return
    if not STATUS.exists():
        yield watched
        return
    stop, seen = threading.Event(), [anonymous()]

    def look() -> None:
        while not stop.wait(SAMPLE):
            seen[0] = max(seen[0], anonymous())

    thread = threading.Thread(target=look, name="wanflow-memory")
    thread.start()
    try:
        yield watched
    finally:
        stop.set()
        thread.join()
        watched.peak = max(seen[0], anonymous())


def anonymous() -> int:
    """Return the bytes of RAM that are this process' own, without mapped files (Linux)."""
    lines = STATUS.read_text().splitlines()
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    return next(found, 0)


@dataclass
class Loads:
    """Seconds of reading each part, by when its first and its last bytes were reported."""

    show: Show
    began: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, what: str, done: int, total: int) -> None:
        self.seconds[what] = time.perf_counter() - self.began
        self.show(f"reading {what}", done, total, "bytes")


@dataclass
class Times:
    """The seconds of each repetition of a stage, and its peak memory."""

    loads: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    steps: dict[tuple[str, bool], list[float]] = field(default_factory=lambda: defaultdict(list))
    firsts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    others: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[str, Watched] = field(default_factory=dict)


def run_stages(
    pipe: Pipeline, request: Request, repeat: int, loads: Loads, show: Show, save: bool = True
) -> Times:
    """Run a request `repeat` times, and time each stage.

    Args:
        pipe: the model.
        request: what is made.
        repeat: how often.
        loads: what the pipeline reports its reading to.
        show: called with how far a stage is.
        save: whether the video is written too, where `av` is installed.
    """
    times = Times()
    _time_pictures(pipe, times, loads)
    for number in range(repeat):
        run = pipe.begin(request)
        prompts = [run.request.prompt, run.request.negative_prompt]
        if number == 0:
            with watching(pipe.engine.device) as times.memory["text encoder"]:
                began = loads.began = time.perf_counter()
                pipe.parts.remember(prompts)
                synchronize(pipe.engine.device)
                times.others["text encoder"].append(time.perf_counter() - began)
        run = _steps(pipe, run, times, loads, show)
        frames = _decode(pipe, run, times, loads, show)
        if save and installed("av"):
            times.others["mp4"].append(_encode(frames, run))
    return times


def _time_pictures(pipe: Pipeline, times: Times, loads: Loads) -> None:
    """Let a pipeline time how its pictures are encoded, before the first step."""
    engine = pipe.engine

    def condition(run: Run) -> TextToVideo:
        with watching(engine.device) as watched:
            began = loads.began = time.perf_counter()
            found = engine.condition(run)
            synchronize(engine.device)
        loads.began = time.perf_counter()
        if run.pictures:
            loaded = loads.seconds.pop("VAE", 0.0)
            times.loads[ENCODER].append(loaded)
            times.others[ENCODER].append(loads.began - began - loaded)
            times.memory[ENCODER] = watched
        return found

    pipe.engine = replace(engine, condition=condition)


def _steps(pipe: Pipeline, run: Run, times: Times, loads: Loads, show: Show) -> Run:
    """Denoise; of an expert's first step, the reading and what else it takes are apart."""
    device, total = pipe.engine.device, run.request.sample_steps
    steps = timeline(run.request, pipe.spec)
    ends, read = list[float](), list[float]()

    def on_step(progress: Progress) -> None:
        synchronize(device)
        expert = steps[progress.step - 1].expert
        if device.type == "cuda":
            peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
            times.memory[expert] = Watched(*peaks)
        read.append(loads.seconds.pop(title(expert), 0.0))
        show("denoising", progress.step, total, "step")
        loads.began = time.perf_counter()
        ends.append(loads.began)

    loads.seconds.clear()
    with watching(device) as watched:
        began = loads.began = time.perf_counter()
        run = pipe.resume(run, on_step)
    if run.pictures:
        began += times.loads[ENCODER][-1] + times.others[ENCODER][-1]
    for step, start, end, reading in zip(steps, [began, *ends[:-1]], ends, read, strict=True):
        times.memory.setdefault(step.expert, watched)
        took = end - start - reading
        first = all(other.expert != step.expert for other in steps[: step.index])
        only = sum(other.expert == step.expert for other in steps) == 1
        if first:
            times.loads[step.expert].append(reading)
            times.firsts[step.expert].append(took)
        if not first or only:
            times.steps[step.expert, step.guided].append(took)
    return run


def _decode(pipe: Pipeline, run: Run, times: Times, loads: Loads, show: Show) -> list[Any]:
    device = pipe.engine.device

    def on_part(done: int, total: int) -> None:
        show("decoding", done, total, "part")

    loads.seconds.clear()
    with watching(device) as times.memory["VAE"]:
        began = loads.began = time.perf_counter()
        frames = list(pipe.frames(run, on_part))
        synchronize(device)
        took = time.perf_counter() - began
    loaded = loads.seconds.get("VAE", 0.0)
    if loaded or not times.loads["VAE"]:
        times.loads["VAE"].append(loaded)
    times.others["VAE"].append(took - loaded)
    return frames


def _encode(frames: list[Any], run: Run) -> float:
    """Return the seconds of writing a video."""
    from wanflow.media import VideoWriter

    width, height = run.request.size
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        with VideoWriter(Path(folder) / "a.mp4", width, height, run.request.fps, {}) as writer:
            for chunk in frames:
                writer.write(chunk)
        return time.perf_counter() - began


# beside the plan


def stages_of(times: Times, need: Need, estimate: Estimate) -> list[Stage]:
    """Return the stages of a run, each beside the plan's phase."""
    planned = {one.name: one for one in estimate.stages}
    stages, seen = [], set[str]()
    for phase in need.phases:
        about, expert = planned[phase.name], phase.expert
        if expert is None:
            key = phase.name if phase.name in (ENCODER, "VAE") else "text encoder"
            if key != "text encoder":
                stages.append(_stage(f"{key}: reading", times.loads[key], about.loading))
            found = _stage(phase.name, times.others[key], about.step, phase, times.memory.get(key))
            if key == "text encoder":  # it reads each block and runs it
                found = replace(found, planned=about.seconds)
            stages.append(found)
            continue
        guided = "without guidance" not in phase.name
        if expert not in seen:
            what = "reading" if not seen else "switch, reading"
            seen.add(expert)
            stages.append(_stage(f"{phase.name}: {what}", times.loads[expert], about.loading))
        steps = times.steps.get((expert, guided), [])
        if not steps:
            continue
        one = _stage(f"{phase.name}: a step", steps, about.step, phase, times.memory.get(expert))
        beyond = [max(0.0, first - one.seconds) for first in times.firsts[expert]]
        stages.append(one)
        if guided or sum(one.expert is not None for one in need.phases) == 1:
            stages.append(_stage(f"{phase.name}: first step beyond", beyond[:1], None))
    if times.others["mp4"]:
        stages.append(_stage("mp4", times.others["mp4"], None))
    return [stage for stage in stages if stage.times]


def _stage(
    name: str,
    seconds: list[float],
    planned: float | None,
    phase: Phase | None = None,
    watched: Watched | None = None,
) -> Stage:
    median = statistics.median(seconds) if seconds else 0.0
    stage = Stage(name, median, planned, times=tuple(seconds))
    if phase is None:
        return stage
    peak, reserved = (watched.peak, watched.reserved) if watched else (None, None)
    expected = phase.tensors if phase.kind == "gpu" else phase.ram
    return replace(
        stage, flops=phase.work.total(), peak=peak, reserved=reserved, planned_peak=expected
    )


def fragmentation_of(stages: list[Stage]) -> float | None:
    """Return what PyTorch keeps beyond its tensors, as a share of them, where it is most."""
    shares = [one.reserved / one.peak - 1 for one in stages if one.peak and one.reserved]
    return max(0.0, *shares) if shares else None
