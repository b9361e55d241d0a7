"""Plan a run, measure it, and put both side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from wanflow.assemble import assemble
from wanflow.bench.machine import about_device
from wanflow.bench.stages import Loads, Show, Stage, fragmentation_of, run_stages, stages_of
from wanflow.bench.weights import without_tokenizer
from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.geometry import geometry_of, parse_size
from wanflow.plan.calibration import from_json
from wanflow.plan.estimate import estimate
from wanflow.plan.measure import rated
from wanflow.plan.solve import solve
from wanflow.plan.start import completed, placed, raise_if_unfit, refuse_without_gpu
from wanflow.presets import ModelSpec
from wanflow.request import Request
from wanflow.runtime import Runtime, dtype_name


@dataclass(frozen=True)
class Measured:
    """What a run took, stage by stage.

    Attributes:
        about: the device, its memory, its dtype and the versions.
        kernel: of attention.
        compiled: whether the blocks ran compiled.
        source: of the rates that the plan expects.
    """

    model: str
    stages: tuple[Stage, ...]
    about: dict[str, Any]
    request: dict[str, Any]
    kernel: str
    compiled: bool
    source: str
    settings: dict[str, Any]

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        width, height = self.request["size"]
        video = f"{width}*{height}, {self.request['frame_num']} frames"
        how = f"{self.about['dtype']}, attention {self.kernel}"
        how += ", compiled" if self.compiled else ""
        return f"{self.model}, {video} on {self.about['device']} ({how}); plan: {self.source}"

    def document(self) -> dict[str, Any]:
        """Return it for programs."""
        shares = fragmentation_of(list(self.stages))
        value = {"format": 1, **self.about}
        value |= {} if shares is None else {"fragmentation": round(shares, 4)}
        return {
            "title": self.title,
            "model": self.model,
            **self.about,
            "request": self.request,
            "settings": self.settings,
            "attention": self.kernel,
            "compiled": self.compiled,
            "rates": self.source,
            "stages": [stage.as_dict() for stage in self.stages],
            "calibration": from_json(value, "what was measured").to_json(),
        }


def measure(
    checkpoint: Checkpoint,
    request: Request,
    runtime: Runtime,
    repeat: int,
    show: Show,
    stage: Callable[[str], object] = str,
    force: bool = False,
) -> Measured:
    """Plan a request for this machine, run it, and return both.

    Args:
        checkpoint: the model, with or without files.
        request: what is made; its size and length may be open.
        runtime: settings; what is open is planned.
        repeat: how often the run is made.
        show: called with how far a stage is.
        stage: called with what is done next.
        force: run although the machine is too small.

    Raises:
        RequestError: where it does not fit.
    """
    runtime = replace(runtime, text_cache=None)  # a cached text would be no measurement
    request = _with_picture(request, checkpoint.spec)
    runtime, machine = placed(runtime, checkpoint.folder)
    if not force and (machine.gpu == 0 or runtime.device == "cpu"):
        refuse_without_gpu(checkpoint, machine)  # before a trace, which takes seconds
    complete = completed(request, checkpoint.spec)
    plan = solve(checkpoint, complete, runtime, machine, report=stage)
    if not force:
        raise_if_unfit(plan)
    stage("measuring this machine")
    plan = rated(plan)
    loads = Loads(show)
    pipe = assemble(checkpoint, plan.runtime, loads)
    if not checkpoint.paths:
        without_tokenizer(pipe.parts)
    try:
        pictures = {"image": request.image, "last_image": request.last_image}
        asked = Request(**{**vars(complete), **pictures}, exact_size=True)
        times = run_stages(pipe, asked, repeat, loads, show)
        parts = pipe.parts
        compiled = parts._compiler is not None and parts.compiler.graphs > 0
        kernel, dtype = parts.kernel.name, parts.placement.dtype
    finally:
        pipe.parts.close()
    assert plan.need is not None
    expected = estimate(plan)
    about = about_device(torch.device(plan.runtime.device), dtype_name(dtype))
    made = {"size": list(complete.size), "frame_num": complete.frame_num}
    made["sample_steps"] = complete.sample_steps
    stages = tuple(stages_of(times, plan.need, expected))
    chosen = {name: value for name, value in asdict(plan.runtime).items() if value is not None}
    how = {name: value for name, value in chosen.items() if not name.endswith("_cache")}
    name = checkpoint.spec.name
    return Measured(name, stages, about, made, kernel, compiled, expected.source, how)


def _with_picture(request: Request, spec: ModelSpec) -> Request:
    """Return a request with a grey picture, for a model that makes nothing without one."""
    if spec.conditioning != "channels" or request.image or request.last_image:
        return request
    import numpy as np

    from wanflow.pictures import open_picture

    width, height = parse_size(request.size or spec.size, geometry_of(spec))
    grey = np.full((height, width, 3), 128, dtype=np.uint8)
    return replace(request, image=open_picture(grey), exact_size=True)
