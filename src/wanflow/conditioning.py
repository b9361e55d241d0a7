"""Say what is denoised, and what the model sees of it at each step.

Three ways, one for each kind of model. With text alone the latent begins as noise, and all tokens
have one time. With picture channels (I2V-A14B) the model sees, beside the latent, a mask and the
encoded pictures. With a first frame (TI2V-5B) the first latent frame is the picture, at time 0.

Source: the official pipelines, but for the last picture, which only diffusers has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.geometry import Size, geometry_of
from wanflow.presets import ModelSpec
from wanflow.request import CompleteRequest, Picture, Request
from wanflow.sampling.schedule import Step

# A run's pictures as the VAE takes them, [3, H, W] float32; "first", "last" or both.
Pictures = Mapping[str, Tensor]


@dataclass(frozen=True)
class TextToVideo:
    """A video of a prompt; `shape` is the latent's (C, T, H, W)."""

    shape: tuple[int, int, int, int]

    def start(self, seed: int, device: str) -> Tensor:
        """Return the noise of a seed, [1, C, T, H, W] float32, drawn on `device`."""
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(self.shape, generator=generator, device=device).unsqueeze(0)

    def times(self, step: Step) -> Tensor:
        """Return the times of a step, [U], on the CPU: the device would have to be waited for."""
        return torch.tensor([step.timestep])

    def runs(self, grid: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
        """Return (which time, how many tokens have it), in order; () where there is one for all."""
        return ()

    def latent(self, x: Tensor) -> Tensor:
        """Return what the model sees of a sample, [B, C, T, H, W]."""
        return x

    def held(self, x: Tensor) -> Tensor:
        """Return a sample with what is not denoised put back."""
        return x


@dataclass(frozen=True)
class PictureChannels(TextToVideo):
    """A video of pictures, which stand in further channels: y is [1, 4 + z, T, H, W]."""

    y: Tensor

    def latent(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.y), 1)


@dataclass(frozen=True)
class FirstFrame(TextToVideo):
    """A video that goes on from a picture: its first latent frame is `first`, [1, C, 1, H, W]."""

    first: Tensor

    def times(self, step: Step) -> Tensor:
        return torch.tensor([0.0, step.timestep])

    def runs(self, grid: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
        frames, rows, columns = grid
        return (0, rows * columns), (1, (frames - 1) * rows * columns)

    def held(self, x: Tensor) -> Tensor:
        return torch.cat((self.first, x[:, :, 1:]), 2)


def conditioning_of(
    spec: ModelSpec, request: CompleteRequest, encoded: Tensor | None = None
) -> TextToVideo:
    """Return what is denoised for a request.

    Args:
        spec: the model.
        request: what is asked for.
        encoded: the normalised latent of `clip_parts`; None: without pictures, or for the noise.
    """
    shape = geometry_of(spec).latent_shape(request.size, request.frame_num)
    if encoded is None:
        return TextToVideo(shape)
    if spec.conditioning == "first_frame":
        return FirstFrame(shape, encoded)
    given = torch.zeros(1, 1, request.frame_num + 3, *shape[2:], device=encoded.device)
    # The first latent frame stands for one frame, and counts four times.
    given[:, :, :4] = request.image is not None
    given[:, :, -1] += request.last_image is not None
    mask = given.unflatten(2, (shape[1], 4)).transpose(2, 3).flatten(1, 2)
    return PictureChannels(shape, torch.cat((mask, encoded), 1))


def encoded_shape(spec: ModelSpec, request: CompleteRequest) -> tuple[int, ...]:
    """Return the shape of the latent of `clip_parts`."""
    channels, frames, *sides = geometry_of(spec).latent_shape(request.size, request.frame_num)
    return 1, channels, 1 if spec.conditioning == "first_frame" else frames, *sides


def clip_parts(spec: ModelSpec, request: CompleteRequest, pictures: Pictures) -> Iterator[Tensor]:
    """Yield the clip that the VAE encodes, [1, 3, n, H, W]: one frame, then groups of four.

    Frames between the pictures are grey. A model that holds its first frame encodes only that.
    """
    width, height = request.size
    grey = torch.zeros(1, 3, 1, height, width)
    first, last = (
        grey if picture is None else picture.view_as(grey)
        for picture in (pictures.get("first"), pictures.get("last"))
    )
    yield first
    if spec.conditioning == "first_frame":
        return
    step = geometry_of(spec).frame_step
    groups = (request.frame_num - 1) // step
    for group in range(groups):
        frames = grey.expand(-1, -1, step, -1, -1)
        yield torch.cat((frames[:, :, 1:], last), 2) if group == groups - 1 else frames


def prepared(spec: ModelSpec, request: Request, size: Size) -> dict[str, Tensor]:
    """Return the opened pictures of a request at a video's size, as the model's VAE takes them."""
    request.refuse_pictures(spec)
    named = {"first": request.image, "last": request.last_image}
    fit = _cropped if spec.conditioning == "first_frame" else _stretched
    return {name: fit(one, size) for name, one in named.items() if isinstance(one, Picture)}


def _values(pixels: Any) -> Tensor:
    """Uint8 [H, W, 3] -> [3, H, W] float32 in -1..1."""
    return torch.tensor(pixels).permute(2, 0, 1).float().div_(255).sub_(0.5).div_(0.5)


def _stretched(picture: Picture, size: Size) -> Tensor:
    """Resize both sides by bicubic interpolation; what overshoots -1..1 stays."""
    rows = _values(picture.pixels).unsqueeze(0).contiguous()
    return F.interpolate(rows, size=size[::-1], mode="bicubic").squeeze(0)


def _cropped(picture: Picture, size: Size) -> Tensor:
    """Resize until both sides suffice, by Pillow's Lanczos on bytes; crop the middle."""
    import numpy as np
    from PIL import Image

    width, height = size
    scale = max(width / picture.width, height / picture.height)
    sides = round(picture.width * scale), round(picture.height * scale)
    resized = np.asarray(Image.fromarray(picture.pixels).resize(sides, Image.Resampling.LANCZOS))
    left, top = (sides[0] - width) // 2, (sides[1] - height) // 2
    return _values(resized[top : top + height, left : left + width])
