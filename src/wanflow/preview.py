"""Show what a run is becoming, while it is denoised: its latent as small pictures.

The channels of a latent are nearly linear in the colours of the pixels that they stand for, so one
matrix product makes a picture of them. Its factors are fitted by least squares, from clips drawn
here that the model's own VAE encodes: this takes any VAE, and a second for each.

A picture shows the data that the solver predicts, x0 = x - sigma v, since a sample x is noise until
the last steps.
"""

from __future__ import annotations

import io
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.conditioning import conditioning_of
from wanflow.config import RequestError
from wanflow.files import write_bytes
from wanflow.media import explained
from wanflow.models.vae import WanVAE
from wanflow.pipeline import Frames, Progress, to_uint8
from wanflow.presets import ModelSpec
from wanflow.remembered import Remembered
from wanflow.sampling.timeline import schedule_of
from wanflow.untrusted import user_path

if TYPE_CHECKING:
    from wanflow.api import Pipeline

logger = logging.getLogger("wanflow")

EVERY = 0.5  # seconds between two pictures
SIDE = 320  # pixels: the longer side of a picture, at most
SHOWN = 4  # frames in a PNG
GAP = 4  # pixels between them
KINDS = (".webp", ".png")
MARK, LARGEST = b"wanflow preview", 64 << 20  # what a preview holds, and more bytes than one has
CLIPS, CELLS, RIDGE = 16, 4, 1e-3  # of the fit
FIT = 1  # changes with what the fit gives


class Previewer:
    """Writes a picture of a run as its steps go: an `on_step` for `generate` and `resume`.

        with wanflow.Previewer(pipe, "preview.webp") as previewer:
            pipe.generate("a red circle moves left on a blue background", on_step=previewer)

    A .webp is animated; a .png shows up to four frames beside each other. The file is replaced as a
    whole, at most twice a second, by a thread: a step waits for a small copy off the GPU. One
    object serves one run after the other. What goes wrong here is logged once, and ends no run.

    Args:
        pipe: the model. Make the object before the run: the first one on a machine reads the VAE,
            which fits the factors. Of several processes only the first one makes it.
        file: the picture to write.
        show: called by the thread with the step and the frames, uint8 [t, h, w, 3].

    Raises:
        RequestError: for a file of another kind, or one that is in the way.
    """

    def __init__(
        self,
        pipe: Pipeline,
        file: str | os.PathLike[str],
        show: Callable[[Progress, Frames], None] | None = None,
    ) -> None:
        self.file = preview_file(file)
        self._spec, self._colours, self._show = pipe.spec, pipe.parts.colours(), show
        self._before: Progress | None = None
        self._drawn, self._failed = -math.inf, False
        self._thread = Thread()

    def __enter__(self) -> Previewer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, progress: Progress) -> None:
        """Take a finished step."""
        last, predicted = progress.step == progress.steps, progress.run.state.data
        before, self._before = self._before, None if last or predicted else progress
        if last:
            self.close()
        elif time.monotonic() - self._drawn < EVERY or self._thread.is_alive():
            return
        self._drawn = time.monotonic()
        try:
            latent = expected(progress, self._spec, before)
            if latent is None:
                return
            frames = frames_of(latent, self._colours)
        except Exception as error:
            return self._say(error)
        self._thread = Thread(target=self._write, args=(progress, frames), name="wanflow-preview")
        self._thread.start()
        if last:
            self.close()  # bars end after this step, and pictures stand above them

    def close(self) -> None:
        """Wait until the newest picture is written."""
        if self._thread.is_alive():
            self._thread.join()

    def _write(self, progress: Progress, frames: Frames) -> None:
        request = progress.run.request
        try:
            frames = scaled(frames, min(SIDE, max(request.size)))
            moving = self.file.suffix.lower() == ".webp"
            fps = request.fps / self._spec.vae.temporal_stride
            write_bytes(self.file, webp(frames, fps) if moving else strip(frames), overwrite=True)
            if self._show is not None:
                self._show(progress, frames)
        except Exception as error:
            self._say(error)

    def _say(self, error: Exception) -> None:
        if not self._failed:
            logger.warning("the preview %s is not written for now: %s", self.file, error)
        self._failed = True


def preview_file(file: str | os.PathLike[str]) -> Path:
    """Return the path of a preview.

    Raises:
        RequestError: for a file of another kind, and for one that is there and no preview.
    """
    path = user_path(file)
    if path.suffix.lower() not in KINDS:
        raise RequestError(f"{path}: a preview is .webp, animated, or .png; give it such a name")
    if os.path.lexists(path) and not _is_preview(path):
        raise RequestError(f"{path} exists and is no preview of wanflow; choose another name")
    return path


def _is_preview(path: Path) -> bool:
    with explained(path):
        return path.is_file() and path.stat().st_size < LARGEST and MARK in path.read_bytes()


def expected(progress: Progress, spec: ModelSpec, before: Progress | None) -> Tensor | None:
    """Return the final latent as the solver expects it after a step, [1, z, t, h, w].

    Euler keeps no prediction. Its steps are straight, so two samples tell it.

    Args:
        progress: the step.
        spec: the model.
        before: the step before, if it was seen.

    Returns:
        None where the expectation is not known.
    """
    run, x = progress.run, progress.latents
    if progress.step == progress.steps:
        return x
    if run.state.data:
        latent = run.state.data[0]
    else:
        if progress.step == 1:
            noise = conditioning_of(spec, run.request)
            origin = noise.start(run.request.seed, run.recipe.noise_device).to(x)
        elif before and (before.run.id, before.step) == (run.id, progress.step - 1):
            origin = before.latents
        else:
            return None
        sigmas = schedule_of(run.request).sigmas
        now, after = sigmas[progress.step - 1 : progress.step + 1]
        latent = origin - now * (x - origin) / (after - now)
    if spec.conditioning == "first_frame" and run.pictures:
        latent = torch.cat((x[:, :, :1], latent[:, :, 1:]), 2)  # it is given, not predicted
    return latent


def frames_of(latent: Tensor, colours: Tensor) -> Frames:
    """Return a latent [1, z, t, h, w] as frames of its own size, uint8 [t, h, w, 3].

    Args:
        latent: on any device.
        colours: the factors of the first latent frame and of the others, [2, z + 1, 3]; the last
            row is added.
    """
    each = colours.to(latent)[[0] + [1] * (latent.shape[2] - 1)]  # [t, z + 1, 3]
    seen = torch.einsum("zthw,tzc->cthw", latent[0], each[:, :-1])
    return to_uint8(seen + each[:, -1].T[..., None, None])


def scaled(frames: Frames, side: int) -> Frames:
    """Return frames smoothly scaled so that the longer side has so many pixels."""
    from PIL import Image

    height, width = frames.shape[1:3]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    made = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(picture, dtype=np.uint8) for picture in made])


def webp(frames: Frames, fps: float) -> bytes:
    """Return frames as a WebP, animated where there are several."""
    from PIL import Image

    first, *others = map(Image.fromarray, frames)
    data, each = io.BytesIO(), round(1000 / fps)
    moving = {"save_all": True, "append_images": others, "duration": each, "loop": 0}
    first.save(data, "WEBP", quality=80, method=0, xmp=MARK, **(moving if others else {}))
    return data.getvalue()


def strip(frames: Frames) -> bytes:
    """Return up to four frames, evenly spaced and beside each other, as a PNG."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    count = min(SHOWN, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    gap = np.full((frames.shape[1], GAP, 3), 32, np.uint8)
    beside = [part for number in chosen for part in (gap, frames[number])][1:]
    data, texts = io.BytesIO(), PngInfo()
    texts.add_text("Software", MARK.decode())
    Image.fromarray(np.concatenate(beside, 1)).save(data, "PNG", compress_level=1, pnginfo=texts)
    return data.getvalue()


# factors


def remembered_colours(
    folder: str | None, vae: str, z_dim: int, load: Callable[[], WanVAE]
) -> Tensor:
    """Return the factors of a VAE, fitted unless this machine has fitted them before.

    Args:
        folder: where they are remembered; None: nowhere.
        vae: tells the VAE from others.
        z_dim: its channels.
        load: returns it.
    """
    kept = Remembered(folder, "preview", FIT)
    try:
        colours = torch.tensor(kept.get(vae), dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        colours = torch.empty(0)
    if colours.shape != (2, z_dim + 1, 3) or not torch.isfinite(colours).all():
        colours = fit(load())
        kept.put(colours.tolist(), vae)
    return colours


@torch.no_grad()
def fit(vae: WanVAE) -> Tensor:
    """Return the factors of a VAE, [2, z + 1, 3] float32 on the CPU.

    The first latent frame stands for one frame and each other for four, so it has its own.
    """
    stride, space = vae.config.temporal_stride, vae.config.spatial_stride
    clips = drawn_clips(1 + stride, 4 * space)
    parameter = next(vae.parameters())
    latent = vae.encode(clips.to(parameter)).cpu()
    return least_squares(latent, pooled(clips, space))


def pooled(clips: Tensor, space: int) -> Tensor:
    """Return the mean colour of what each place of a latent of two frames stands for.

    Args:
        clips: [B, 3, 1 + n, H, W].
        space: pixels along each side of a place.
    """
    both = torch.stack((clips[:, :, 0], clips[:, :, 1:].mean(2)), 2)
    return F.avg_pool3d(both, (1, space, space))


def least_squares(latent: Tensor, colour: Tensor) -> Tensor:
    """Return the factors [2, z + 1, 3] of latents [B, z, 2, h, w] and colours [B, 3, 2, h, w].

    A little ridge holds channels that the clips hardly move near zero.
    """
    z, y = (one.double().permute(2, 0, 3, 4, 1).flatten(1, 3) for one in (latent, colour))
    z = F.pad(z, (0, 1), value=1.0)
    ridge = RIDGE * z.shape[1] * torch.eye(z.shape[2], dtype=z.dtype)
    return torch.linalg.solve(z.mT @ z + ridge, z.mT @ y).float()


def drawn_clips(frames: int, side: int) -> Tensor:
    """Draw the same clips each time: blobs of one colour glide over another, [B, 3, T, H, W]."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(1, *shape, generator=generator)

    def smooth(values: Tensor) -> Tensor:
        return F.interpolate(values, (2 * side, 2 * side), mode="bicubic", align_corners=False)

    clips = []
    for number in range(CLIPS):
        inside, outside = (
            smooth(2 * random(3, 1, 1) - 1 + 0.3 * random(1, 1, 1) * (2 * random(3, 3, 3) - 1))
            for _ in range(2)
        )
        cells = 2 + number % (CELLS - 1)
        blobs = (side * (smooth(random(1, cells, cells)) - 0.5)).clamp(-0.5, 0.5) + 0.5
        down, right = (round(float(4 * random() - 2)) for _ in range(2))
        covers = (blobs.roll((down * at, right * at), (2, 3)) for at in range(frames))
        pictures = [cover * inside + (1 - cover) * outside for cover in covers]
        clips.append(torch.stack(pictures, 2)[..., :side, :side].clamp(-1, 1))
    return torch.cat(clips)
