"""Reference models in place of loaded parts, behind the loop that users run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from wanflow.conditioning import TextToVideo, clip_parts, conditioning_of
from wanflow.loaders.velocity import make_velocity
from wanflow.models.dit import WanDiT
from wanflow.models.vae import WanVAE
from wanflow.pipeline import Engine, Run, frame_by_frame
from wanflow.presets import Expert, ModelSpec
from wanflow.recipe import ModelRecord, Recipe


class GoldenParts:
    """Reference models behind the loop that users run."""

    def __init__(
        self, spec: ModelSpec, models: dict[Expert, WanDiT], vae: WanVAE, texts: Sequence[Tensor]
    ) -> None:
        self.spec, self.models, self.vae = spec, models, vae
        length = spec.dit.text_len
        self.texts = torch.stack([pad(one, (0, 0, 0, length - len(one))) for one in texts])

    def text(self, prompts: list[str]) -> Tensor:
        return self.texts[: len(prompts)]

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT:
        return self.models[which]

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None: ...

    def condition(self, run: Run) -> TextToVideo:
        if not run.pictures:
            return conditioning_of(self.spec, run.request)
        clip = clip_parts(self.spec, run.request, run.pictures)
        return conditioning_of(self.spec, run.request, self.vae.encode_parts(clip))

    def engine(self, cfg_batch: bool) -> Engine:
        model, runtime = ModelRecord("golden", "", ""), {"device": "cpu", "dtype": "float32"}
        return Engine(
            self.spec,
            torch.device("cpu"),
            lambda request: Recipe(
                request.complete(self.spec), model, runtime, {}, "cpu", cfg_batch
            ),
            lambda run: None,
            lambda state: state,
            self.condition,
            lambda run, conditioning: make_velocity(
                self, run.request, run.state.index, cfg_batch, conditioning=conditioning
            ),
            lambda latent, on_part: frame_by_frame(self.vae, latent, on_part),
            lambda stop: stop,
        )
