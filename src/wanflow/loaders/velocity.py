"""Build the velocity that a solver integrates: expert, LoRAs and guidance of each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from wanflow.choices import batch_guidance
from wanflow.conditioning import TextToVideo, conditioning_of
from wanflow.geometry import geometry_of
from wanflow.models.dit import TextStates, Trunk, WanDiT, rope_table, run_blocks, time_features
from wanflow.presets import Expert, ModelSpec
from wanflow.request import CompleteRequest
from wanflow.sampling.guidance import ONE_BATCH, TWO_PASSES, Guidance, States, guide
from wanflow.sampling.schedule import Step
from wanflow.sampling.solvers import Velocity
from wanflow.sampling.timeline import handover, timeline

if TYPE_CHECKING:
    from wanflow.transforms.block_streaming import Streaming


class Experts(Protocol):
    """Where the models come from; `LoadedParts` decides what stays in memory."""

    spec: ModelSpec

    def text(self, prompts: list[str]) -> Tensor:
        """Return text states [B, text_len, D], zero past each prompt's end."""

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT | Streaming:
        """Return an expert with each LoRA of the run at its strength."""

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None:
        """Take note that this expert comes next."""


def make_velocity(
    parts: Experts,
    request: CompleteRequest,
    start: int = 0,
    cfg_batch: bool | None = None,
    trunk: Trunk = run_blocks,
    guidance: Guidance | None = None,
    *,
    conditioning: TextToVideo | None = None,
) -> Velocity:
    """Return the velocity of a request from step `start` on; encodes the prompts.

    Args:
        parts: the experts and the text encoder.
        request: what is denoised.
        start: the first step that will be asked for.
        cfg_batch: whether both branches of guidance form one batch; None: where there are few
            tokens.
        trunk: runs an expert's blocks.
        guidance: how both branches are computed, in place of one batch or two passes.
        conditioning: what the model sees of a sample; None: of a text.
    """
    spec, steps = parts.spec, timeline(request, parts.spec)
    prompts = [request.prompt, request.negative_prompt]
    texts = parts.text(prompts if any(step.guided for step in steps[start:]) else prompts[:1])
    if guidance is None:
        tokens = geometry_of(spec).tokens(request.size, request.frame_num)
        guidance = ONE_BATCH if batch_guidance(cfg_batch, tokens) else TWO_PASSES
    both: Guidance = guidance
    seen = conditioning or conditioning_of(spec, request)
    shape, device = spec.dit, texts.device
    # Here and not in a step: a copy to the device waits for all that it computes.
    grid = shape.grid(seen.shape[1:])
    rope = rope_table(grid, shape.dim // shape.num_heads, device)
    runs = seen.runs(grid)
    each = (seen.times(step).unsqueeze(0) for step in steps)
    times = torch.stack([time_features(time, shape.freq_dim) for time in each]).to(device)
    # Keys and values of the text, for one expert with its LoRAs at a time.
    states: dict[tuple[Expert, tuple[float, ...], bool], TextStates] = {}

    def velocity(x: Tensor, step: Step) -> Tensor:
        now = steps[step.index]
        key = (now.expert, now.strengths, now.guided)
        if key not in states:
            states.clear()  # before the next expert is loaded
        model = parts.expert(now.expert, now.strengths)
        upcoming = handover(steps, now.index)
        if upcoming is not None:
            parts.prepare(upcoming.expert, upcoming.strengths)
        if key not in states:
            states[key] = model.text_states(both.select(texts) if now.guided else texts[:1])

        def predict(latent: Tensor, time: Tensor, text: States) -> Tensor:
            return cast(Tensor, model(latent, time, cast(Any, text), trunk, rope, runs))

        latent, time = seen.latent(x), times[step.index]
        if not now.guided:
            return predict(latent, time, states[key])
        return guide(*both.branches(predict, latent, time, states[key]), now.guidance)

    return velocity
