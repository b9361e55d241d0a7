"""diffusers as a second oracle of TI2V-5B and I2V-A14B, at small random shapes in float32.

Transformers, what they see of a picture, and whole runs. Both sides get a picture of the video's
size, which neither resizes: there diffusers differs from the official code. Both follow our Euler
schedule. The last picture is diffusers' alone, so diffusers is its reference.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from helpers.golden_parts import GoldenParts
from helpers.oracle import ExactFeatures, close, copy_weights, dit_inputs, dit_pair, their_dit
from helpers.tiny import FAMILY, randomised
from PIL import Image
from torch import Tensor

from wanflow.checkpoint.structure import module_of
from wanflow.pictures import open_picture
from wanflow.pipeline import Run, begin, denoise
from wanflow.request import Request
from wanflow.sampling.schedule import make_schedule

CHANNELS = {"i2v": (36, 16), "ti2v": (48, 48)}
SIZE, FRAMES, STEPS, SHIFT, HIGH, LOW = (64, 32), 9, 4, 5.0, 3.5, 2.5
# Four steps with guidance multiply the rounding of one forward, 2e-5.
ROUNDING = {"atol": 1e-4, "rtol": 1e-5}


@pytest.mark.parametrize("kind", CHANNELS)
def test_transformer(kind: str) -> None:
    ours, theirs, rng = dit_pair(7, CHANNELS[kind])
    theirs.condition_embedder.timesteps_proj = ExactFeatures(ours.config.freq_dim)
    latent, text = dit_inputs(ours.config, rng, 2)
    t = torch.tensor([871, 12])
    close(ours(latent, t, text), theirs(latent, t, text).sample)


def test_transformer_with_the_first_frame_at_time_0() -> None:
    ours, theirs, rng = dit_pair(8, CHANNELS["ti2v"])
    theirs.condition_embedder.timesteps_proj = ExactFeatures(ours.config.freq_dim)
    latent, text = dit_inputs(ours.config, rng, 2)
    tokens = latent[0, 0].numel() // 4
    t = (torch.arange(tokens) >= latent[0, 0, 0].numel() // 4).expand(2, -1) * 871
    close(ours(latent, t, text), theirs(latent, t, text).sample)


class OurSteps(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' Euler steps on our schedule."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        schedule = make_schedule("euler", num_inference_steps, SHIFT)
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.tensor(schedule.sigmas)
        self.timesteps = torch.tensor(schedule.timesteps)
        self._step_index = self._begin_index = None


@cache
def our_parts(kind: str) -> GoldenParts:
    spec = FAMILY[kind]
    models = {
        name: randomised(module_of(spec.dit), seed) for seed, name in enumerate(spec.expert_names)
    }
    for model in models.values():
        model.head.head.weight.mul_(0.5)  # as the golden loops do: else the latents grow
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randn(n, spec.dit.text_dim, generator=generator) for n in (6, 3)]
    return GoldenParts(spec, models, randomised(module_of(spec.vae), 9), texts)


def their_vae(kind: str) -> Any:
    config = FAMILY[kind].vae
    coarse = kind == "ti2v"
    theirs = AutoencoderKLWan(
        base_dim=config.dim,
        decoder_base_dim=config.dec_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temperal_downsample),
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
        is_residual=coarse,
        in_channels=12 if coarse else 3,
        out_channels=12 if coarse else 3,
        patch_size=2 if coarse else None,
        scale_factor_spatial=config.spatial_stride,
    )
    copy_weights("vae", "diffusers", our_parts(kind).vae, theirs)
    return theirs


@cache
def their_pipeline(kind: str, picture: bool) -> Any:
    own = our_parts(kind)
    networks = [their_dit(model) for model in own.models.values()]
    for network in networks:
        network.condition_embedder.timesteps_proj = ExactFeatures(own.spec.dit.freq_dim)
    cls = WanImageToVideoPipeline if picture else WanPipeline
    pipe = cls(
        tokenizer=None,
        text_encoder=None,
        vae=their_vae(kind),
        scheduler=OurSteps(),
        transformer=networks[0],
        transformer_2=networks[1] if len(networks) > 1 else None,
        boundary_ratio=own.spec.boundary if len(networks) > 1 else None,
        expand_timesteps=own.spec.conditioning == "first_frame",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def our_run(kind: str, first: Image.Image | None, last: Image.Image | None) -> Run:
    own = our_parts(kind)
    high, low = (HIGH, LOW) if len(own.spec.experts) > 1 else (HIGH, None)
    request = Request(
        "any",
        "none",
        image=None if first is None else open_picture(first),
        last_image=None if last is None else open_picture(last),
        size=SIZE,
        exact_size=True,
        frame_num=FRAMES,
        sample_solver="euler",
        sample_steps=STEPS,
        sample_shift=SHIFT,
        cfg_high=high,
        cfg_low=low,
        seed=3,
    )
    return begin(own.engine(False), request)


def their_run(kind: str, noise: Tensor, **pictures: Any) -> Any:
    own = our_parts(kind)
    return their_pipeline(kind, bool(pictures))(
        height=SIZE[1],
        width=SIZE[0],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=HIGH,
        guidance_scale_2=LOW if len(own.spec.experts) > 1 else None,
        latents=noise,
        prompt_embeds=own.texts[:1],
        negative_prompt_embeds=own.texts[1:],
        output_type="latent",
        **pictures,
    ).frames


CASES = [("i2v", "first"), ("i2v", "both"), ("ti2v", "first"), ("ti2v", "none")]


@pytest.mark.parametrize(("kind", "given"), CASES, ids=[f"{a}-{b}" for a, b in CASES])
def test_whole_run(kind: str, given: str) -> None:
    first = None if given == "none" else picture(1)
    last = picture(2) if given == "both" else None
    begun = our_run(kind, first, last)
    pictures = {"image": first, "last_image": last}
    named = {name: one for name, one in pictures.items() if one is not None}
    expected = their_run(kind, begun.state.x, **named)
    done = denoise(our_parts(kind).engine(False), begun)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(done.state.x, expected, **ROUNDING)
    steps = make_schedule("euler", STEPS, SHIFT).timesteps
    used = {t >= 1000 * our_parts(kind).spec.boundary for t in steps}
    assert len(used) == len(our_parts(kind).spec.experts)  # so both experts denoise


@pytest.mark.parametrize("given", ["first", "both"])
def test_what_the_model_sees_of_pictures(given: str) -> None:
    """Mask and encoded clip of I2V-A14B."""
    pipe, first, last = their_pipeline("i2v", True), picture(1), picture(2)
    begun = our_run("i2v", first, last if given == "both" else None)
    prepared = [
        pipe.video_processor.preprocess(one, height=SIZE[1], width=SIZE[0]) for one in (first, last)
    ]
    _, expected = pipe.prepare_latents(
        prepared[0], 1, 16, SIZE[1], SIZE[0], FRAMES, torch.float32, torch.device("cpu"),
        latents=begun.state.x, last_image=prepared[1] if given == "both" else None,
    )  # fmt: skip
    with torch.no_grad():
        found: Any = our_parts("i2v").condition(begun)
    assert torch.equal(found.y[:, :4], expected[:, :4])
    close(found.y[:, 4:], expected[:, 4:])


def test_a_last_picture_alone_is_where_the_last_of_two_is() -> None:
    """diffusers knows no such run: its mask is that of both pictures without the first frame's."""
    both, alone = our_run("i2v", picture(1), picture(2)), our_run("i2v", None, picture(2))
    with torch.no_grad():
        of_both, found = (our_parts("i2v").condition(run) for run in (both, alone))
    mask = of_both.y[:, :4].clone()  # type: ignore[attr-defined]
    mask[:, :, 0] = 0
    assert torch.equal(found.y[:, :4], mask)  # type: ignore[attr-defined]
    grey = replace(both, pictures={**both.pictures, "first": torch.zeros(3, *SIZE[::-1])})
    with torch.no_grad():
        same = our_parts("i2v").condition(grey)
    assert torch.equal(found.y[:, 4:], same.y[:, 4:])  # type: ignore[attr-defined]
