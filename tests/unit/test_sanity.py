"""Latents that are no video are refused with their likely cause, suspicious ones are named, and
sound ones pass in silence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.common import PROMPT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import wanflow
from wanflow.api import Pipeline
from wanflow.sanity import Facts, OutputError, check_latent, check_step, neighbours

PLAIN = Facts(steps=10)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def clip(*shape: int) -> Tensor:
    """As smooth as a video's latent, and as large."""
    x = noise(*shape).cumsum(-1).cumsum(-2)
    return x / x.std()


def final(nano: Pipeline, prompt: str = PROMPT, **request: Any) -> Tensor:
    return nano.resume(
        nano.begin(wanflow.Request(prompt, **{"seed": 5, "sample_steps": 6, **request}))
    ).state.x


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"frame_num": 1},
        {"size": (160, 96), "frame_num": 1},
        {"size": (16, 16), "frame_num": 5},
        {"sample_steps": 2},
        {"cfg_high": 1.0, "cfg_low": 1.0},
        {"prompt": "xyzzy"},
        {"sample_solver": "euler"},
        {"cfg_high": 8.0, "cfg_low": 8.0},
    ],
)
def test_what_nano_makes_is_sound(nano: Pipeline, request_: dict[str, Any]) -> None:
    assert check_latent(final(nano, **request_), PLAIN) == []


def test_guidance_far_too_high_shows(nano: Pipeline) -> None:
    (told,) = check_latent(final(nano, cfg_high=30.0, cfg_low=30.0), replace(PLAIN, guidance=30.0))
    assert "times as wide as it should be" in told and "guidance 30 is high" in told


def test_a_single_step_shows(nano: Pipeline) -> None:
    (told,) = check_latent(final(nano, sample_steps=1), replace(PLAIN, steps=1))
    assert "times as wide as it should be" in told and "so few steps (1)" in told


def test_empty_weights_leave_the_noise() -> None:
    pipe = wanflow.load("nano", device="cpu")
    for which in ("high", "low"):
        for parameter in pipe.parts.expert(which).parameters():
            parameter.data.zero_()
    (told,) = check_latent(final(pipe), PLAIN)
    assert "looks like noise" in told and "weights may be empty" in told


@pytest.mark.parametrize(
    "shape", [(1, 16, 1, 8, 8), (1, 16, 5, 8, 8), (1, 4, 5, 30, 52), (1, 16, 21, 90, 160)]
)
def test_noise_is_told_from_a_clip(shape: tuple[int, ...]) -> None:
    (told,) = check_latent(noise(*shape), PLAIN)
    assert "looks like noise" in told
    assert check_latent(clip(*shape), PLAIN) == []
    assert (
        check_latent(0.1 * noise(*shape) + noise(1, shape[1], 1, 1, 1), PLAIN) == []
    )  # one colour


@pytest.mark.parametrize("shape", [(1, 16, 1, 1, 1), (1, 16, 1, 2, 2), (1, 4, 2, 4, 4)])
def test_the_smallest_are_not_judged(shape: tuple[int, ...]) -> None:
    assert check_latent(noise(*shape), PLAIN) == []


def test_neighbours() -> None:
    assert neighbours(torch.ones(1, 2, 3, 4, 5)) == (
        pytest.approx(1),
        2 * (2 * 20 + 3 * 15 + 12 * 4),
    )
    board = (torch.arange(4).view(-1, 1) + torch.arange(6)).remainder(2).mul(2).sub(1).float()
    assert neighbours(board.expand(1, 1, 1, 4, 6))[0] == pytest.approx(-1)
    assert neighbours(torch.zeros(1, 2, 3, 4, 5))[0] == 0
    assert neighbours(torch.ones(1, 2, 1, 1, 1)) == (0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_value_is_found(value: float, dtype: torch.dtype) -> None:
    x = clip(1, 4, 2, 8, 8).to(dtype)
    check_step(x, 3, PLAIN)
    x[0, 3, 1, 7, 7] = value
    with pytest.raises(
        OutputError, match="^step 3 gave NaN or infinity: .*wanflow inspect --check"
    ):
        check_step(x, 3, PLAIN)
    with pytest.raises(OutputError, match="^the final latent holds NaN or infinity"):
        check_latent(x, PLAIN)


@pytest.mark.parametrize("sign", [-1, 1])
def test_exploded_values(sign: int) -> None:
    x = clip(1, 4, 2, 8, 8)
    x[0, 0, 0, 0, 0] = sign * 999
    check_step(x, 1, PLAIN)
    x[0, 0, 0, 0, 0] = sign * 1e6
    with pytest.raises(
        OutputError, match=r"^step 7 gave values up to 1e\+06.*fp8 that lacks its scales"
    ):
        check_step(x, 7, PLAIN)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 4, 2, 8, 8),
        torch.ones(1, 4, 2, 8, 8),
        noise(1, 4, 1, 1, 1).expand(1, 4, 2, 8, 8),
    ],
)
def test_constant_is_no_video(x: Tensor) -> None:
    with pytest.raises(OutputError, match="^the final latent is constant: the weights are empty"):
        check_latent(x, PLAIN)


CAUSES = {
    "float16": (Facts(dtype="float16"), "use --dtype bfloat16"),
    "bfloat16": (Facts(dtype="bfloat16"), "--dtype float32"),
    "quantised": (Facts(quantize="fp8"), "without --quantize fp8"),
    "kernel": (Facts(attention="sage"), "--attention sdpa helps in place of sage"),
    "lora": (
        Facts(loras=("/some/where/style.safetensors@high=4,low=4",)),
        r"strength may be too high.*\(style.safetensors@high=4,low=4\)",
    ),
    "guidance": (Facts(guidance=12), "guidance 12 is high"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_causes_are_named(name: str) -> None:
    facts, line = CAUSES[name]
    broken = torch.full((1, 4, 2, 8, 8), float("nan"))
    with pytest.raises(OutputError, match=line) as told:
        check_step(broken, 1, facts)
    assert "\n" not in str(told.value) and "/some/where" not in str(told.value)
    with pytest.raises(OutputError) as plain:
        check_step(broken, 1, Facts())
    assert plain.match("check the weights") and not any(
        word in str(plain.value) for word in ("--dtype", "--quant", "LoRA", "guidance", "--att")
    )


class Calls(TorchDispatchMode):
    """Notes which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_is_checked_in_one_pass() -> None:
    x = clip(1, 4, 2, 8, 8)
    with Calls() as calls:
        check_step(x, 1, PLAIN)
    assert calls.names == ["aten::linalg_vector_norm", "aten::_local_scalar_dense"]
