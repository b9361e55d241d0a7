"""Sizes and lengths to latents and tokens, and what happens at each step of a request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wanflow.config import RequestError, VAEConfig
from wanflow.geometry import COMMON, Geometry, geometry_of, parse_size
from wanflow.presets import NANO, T2V_A14B, TI2V_5B
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.sampling.timeline import handover, timeline

# Wan2.2-TI2V-5B: a VAE of 4x16x16 with 48 channels.
COARSE = Geometry(48, (4, 16, 16), TI2V_5B.dit.patch_size)


def test_the_published_size() -> None:
    geometry = geometry_of(T2V_A14B)
    assert geometry.latent_shape((1280, 720), 81) == (16, 21, 90, 160)
    assert geometry.grid((1280, 720), 81) == (21, 45, 80)
    assert geometry.tokens((1280, 720), 81) == 75_600
    assert (geometry.size_multiple, geometry.frame_step) == (16, 4)
    assert geometry.latent_shape((64, 48), 1) == (16, 1, 6, 8)


def test_a_coarser_vae() -> None:
    assert COARSE.latent_shape((1280, 704), 121) == (48, 31, 44, 80)
    assert COARSE.tokens((1280, 704), 121) == 31 * 22 * 40
    assert COARSE.size_multiple == 32
    parse_size("1280*720")
    with pytest.raises(RequestError, match="multiple of 32"):
        parse_size("1280*720", COARSE)


def test_a_request_meets_the_multiples_of_its_model() -> None:
    vae = VAEConfig(dim_mult=(1, 2, 4, 4, 4), temperal_downsample=(False, True, True, False))
    coarse = replace(T2V_A14B, vae=vae)
    Request("x", size="48*64").complete(T2V_A14B)
    with pytest.raises(RequestError, match="width 48.*32"):
        Request("x", size="48*64").complete(coarse)


@pytest.mark.parametrize(
    ("frames", "longest", "nearest"),
    [(0, 1, 1), (1, 1, 1), (2, 1, 1), (4, 1, 5), (5, 5, 5), (6, 5, 5), (80, 77, 81), (82, 81, 81)],
)
def test_lengths(frames: int, longest: int, nearest: int) -> None:
    assert (COMMON.longest(frames), COMMON.nearest_frames(frames)) == (longest, nearest)
    if frames == nearest:
        COMMON.check_frames(frames)
    else:
        with pytest.raises(RequestError, match=f"4n.1; the nearest is {nearest}"):
            COMMON.check_frames(frames)


@pytest.mark.parametrize(
    "size", ["1280*720", "1280x720", "1280X720", "1280\u00d7720", (1280, 720), [1280, 720]]
)
def test_sizes_are_read(size: str | tuple[int, int]) -> None:
    assert parse_size(size) == (1280, 720)


@pytest.mark.parametrize("size", ["", "1280", "1280*", "a*b", "1*2*3", None, 7, (1280,), (0, 16)])
def test_other_sizes_are_refused(size: object) -> None:
    with pytest.raises(RequestError):
        parse_size(size)  # type: ignore[arg-type]


def test_the_timeline_of_a_request() -> None:
    request = Request(
        "x",
        sample_steps=8,
        cfg_low=1.0,
        cfg_start=2.0,
        cfg_start_steps=1,
        lora=("a@high=1,low=0.5,steps=2-",),
    ).complete(NANO)
    steps = timeline(request, NANO)
    assert [step.index for step in steps] == list(range(8))
    first = next(step.index for step in steps if step.expert == "low")
    assert [step.expert for step in steps] == ["high"] * first + ["low"] * (8 - first)
    assert [step.guidance for step in steps] == [2.0] + [4.0] * (first - 1) + [1.0] * (8 - first)
    assert [step.strengths for step in steps] == (
        [(0.0,)] + [(1.0,)] * (first - 1) + [(0.5,)] * (8 - first)
    )
    assert [step.guided for step in steps] == [step.guidance != 1 for step in steps]
    assert handover(steps, 0) is steps[first] and handover(steps, first) is None


def test_a_model_with_one_expert() -> None:
    single = replace(NANO, expert_folders=(("low", "."),), boundary=0.0)
    steps = timeline(Request("x", sample_steps=4).complete(single), single)
    assert {step.expert for step in steps} == {"low"} and handover(steps, 0) is None
    assert [expert.from_timestep for expert in single.experts] == [0.0]
    assert [expert.from_timestep for expert in T2V_A14B.experts] == [875.0, 0.0]


@pytest.mark.parametrize("size", ["16400*16", "16*160000", (2**63, 16), f"{'9' * 400}*16"])
def test_a_side_has_a_limit(size: str | tuple[int, int]) -> None:
    """As many tokens as the rotary table of Wan2.2 has positions: 1024 along each axis."""
    assert COMMON.grid(parse_size("16384*16384"), COMMON.most_frames) == (1024, 1024, 1024)
    with pytest.raises(RequestError, match="at most 16384 pixels"):
        parse_size(size)


@pytest.mark.parametrize("frames", [4097, 1_000_001, 10**400])
def test_a_length_has_a_limit(frames: int) -> None:
    COMMON.check_frames(4093)
    with pytest.raises(RequestError, match="at most 4093 frames"):
        COMMON.check_frames(frames)
    with pytest.raises(RequestError, match=r"from 1 to 4,093"):
        Request("x", frame_num=frames).complete(NANO)


@pytest.mark.parametrize("name", ["resident_blocks", "ring_size", "ulysses_size"])
def test_counts_of_a_runtime_have_limits(name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name} must be a whole number from \d to 1,"):
        Runtime(**{name: 10**20})
