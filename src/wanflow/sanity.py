"""Judge whether a latent can become a video, and name likely causes where it cannot.

The bounds come from measurements on nano, whose latents are normalised like the published model's:
38 runs (five prompts, one of them of unknown words, 1 to 10 steps, three solvers, 64*64 to 192*128
pixels, 1 and more frames, guidance 1 to 30) and 17 that were broken on purpose. Final latents of
runs with nano's own guidance and two or more steps had a standard deviation of 0.70 to 1.38, a
largest value of at most 7.7, and a correlation of neighbours of at least 0.60. Guidance 16 gave
1.98, 13 and 0.35; guidance 30 gave 3.9, 25 and 0.22; a single step gave 4.0, 16 and 0.80. With
weights of zero neighbours correlated at 0.01 or 0.02. Swapped experts cannot be detected: their
latents look like the others.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from wanflow.recipe import Recipe

# Standard deviation within the liveliest channel; nano's plainest picture, one colour, has 0.15.
FLAT = 1e-3
EXPLODED = 1e3  # the largest value: 25 at guidance 30, and unit noise has 6
WIDE = 3.0  # standard deviation of a latent
NOISE = 0.1  # correlation of neighbouring values
PAIRS = 1600  # neighbours that a verdict needs; in noise they correlate at 0 +- 0.025
STRONG, FEW = 8.0, 4  # guidance above, steps below


class OutputError(RuntimeError):
    """The model's output is no video (NaN, or one constant); it is never saved as a success."""


class LatentError(OutputError):
    """A latent that cannot become a video; every rank of a run holds the same and finds it."""


@dataclass(frozen=True)
class Facts:
    """Possible causes of a broken output.

    dtype, quantize, attention: as `Runtime` has them, once chosen.
    loras: as a request has them: file@strengths.
    guidance: the larger of the two.
    """

    dtype: str = "float32"
    quantize: str = ""
    attention: str = "sdpa"
    loras: tuple[str, ...] = ()
    guidance: float = 1.0
    steps: int = 40


def facts_of(recipe: Recipe) -> Facts:
    """Return what a report on a broken output of this recipe may name as its cause."""
    request, names = recipe.request, ("dtype", "quantize", "attention")
    return Facts(
        **{name: recipe.runtime[name] for name in names if name in recipe.runtime},
        loras=request.lora,
        guidance=max(request.cfg_high, request.cfg_low),
        steps=request.sample_steps,
    )


def check_step(x: Tensor, step: int, facts: Facts) -> None:
    """Refuse a latent that no further step can repair; one pass, and one wait for the device.

    Args:
        x: [1, z, t, h, w] after this step.
        step: 1-based.

    Raises:
        LatentError: naming the step and what may be the cause, for NaN, infinity, or values
            hundreds of times as large as noise's.
    """
    _check_values(x, f"step {step} gave", facts)


def check_latent(x: Tensor, facts: Facts) -> list[str]:
    """Judge a final latent [1, z, t, h, w].

    Returns:
        A line for each suspicion that is no proof.

    Raises:
        LatentError: for NaN, infinity, exploded values, or one value in each channel.
    """
    _check_values(x, "the final latent holds", facts)
    x = x.float()
    channels = x.flatten(2)
    if channels.shape[2] > 1 and float(channels.std(dim=2).max()) < FLAT:
        causes = ["the weights are empty or damaged", *_numerics(facts)]
        raise LatentError(_report("the final latent is constant", causes))
    suspicions = []
    spread, (correlation, pairs) = float(x.std()), neighbours(x)
    if spread > WIDE:
        what = f"the final latent is {spread:.1f} times as wide as it should be, so colours will"
        causes = [*_strength(facts), *_numerics(facts), "the weights may be damaged"]
        if facts.steps < FEW:
            causes.insert(0, f"so few steps ({facts.steps}) need a LoRA made for them")
        suspicions.append(_report(f"{what} be cut off", causes))
    if pairs >= PAIRS and correlation < NOISE:
        what = "the final latent looks like noise"
        causes = ["the weights may be empty, damaged or of another model"]
        causes += [*_strength(facts), *_numerics(facts)]
        suspicions.append(_report(f"{what} (neighbours correlate with {correlation:.2f})", causes))
    return suspicions


def refuse_constant(low: int, high: int) -> None:
    """Raise OutputError where every value of a video is the same."""
    if low == high:
        raise OutputError(
            f"the output is constant (every value is {low}): the weights are empty or damaged, or"
            " the model is not a Wan2.2 one"
        )


def neighbours(x: Tensor) -> tuple[float, int]:
    """Return the correlation of neighbours in time, height and width, and the number of pairs.

    It is about zero, not about each channel's mean: a picture of one colour is its means, plus
    noise.
    """
    total, pairs = 0.0, 0
    for side in (2, 3, 4):
        length = x.shape[side]
        if length > 1:
            products = x.narrow(side, 0, length - 1) * x.narrow(side, 1, length - 1)
            total, pairs = total + float(products.sum()), pairs + products.numel()
    power = float(x.square().mean())
    return (total / pairs / power if pairs and power else 0.0), pairs


def _check_values(x: Tensor, what: str, facts: Facts) -> None:
    largest = float(torch.linalg.vector_norm(x, ord=math.inf))  # NaN where there is one
    if not math.isfinite(largest):
        causes = [*_numerics(facts), *_strength(facts)]
        if facts.dtype == "float16":
            causes.insert(0, "float16 overflows: use --dtype bfloat16 (float32 on old GPUs)")
        elif facts.dtype != "float32":
            causes.append("see whether --dtype float32 helps")
        causes.append("check the weights: wanflow inspect --check")
        raise LatentError(_report(f"{what} NaN or infinity", causes))
    if largest > EXPLODED:
        causes = [*_strength(facts), *_numerics(facts)]
        causes.append("the weights may be damaged, or fp8 that lacks its scales")
        raise LatentError(_report(f"{what} values up to {largest:.3g}, where noise has 6", causes))


def _strength(facts: Facts) -> list[str]:
    """Causes of too large values."""
    causes = []
    if facts.loras:
        names = ", ".join(re.split(r"[/\\]", lora)[-1] for lora in facts.loras)
        causes.append(
            f"the LoRA's strength may be too high, or its alpha not meant for this model ({names}):"
            " lower it, or leave it out"
        )
    if facts.guidance > STRONG:
        causes.append(f"guidance {facts.guidance:g} is high: 3 to 5 is usual")
    return causes


def _numerics(facts: Facts) -> list[str]:
    """Settings that compute differently from the plain model."""
    causes = []
    if facts.quantize:
        causes.append(f"see whether it goes without --quantize {facts.quantize}")
    if facts.attention != "sdpa":
        causes.append(f"see whether --attention sdpa helps in place of {facts.attention}")
    return causes


def _report(what: str, causes: list[str]) -> str:
    return f"{what}: {'; '.join(causes)}"
