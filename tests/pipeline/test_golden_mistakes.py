"""The reference numbers catch the mistakes that they are made to catch.

Each mistake of the list in tests/golden-family/README.md that can be made from outside is made
here, and a check of `test_golden_family` must fail.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import golden_family, golden_parts
from helpers.golden import Json
from helpers.golden_dit import check_sample
from helpers.golden_family import (
    DITS,
    GIVEN,
    LOOPS,
    check_pictures,
    check_steps,
    dit,
    parts,
    vae,
    walk,
)
from PIL import Image
from torch import Tensor, nn

from wanflow import conditioning
from wanflow.conditioning import FirstFrame, PictureChannels, TextToVideo
from wanflow.loaders import velocity as velocities
from wanflow.models import dit as dits
from wanflow.models.dit import Attention, Block, Conditioning, Head, LayerNorm, RMSNorm, WanDiT
from wanflow.request import CompleteRequest, Picture
from wanflow.sampling import timeline

pytestmark = pytest.mark.skipif(bool(GIVEN), reason="another folder need not show each mistake")
Patch = pytest.MonkeyPatch


def marked(mistakes: dict[str, Any], quick: set[str]) -> list[Any]:
    return [
        pytest.param(make, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, make in mistakes.items()
    ]


# --- the transformers ---

Rope = Callable[..., Tensor]


def with_times(change: Callable[[Tensor, tuple[int, int, int]], Tensor]) -> Any:
    """Let the transformer see other times than it is given, where it is given one per token."""

    def make(patch: Patch, network: WanDiT) -> None:
        forward = network.forward

        def changed(latent: Tensor, timestep: Tensor, *rest: Any) -> Tensor:
            if timestep.ndim == 2:
                timestep = change(timestep, network.config.grid(latent.shape[2:]))
            return forward(latent, timestep, *rest)

        patch.setattr(network, "forward", changed)

    return make


def with_last_time(cls: type[Block] | type[Head]) -> Any:
    """Let the blocks, or the head, have the time of the last token everywhere."""

    def make(patch: Patch, network: WanDiT) -> None:
        forward = cls.forward

        def changed(self: Any, x: Tensor, given: Conditioning, *rest: Any) -> Tensor:
            if given.index is not None:
                last = given.index[:, -1:].expand_as(given.index)
                given = replace(given, index=last)
            return forward(self, x, given, *rest)

        patch.setattr(cls, "forward", changed)

    return make


def with_rope(change: Callable[[Rope, tuple[int, int, int], int], Tensor]) -> Any:
    def make(patch: Patch, network: WanDiT) -> None:
        table = dits.rope_table
        patch.setattr(dits, "rope_table", lambda grid, width, device: change(table, grid, width))

    return make


def no_turn(table: Rope, grid: tuple[int, int, int], width: int) -> Tensor:
    return torch.tensor([1.0, 0.0]).expand(math.prod(grid), width // 2, 2)


def sides_exchanged(table: Rope, grid: tuple[int, int, int], width: int) -> Tensor:
    frames, rows, columns = grid
    turned = table((frames, columns, rows), width, torch.device("cpu"))
    return turned.unflatten(0, (frames, columns, rows)).transpose(1, 2).flatten(0, 2)


def half_split(patch: Patch, network: WanDiT) -> None:
    rotate = dits.rotate

    def changed(x: Tensor, rope: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return rotate(pairs, rope, dtype).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    patch.setattr(dits, "rotate", changed)


def text_masked(patch: Patch, network: WanDiT) -> None:
    """Attention sees no text beyond the prompt's end."""

    def states(text: Tensor) -> dits.TextStates:
        embedded = network.text_embedding(text)
        return tuple(block.text_kv(embedded) for block in network.blocks)

    patch.setattr(network, "text_states", states)


def norm_per_head(patch: Patch, network: WanDiT) -> None:
    def changed(norm: RMSNorm, heads: int, x: Tensor) -> Tensor:
        split = x.unflatten(-1, (heads, -1))
        return F.rms_norm(split, split.shape[-1:], None, norm.eps).flatten(-2) * norm.weight

    for each in network.modules():
        if isinstance(each, Attention):
            for norm in (each.norm_q, each.norm_k):
                patch.setattr(norm, "forward", partial(changed, norm, each.heads))


def erf_in_feed_forward(patch: Patch, network: WanDiT) -> None:
    for block in network.blocks:
        patch.setattr(block.ffn[1], "approximate", "none")


def erf_in_text(patch: Patch, network: WanDiT) -> None:
    patch.setattr(network.text_embedding[1], "approximate", "none")


def with_eps(cls: type[nn.Module]) -> Any:
    def make(patch: Patch, network: WanDiT) -> None:
        for each in network.modules():
            if isinstance(each, cls):
                patch.setattr(each, "eps", 1e-5)

    return make


def float32_angles(patch: Patch, network: WanDiT) -> None:
    def changed(timestep: Tensor, size: int) -> Tensor:
        half = size // 2
        frequency = torch.pow(10000.0, -torch.arange(half).float() / half)
        angle = timestep.float().unsqueeze(-1) * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    patch.setattr(dits, "time_features", changed)


def rounded_weights(patch: Patch, network: WanDiT) -> None:
    for parameter in network.parameters():  # of a copy
        parameter.data = parameter.data.bfloat16().float()


def with_channels(order: Callable[[Tensor, int], list[Tensor]]) -> Any:
    """Let the transformer see its input's channels in another order."""

    def make(patch: Patch, network: WanDiT) -> None:
        forward, own = network.forward, network.config.out_dim
        patch.setattr(
            network, "forward", lambda x, *rest: forward(torch.cat(order(x, own), 1), *rest)
        )

    return make


def condition_first(x: Tensor, own: int) -> list[Tensor]:
    return [x[:, own:], x[:, :own]]


def mask_behind(x: Tensor, own: int) -> list[Tensor]:
    return [x[:, :own], x[:, own + 4 :], x[:, own : own + 4]]


def column_row_frame(t: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return t.unflatten(1, grid).permute(0, 3, 2, 1).flatten(1)


COMMON: dict[str, Any] = {
    "no rotary embedding": with_rope(no_turn),
    "height and width exchanged": with_rope(sides_exchanged),
    "pairs of two halves": half_split,
    "padding text masked": text_masked,
    "q/k norm per head": norm_per_head,
    "erf gelu in the feed-forward": erf_in_feed_forward,
    "erf gelu in the text embedding": erf_in_text,
    "q/k norm epsilon 1e-5": with_eps(RMSNorm),
    "layer norm epsilon 1e-5": with_eps(LayerNorm),
    "float32 angles": float32_angles,
    "weights rounded to bfloat16": rounded_weights,
}
OF_DITS: dict[str, dict[str, Any]] = {
    "dit_ti2v": {
        "the largest time for all tokens": with_times(
            lambda t, _: t.amax(1, keepdim=True).expand_as(t)
        ),
        "0 and t exchanged": with_times(lambda t, _: t.amax(1, keepdim=True) - t),
        "times by column, row, frame": with_times(column_row_frame),
        "times in the blocks only": with_last_time(Head),
        "times in the head only": with_last_time(Block),
        **COMMON,
    },
    "dit_i2v": {
        "condition before the latent": with_channels(condition_first),
        "mask behind the picture": with_channels(mask_behind),
        **COMMON,
    },
}
QUICK = {"the largest time for all tokens", "times in the blocks only", "mask behind the picture"}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        pytest.param(kind, *param.values, id=f"{kind}-{param.id}", marks=param.marks)
        for kind, mistakes in OF_DITS.items()
        if kind in DITS
        for param in marked(mistakes, QUICK)
    ],
)
def test_a_transformer_with_a_mistake(kind: str, make: Any, monkeypatch: Patch) -> None:
    name, manifest = next(iter(DITS[kind]["models"].items()))
    network = copy.deepcopy(dit(kind, name))

    def all_cases() -> None:
        for case in manifest["cases"]:
            for sample in range(case["batch"]):
                check_sample(network, manifest, case, sample)

    all_cases()
    make(monkeypatch, network)
    with pytest.raises(AssertionError, match="off by"):
        all_cases()


# --- the loops ---


def with_method(cls: type, name: str, change: Callable[..., Any]) -> Any:
    """Replace a method; the new one gets the old one before its own arguments."""

    def make(patch: Patch, kind: str, run: Json) -> None:
        patch.setattr(cls, name, partial_method(getattr(cls, name), change))

    return make


def partial_method(old: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: change(old, *args, **kwargs)


def held_only(wanted: Callable[[int, int], bool]) -> Any:
    """Put the first frame back at some of the times at which it is put back: (n-th, last)."""

    def make(patch: Patch, kind: str, run: Json) -> None:
        count, held = 0, FirstFrame.held

        def changed(self: FirstFrame, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return held(self, x) if wanted(count - 1, run["steps"]) else x

        patch.setattr(FirstFrame, "held", changed)

    return make


def unnormalised(patch: Patch, kind: str, run: Json) -> None:
    own, encode = vae(kind), vae(kind).encode_parts
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (own.config.latent_mean, own.config.latent_std)
    )
    patch.setattr(own, "encode_parts", lambda clip: encode(clip) * std + mean)


def with_fit(name: str, fit: Callable[[Picture, tuple[int, int]], Tensor]) -> Any:
    return lambda patch, kind, run: patch.setattr(conditioning, name, fit)


def as_values(pixels: Any) -> Tensor:
    return torch.tensor(np.asarray(pixels)).permute(2, 0, 1).float().div(127.5).sub(1)


def resized(picture: Picture, sides: tuple[int, int], how: int = Image.Resampling.LANCZOS) -> Any:
    return np.asarray(Image.fromarray(picture.pixels).resize(sides, how))


def covering(picture: Picture, size: tuple[int, int]) -> tuple[int, int]:
    scale = max(size[0] / picture.width, size[1] / picture.height)
    return round(picture.width * scale), round(picture.height * scale)


def cropped(pixels: Any, size: tuple[int, int], rounding: Callable[[float], int]) -> Any:
    (rows, columns), (width, height) = pixels.shape[:2], size
    left, top = rounding((columns - width) / 2), rounding((rows - height) / 2)
    return pixels[top : top + height, left : left + width]


def bicubic_then_crop(picture: Picture, size: tuple[int, int]) -> Tensor:
    pixels = resized(picture, covering(picture, size), Image.Resampling.BICUBIC)
    return as_values(cropped(pixels, size, math.floor))


def lanczos_of_floats(picture: Picture, size: tuple[int, int]) -> Tensor:
    sides = covering(picture, size)
    layers = [
        Image.fromarray(layer.astype(np.float32)).resize(sides, Image.Resampling.LANCZOS)
        for layer in np.moveaxis(picture.pixels, 2, 0)
    ]
    pixels = np.stack([np.asarray(layer) for layer in layers], 2)
    return as_values(cropped(pixels, size, math.floor))


def stretched(picture: Picture, size: tuple[int, int]) -> Tensor:
    return as_values(resized(picture, size))


def top_left(picture: Picture, size: tuple[int, int]) -> Tensor:
    pixels = resized(picture, covering(picture, size))
    return as_values(pixels[: size[1], : size[0]])


def offset_rounded_up(picture: Picture, size: tuple[int, int]) -> Tensor:
    return as_values(cropped(resized(picture, covering(picture, size)), size, math.ceil))


def crop_then_resize(picture: Picture, size: tuple[int, int]) -> Tensor:
    scale = max(size[0] / picture.width, size[1] / picture.height)
    part = round(size[0] / scale), round(size[1] / scale)
    pixels = cropped(picture.pixels, part, math.floor)
    return as_values(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def interpolated(**how: Any) -> Callable[[Picture, tuple[int, int]], Tensor]:
    def fit(picture: Picture, size: tuple[int, int]) -> Tensor:
        values = as_values(picture.pixels).unsqueeze(0)
        return F.interpolate(values, size=size[::-1], **how).squeeze(0)

    return fit


def by_pillow(how: int) -> Callable[[Picture, tuple[int, int]], Tensor]:
    return lambda picture, size: as_values(resized(picture, size, how))


def clamped(picture: Picture, size: tuple[int, int]) -> Tensor:
    return interpolated(mode="bicubic")(picture, size).clamp(-1, 1)


def more_guidance(patch: Patch, kind: str, run: Json) -> None:
    guide = velocities.guide
    patch.setattr(velocities, "guide", lambda c, u, scale: guide(c, u, scale + 1e-3))


def by_sigma(patch: Patch, kind: str, run: Json) -> None:
    patch.setattr(TextToVideo, "times", lambda self, step: torch.tensor([1000 * step.sigma]))
    patch.setattr(FirstFrame, "times", lambda self, step: torch.tensor([0, 1000 * step.sigma]))


def experts_exchanged(patch: Patch, kind: str, run: Json) -> None:
    high, low = parts(kind).models.values()
    patch.setattr(parts(kind), "models", {"high": low, "low": high})


def boundary(value: float) -> Any:
    def make(patch: Patch, kind: str, run: Json) -> None:
        asked = golden_family.request_of
        patch.setattr(
            golden_family, "request_of", lambda kind, run: replace(asked(kind, run), boundary=value)
        )

    return make


def above_the_boundary(patch: Patch, kind: str, run: Json) -> None:
    patch.setattr(
        timeline,
        "expert_at",
        lambda timestep, experts: next(e.name for e in experts if timestep > e.from_timestep),
    )


def with_y(change: Callable[[Tensor], Tensor]) -> Any:
    """Change the mask and the encoded picture, [1, 4 + z, T, H, W]."""

    def make(patch: Patch, kind: str, run: Json) -> None:
        of = golden_parts.conditioning_of

        def changed(*args: Any) -> TextToVideo:
            found = of(*args)
            return replace(found, y=change(found.y.clone())) if hasattr(found, "y") else found

        patch.setattr(golden_parts, "conditioning_of", changed)

    return make


def with_mask(change: Callable[[Tensor], Tensor]) -> Any:
    return with_y(lambda y: torch.cat((change(y[:, :4]), y[:, 4:]), 1))


def first_of_four(mask: Tensor) -> Tensor:
    return torch.cat((mask[:, :1], torch.zeros_like(mask[:, 1:])), 1)


def not_transposed(mask: Tensor) -> Tensor:
    return mask.transpose(1, 2).reshape(mask.shape)


def later_frames_zero(y: Tensor) -> Tensor:
    y[:, 4:, 1:] = 0
    return y


def black_clip(patch: Patch, kind: str, run: Json) -> None:
    clip = golden_parts.clip_parts

    def changed(*args: Any) -> Any:
        for number, part in enumerate(clip(*args)):
            yield part - 1 if number else part

    patch.setattr(golden_parts, "clip_parts", changed)


def only_with_the_prompt(patch: Patch, kind: str, run: Json) -> None:
    """The second of each two passes, without the prompt, sees no condition."""
    for model in parts(kind).models.values():
        calls = iter(range(10**6))
        forward, own = model.forward, model.config.out_dim

        def changed(
            x: Tensor, *rest: Any, calls: Any = calls, forward: Any = forward, own: int = own
        ) -> Tensor:
            if next(calls) % 2:
                x = torch.cat((x[:, :own], torch.zeros_like(x[:, own:])), 1)
            return forward(x, *rest)

        patch.setattr(model, "forward", changed)


OF_LOOPS: dict[str, dict[str, Any]] = {
    "ti2v": {
        "one time for all tokens": lambda patch, kind, run: (
            patch.setattr(FirstFrame, "times", TextToVideo.times),
            patch.setattr(FirstFrame, "runs", TextToVideo.runs),
        ),
        "first frame at t, all others at 0": with_method(
            FirstFrame,
            "runs",
            lambda old, self, grid: tuple((1 - row, n) for row, n in old(self, grid)),
        ),
        "first frame put in at the start only": held_only(lambda n, last: n == 0),
        "first frame not put back at the end": held_only(lambda n, last: n < last),
        "picture not normalised": unnormalised,
        "bicubic": with_fit("_cropped", bicubic_then_crop),
        "Lanczos on floats": with_fit("_cropped", lanczos_of_floats),
        "stretched": with_fit("_cropped", stretched),
        "cropped from the top left": with_fit("_cropped", top_left),
        "offset rounded up": with_fit("_cropped", offset_rounded_up),
        "cropped before it is resized": with_fit("_cropped", crop_then_resize),
        "time is 1000 sigma": by_sigma,
        "guidance 1e-3 larger": more_guidance,
    },
    "i2v": {
        "experts exchanged": experts_exchanged,
        "scales exchanged": with_method(
            CompleteRequest,
            "guidance",
            lambda old, self, expert, step: old(self, {"high": "low", "low": "high"}[expert], step),
        ),
        "guidance 1e-3 larger": more_guidance,
        "boundary 0.875": boundary(0.875),
        "only above the boundary": above_the_boundary,
        "condition before the latent": with_method(
            PictureChannels, "latent", lambda old, self, x: torch.cat((self.y, x), 1)
        ),
        "mask behind the picture": with_y(lambda y: torch.cat((y[:, 4:], y[:, :4]), 1)),
        "mask in the first channel only": with_mask(first_of_four),
        "mask inverted": with_mask(lambda mask: 1 - mask),
        "mask zero": with_mask(torch.zeros_like),
        "mask not transposed": with_mask(not_transposed),
        "later frames zero": with_y(later_frames_zero),
        "later frames black": black_clip,
        "picture not normalised": unnormalised,
        "no condition without the prompt": only_with_the_prompt,
        "antialiasing": with_fit("_stretched", interpolated(mode="bicubic", antialias=True)),
        "bicubic on bytes": with_fit("_stretched", by_pillow(Image.Resampling.BICUBIC)),
        "Lanczos on bytes": with_fit("_stretched", by_pillow(Image.Resampling.LANCZOS)),
        "bilinear": with_fit("_stretched", interpolated(mode="bilinear")),
        "aligned corners": with_fit("_stretched", interpolated(mode="bicubic", align_corners=True)),
        "clamped": with_fit("_stretched", clamped),
    },
}
QUICK_LOOPS = {
    "first frame put in at the start only",
    "first frame not put back at the end",
    "offset rounded up",
    "only above the boundary",
    "mask not transposed",
    "no condition without the prompt",
}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        pytest.param(kind, *param.values, id=f"{kind}-{param.id}", marks=param.marks)
        for kind, mistakes in OF_LOOPS.items()
        if kind in LOOPS
        for param in marked(mistakes, QUICK_LOOPS)
    ],
)
def test_a_loop_with_a_mistake(kind: str, make: Any) -> None:
    """One of the manifest's runs shows it."""
    with pytest.raises(AssertionError):
        for run in LOOPS[kind]["runs"]:
            with pytest.MonkeyPatch.context() as patch:
                make(patch, kind, run)
                found = walk(kind, run)
                check_pictures(kind, run, found)
                check_steps(kind, run, found)
