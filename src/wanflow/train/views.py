"""Say how a model sees clips in training: by text alone, or with their first frame given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.conditioning import TextToVideo, clip_parts, conditioning_of, encoded_shape
from wanflow.config import TRAIN_STEPS
from wanflow.geometry import geometry_of
from wanflow.models.dit import Trunk, WanDiT, time_features
from wanflow.presets import Conditions, ModelSpec
from wanflow.request import CompleteRequest, PictureRecord, Request
from wanflow.sampling.schedule import Step
from wanflow.train.clips import Form

# The share of clips that a model sees with their first frame. One that has no other way sees all
# so; one that also makes videos of text alone must not forget that.
PICTURED: Mapping[Conditions, float] = {"text": 0.0, "channels": 1.0, "first_frame": 0.5}


@dataclass(frozen=True)
class Views:
    """The ways in which a model sees clips of one form."""

    spec: ModelSpec
    form: Form

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a clip's latent, (z, t, h, w)."""
        return geometry_of(self.spec).latent_shape(self.form.size, self.form.frame_num)

    @property
    def share(self) -> float:
        """The share of clips that the model sees with their first frame."""
        share = PICTURED[self.spec.conditioning]
        # Nothing is left to learn where the only latent frame is given.
        return share if share == 1 or self.shape[1] > 1 else 0.0

    def parts(self, first: Tensor) -> Iterator[Tensor]:
        """Yield the clip that the VAE encodes for a first frame [3, H, W] in -1..1."""
        return clip_parts(self.spec, self._pictured(), {"first": first})

    def of(self, encoded: Tensor | None) -> TextToVideo:
        """Return what the model sees of a clip.

        Args:
            encoded: the latent of `parts`, [1, z, n, h, w]; None: the text alone.
        """
        request = self._asked() if encoded is None else self._pictured()
        return conditioning_of(self.spec, request, encoded)

    def fullest(self) -> TextToVideo:
        """Return, with zeros for what is encoded, the view that takes the most memory."""
        encoded = torch.zeros(encoded_shape(self.spec, self._pictured()))
        return self.of(encoded if self.share else None)

    def _asked(self) -> CompleteRequest:
        size, frames, fps = self.form.size, self.form.frame_num, self.form.fps
        return Request("any", size=size, frame_num=frames, fps=fps, seed=0).complete(self.spec)

    def _pictured(self) -> CompleteRequest:
        return replace(self._asked(), image=PictureRecord("0" * 64, *self.form.size))


def flow_loss(
    model: WanDiT,
    seen: Sequence[TextToVideo],
    latents: Tensor,
    noise: Tensor,
    sigma: Sequence[float],
    texts: Tensor,
    trunk: Trunk,
) -> Tensor:
    """Return the mean squared error of the velocity, noise minus data; a scalar.

    What a clip holds counts for nothing: its mean is over the rest.

    Args:
        model: an expert.
        seen: how it sees each clip.
        latents, noise: [B, z, t, h, w].
        sigma: the share of noise in each clip.
        texts: [B, S, D].
        trunk: runs the blocks.
    """
    config, device = model.config, latents.device
    share = torch.tensor(sigma, device=device).view(-1, 1, 1, 1, 1)
    rows = list(zip(seen, torch.lerp(latents, noise, share).split(1), strict=True))
    grid = config.grid(latents.shape[2:])
    runs = next((one.runs(grid) for one in seen if one.runs(grid)), ())
    steps = (Step(0, level * TRAIN_STEPS, level) for level in sigma)
    times = [one.times(step) for one, step in zip(seen, steps, strict=True)]
    # A clip with one time for all tokens has it in every row that another clip needs.
    table = torch.stack([time.expand(max(map(len, times))) for time in times])
    features = time_features(table, config.freq_dim).to(device)
    inputs = torch.cat([one.latent(one.held(x)) for one, x in rows])
    predicted = model(inputs, features, texts, trunk, runs=runs)
    weight = torch.cat([_weight(one, x) for one, x in rows])
    return F.mse_loss(predicted * weight, (noise - latents) * weight)


def _weight(seen: TextToVideo, like: Tensor) -> Tensor:
    """Return factors of an error: 0 where a latent is held, and of mean square 1."""
    free = seen.held(torch.ones_like(like)) - seen.held(torch.zeros_like(like))
    return free / free.mean().sqrt()
