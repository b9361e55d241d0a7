"""The plan of I2V-A14B and TI2V-5B: what their pictures, their one network and their VAEs take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.plans import of
from helpers.tiny import FAMILY as TINY
from torch.utils.flop_counter import FlopCounterMode

from wanflow.checkpoint.checkpoint import published
from wanflow.checkpoint.structure import vae_of
from wanflow.conditioning import clip_parts
from wanflow.plan import decoding
from wanflow.plan.gpus import described
from wanflow.plan.needed import A14B, TI2V_5B, needed_words
from wanflow.plan.phases import Phase, need
from wanflow.plan.start import needs_gpu
from wanflow.plan.traces import Traces
from wanflow.presets import I2V_A14B, T2V_A14B, ModelSpec
from wanflow.request import CompleteRequest, PictureRecord
from wanflow.runtime import Runtime

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"size": "832*480", "frame_num": 17}


def asked(spec: ModelSpec, **options: Any) -> CompleteRequest:
    """A request with a picture."""
    request = of(spec, **options)
    return replace(request, image=PictureRecord("0" * 64, *request.size))


def traced(spec: ModelSpec, request: CompleteRequest) -> Traces:
    return Traces(published(spec), request, torch.bfloat16, CPU)


def phases(spec: ModelSpec, request: CompleteRequest, runtime: Runtime) -> dict[str, Phase]:
    return {phase.name: phase for phase in need(traced(spec, request), runtime, "gpu").phases}


HELD = Runtime(
    keep_experts=True,
    resident_blocks=40,
    chunk_tokens=0,
    t5_cpu=False,
    prefetch=False,
    vae_tile=0,
    cfg_batch=False,
    stream_from="ram",
)


def test_pictures_are_encoded_before_the_prompt_and_their_vae_may_stay() -> None:
    kept = phases(I2V_A14B, of(I2V_A14B, **QUICK), HELD)
    names = ["VAE encoder", "text encoder", "high-noise expert", "low-noise expert", "VAE"]
    assert list(kept) == names, "also without a picture: the model makes nothing without one"
    freed = phases(I2V_A14B, of(I2V_A14B, **QUICK), replace(HELD, keep_experts=False))
    vae = freed["VAE"].weights
    assert vae == freed["VAE encoder"].weights == 4 * published(I2V_A14B).parameters("vae")
    high = "high-noise expert"
    assert kept[high].weights - freed[high].weights == vae
    assert kept["VAE"].weights == 2 * freed[high].weights + vae
    assert list(phases(T2V_A14B, of(T2V_A14B, **QUICK), HELD)) == names[1:]


def test_picture_channels_stay_through_a_step() -> None:
    """20 channels in float32 beside the latent, and the 36 that they make together."""
    ours, theirs = (
        traced(spec, of(spec, **QUICK)).step("high", 2, HELD, False)
        for spec in (I2V_A14B, T2V_A14B)
    )
    pixel = 4 * 5 * 60 * 104
    assert 20 * pixel <= ours.activations - theirs.activations <= (20 + 36) * pixel


@pytest.mark.parametrize("frames", [1, 5, 9, 33])
def test_the_work_of_an_encode_is_what_encoding_takes(frames: int) -> None:
    """Also of the groups that are not traced, but for a 1x1x1 convolution at the end."""
    for spec in TINY.values():
        request = asked(spec, size="64*64", frame_num=frames)
        vae = vae_of(spec.vae).to_empty(device="cpu").requires_grad_(False)
        pictures = {"first": torch.zeros(3, 64, 64)}
        with torch.no_grad(), FlopCounterMode(display=False) as theirs:
            vae.encode_parts(clip_parts(spec, request, pictures))
        flops = decoding.clip(spec, request).work.flops
        # The counter does not know the attention of a CPU, which is one operation.
        ours = sum(count for (kind, _), count in flops.items() if kind != "attention")
        assert ours == pytest.approx(theirs.get_total_flops(), rel=2e-3 if frames > 9 else 1e-12)


def test_each_model_is_refused_by_its_own_needs() -> None:
    for spec in (T2V_A14B, I2V_A14B):
        assert needs_gpu(published(spec)), spec.name
        assert needed_words(spec.name).startswith(f"{spec.name} needs a GPU with ")
    assert "80 GB" in needed_words(I2V_A14B.name) and A14B.least == (12, 32)
    assert "24 GB" in needed_words("Wan2.2-TI2V-5B") and TI2V_5B.disk < A14B.disk
    assert described("24gb").gpu > TI2V_5B.reported[0] > described("16gb").gpu
