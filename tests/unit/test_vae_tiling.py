"""A tiled decode gives the full one's frames, and no layer sees more than a tile and its margin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.common import PROMPT
from torch import Tensor, nn

import wanflow
from wanflow.api import Pipeline
from wanflow.checkpoint.load import load_vae
from wanflow.config import RequestError, VAE22Config, VAEConfig
from wanflow.models.vae import ResidualBlock, Upsample, WanVAE, stream
from wanflow.models.vae22 import WanVAE22
from wanflow.opening import resolve
from wanflow.pipeline import Run, to_uint8
from wanflow.transforms import vae_tiling as tiling
from wanflow.transforms.vae_tiling import Box, Frames, decode_frames, halves, margins, tiles

# The published layers, with fewer channels.
DEEP = VAEConfig(dim=8, latent_mean=(0.1,) * 16, latent_std=(1.5,) * 16)
DEEP22 = VAE22Config(dim=4, dec_dim=8, z_dim=16, latent_mean=(0.1,) * 16, latent_std=(1.5,) * 16)
# Tiles change the shapes of convolutions and so the order of their sums: a few 1e-6 for values
# around 1 (2.7e-6 seen at most).
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}


def filled(vae: WanVAE) -> WanVAE:
    torch.manual_seed(0)
    for name, parameter in vae.requires_grad_(False).named_parameters():
        # Activations stay near one, and every pixel depends on all in reach.
        if parameter.ndim > 1 and "gamma" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return vae


@pytest.fixture(scope="module")
def deep() -> WanVAE:
    return filled(WanVAE(DEEP))


@pytest.fixture(scope="module", params=["Wan2.1", "Wan2.2"])
def either(request: pytest.FixtureRequest, deep: WanVAE) -> WanVAE:
    return deep if request.param == "Wan2.1" else filled(WanVAE22(DEEP22))


@pytest.fixture(scope="module")
def finished(nano: Pipeline) -> Run:
    """A clip of nano's, larger than a tile and not square."""
    request = wanflow.Request(PROMPT, size=(208, 144), frame_num=9, sample_steps=6, seed=3)
    return nano.resume(nano.begin(request))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def full(vae: WanVAE, latent: Tensor) -> Tensor:
    return vae.decode(latent)


def tiled(vae: WanVAE, latent: Tensor, tile: int) -> Tensor:
    """The video that `decode_frames` would round, put together again from what it hands to
    `convert`.
    """
    steps, height, width = latent.shape[2:]
    parts: list[Tensor] = []

    def convert(part: Tensor) -> Frames:
        parts.append(part)
        return to_uint8(part)

    frames = np.concatenate(list(decode_frames(vae, latent, tile, convert)))
    scale = vae.config.spatial_stride
    video = parts[0].new_empty(1, 3, len(frames), height * scale, width * scale)
    for number, box in enumerate(tiles(vae.config, height * scale, width * scale, tile)):
        target = box.times(scale)
        video[..., target.top : target.bottom, target.left : target.right] = torch.cat(
            parts[number * steps : (number + 1) * steps], dim=2
        )
    assert np.array_equal(frames, to_uint8(video))
    return video


def psnr(a: Tensor, b: Tensor) -> float:
    """dB, of videos in -1..1."""
    return float(-10 * torch.log10(((a.double() - b.double()).clamp(-2, 2) / 2).square().mean()))


@pytest.mark.slow
@pytest.mark.parametrize("tile", [64, 72, 100, 136, 4096])
def test_a_video_is_the_same_in_tiles(nano: Pipeline, finished: Run, tile: int) -> None:
    vae, latent = load_vae(resolve("nano")), finished.state.x
    torch.testing.assert_close(tiled(vae, latent, tile), full(vae, latent), **ROUNDING)
    frames = np.concatenate(list(decode_frames(vae, latent, tile, to_uint8))).astype(int)
    apart = np.abs(frames - np.concatenate(list(nano.frames(finished))))
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 9, 21), (2, 24, 8), (3, 11, 19), (2, 33, 3)])
@pytest.mark.parametrize("tile", [64, 88])
def test_the_published_layers_are_the_same_in_tiles(
    either: WanVAE, shape: tuple[int, int, int], tile: int
) -> None:
    latent = randn(1, 16, *shape)
    before = latent.clone()
    expected = full(either, latent)
    assert expected.std() > 0.1
    torch.testing.assert_close(tiled(either, latent, tile), expected, **ROUNDING)
    assert torch.equal(latent, before)


def test_one_tile_is_the_full_decode(either: WanVAE) -> None:
    latent = randn(1, 16, 3, 10, 8)
    assert torch.equal(
        tiled(either, latent, 10 * either.config.spatial_stride), full(either, latent)
    )


@pytest.mark.parametrize("shape", [(1, 8, 9), (3, 6, 5)])
def test_stages_with_a_shortcut_are_exact_in_tiles(shape: tuple[int, int, int]) -> None:
    """In float64 no pixel hides in rounding; boxes begin at odd pixels of a doubled image too."""
    vae = filled(WanVAE22(DEEP22).double())
    latent = randn(1, 16, *shape)
    expected = full(vae, latent)
    assert expected.std() > 0.1 and len(tiles(vae.config, shape[1] * 16, shape[2] * 16, 64)) > 3
    assert (tiled(vae, latent, 64) - expected).abs().max() < 1e-13


def test_a_shortcut_that_is_not_trimmed_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latent = filled(WanVAE22(DEEP22).double()), randn(1, 16, 1, 16, 4)
    expected = full(vae, latent)

    def first_rows(
        self: tiling.TrimmedRepeats, x: Tensor, state: dict[nn.Module, Tensor]
    ) -> Tensor:
        kept = self.shortcut.part(x, state)
        space = self.shortcut.space
        return self.shortcut.add(x, kept[..., : x.shape[-2] // space, : x.shape[-1] // space])

    assert (tiled(vae, latent, 64) - expected).abs().max() < 1e-13
    monkeypatch.setattr(tiling.TrimmedRepeats, "forward", first_rows)
    assert (tiled(vae, latent, 64) - expected).abs().max() > 1e-3


def test_bfloat16(deep: WanVAE) -> None:
    torch.manual_seed(0)
    low = WanVAE(DEEP).to(torch.bfloat16).requires_grad_(False)
    low.load_state_dict(deep.state_dict())
    latent = randn(1, 16, 2, 16, 20)
    assert psnr(tiled(low, latent, 64), full(low, latent)) > 50


def test_frames_come_in_the_order_of_time(either: WanVAE) -> None:
    reports: list[tuple[int, int]] = []
    scale = either.config.spatial_stride
    latent, size = randn(1, 16, 3, 16 * 8 // scale, 20 * 8 // scale), (128, 160, 3)
    chunks = list(decode_frames(either, latent, 80, to_uint8, lambda *part: reports.append(part)))
    assert [chunk.shape for chunk in chunks] == [(1, *size), (4, *size), (4, *size)]
    assert all(chunk.dtype == np.uint8 for chunk in chunks)
    assert reports == [(done, 12) for done in range(1, 13)]
    ours, theirs = np.concatenate(chunks), to_uint8(full(either, latent))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert not np.array_equal(ours[1:5], ours[5:])


def narrowed(number: int) -> Callable[[list[nn.Module]], list[int]]:
    """`margins`, with one of them a pixel smaller; those after it no larger than what is there
    then.
    """

    def found(layers: list[nn.Module]) -> list[int]:
        needed = margins(layers)
        needed[number] -= 1
        for place in range(number, len(layers)):
            needed[place + 1] = min(
                needed[place + 1], needed[place] * (2 if isinstance(layers[place], Upsample) else 1)
            )
        return needed

    return found


@pytest.fixture(scope="module")
def exact(deep: WanVAE) -> tuple[WanVAE, Tensor, Tensor]:
    """A VAE in float64, where rounding does not hide how little the outermost pixel tells; a latent
    and its video.
    """
    vae = WanVAE(DEEP).double().requires_grad_(False)
    vae.load_state_dict(deep.state_dict())
    latent = randn(1, 16, 1, 18, 18)
    return vae, latent, full(vae, latent)


@pytest.mark.parametrize("number", range(15))
def test_a_smaller_margin_shows(
    exact: tuple[WanVAE, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    vae, latent, expected = exact
    assert (tiled(vae, latent, 64) - expected).abs().max() < 1e-13
    monkeypatch.setattr(tiling, "margins", narrowed(number))
    assert (tiled(vae, latent, 64) - expected).abs().max() > 1e-10


def test_margins_are_what_the_layers_see(deep: WanVAE) -> None:
    """The gradient of a box says from where it was made; nothing is known of kernels here."""
    layers = halves(deep)[1]
    box = Box(10, 12, 11, 14)
    features = randn(1, 32, 1, 24, 24).requires_grad_(True)
    target = box.times(8)
    part = torch.cat(list(stream(layers, features, {})), dim=2)[
        ..., target.top : target.bottom, target.left : target.right
    ]
    (gradient,) = torch.autograd.grad(part.square().sum(), features)
    seen = gradient.abs().sum(dim=(0, 1, 2)) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert box.grown(margins(layers)[0], 24, 24) == Box(
        int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    )


def test_margins_of_the_published_model() -> None:
    with torch.device("meta"):
        layers = halves(WanVAE(VAEConfig()))[1]
    found = margins(layers)
    assert found[0] == 7 and found[-1] == 0
    assert [
        value for value, layer in zip(found, layers, strict=False) if isinstance(layer, Upsample)
    ] == [7, 6, 4]


def test_no_layer_sees_more_than_a_tile(deep: WanVAE) -> None:
    """At any size of the video: what a decode holds is bounded by the tile."""
    layers = halves(deep)[1]
    scale, sides = 1, {}
    for layer, margin in zip(layers, margins(layers), strict=False):
        sides[layer] = 8 * scale + 2 * margin
        scale *= 2 if isinstance(layer, Upsample) else 1
    seen: dict[nn.Module, tuple[int, int]] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[layer] = max(seen.get(layer, (0, 0)), (args[0].shape[-2], args[0].shape[-1]))

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    list(decode_frames(deep, randn(1, 16, 2, 40, 32), 64, to_uint8))
    for handle in handles:
        handle.remove()
    assert seen == {layer: (side, side) for layer, side in sides.items()}
    assert any(isinstance(layer, ResidualBlock) for layer in seen)


@pytest.mark.parametrize("tile", [64, 65, 100, 256, 5000])
@pytest.mark.parametrize(("height", "width"), [(720, 1280), (480, 832), (64, 64), (16, 1280)])
def test_tiles_cover_a_frame_once(height: int, width: int, tile: int) -> None:
    boxes = tiles(VAEConfig(), height, width, tile)
    covered = np.zeros((height, width), dtype=int)
    for box in (box.times(8) for box in boxes):
        assert 0 < box.bottom - box.top <= tile and 0 < box.right - box.left <= tile
        covered[box.top : box.bottom, box.left : box.right] += 1
    assert (covered == 1).all()
    side = tile // 8 * 8
    assert len(boxes) == -(-height // side) * -(-width // side)


@pytest.mark.parametrize("tile", [-8, 0, 1, 63])
def test_a_tile_too_small_is_refused(deep: WanVAE, tile: int) -> None:
    with pytest.raises(RequestError, match=f"vae_tile {tile} is too small.*64 or more"):
        next(decode_frames(deep, randn(1, 16, 1, 8, 8), tile, to_uint8))


@pytest.mark.parametrize(
    "shape", [(16, 1, 8, 8), (2, 16, 1, 8, 8), (1, 15, 1, 8, 8), (1, 16, 0, 8, 8)]
)
def test_another_shape_is_refused(deep: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="latent is"):
        next(decode_frames(deep, randn(*shape), 64, to_uint8))


def test_convert_and_on_part_can_end_it(deep: WanVAE) -> None:
    class Enough(Exception):
        pass

    def refuse(part: Tensor) -> Frames:
        raise Enough

    reports: list[int] = []

    def stop(done: int, _: int) -> None:
        reports.append(done)
        if done == 3:
            raise Enough

    latent = randn(1, 16, 1, 16, 16)
    with pytest.raises(Enough):
        list(decode_frames(deep, latent, 64, refuse))
    with pytest.raises(Enough):
        list(decode_frames(deep, latent, 64, to_uint8, stop))
    assert reports == [1, 2, 3]
