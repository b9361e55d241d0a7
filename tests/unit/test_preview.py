"""Previews: what they show, how they are written, and the fit of their factors."""

from __future__ import annotations

import io
import logging
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.common import PROMPT, filled, refusal
from PIL import Image
from torch import Tensor

import wanflow
from wanflow import preview
from wanflow.checkpoint.load import load_vae, vae_of
from wanflow.config import VAE22Config
from wanflow.models.vae import WanVAE
from wanflow.opening import resolve
from wanflow.pipeline import Frames, Progress
from wanflow.preview import Previewer, expected, frames_of
from wanflow.train import toy

RUN: dict[str, Any] = {"frame_num": 5, "sample_steps": 6, "seed": 7}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> wanflow.Pipeline:
    return wanflow.load("nano", device="cpu", machine_cache=str(tmp_path_factory.mktemp("kept")))


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return load_vae(resolve("nano"))


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "EVERY", 0.0)


class Joined(Previewer):
    """Waits for each picture."""

    def __call__(self, progress: Progress) -> None:
        super().__call__(progress)
        self.close()


def small(frames: Frames) -> npt.NDArray[np.float64]:
    """The mean colour of what each place of a latent stands for: [5, H, W, 3] -> [2, h, w, 3]."""
    both = np.stack([frames[0], frames[1:].astype(np.float64).mean(0)])
    height, width = frames.shape[1:3]
    return both.reshape(2, height // 8, 8, width // 8, 8, 3).mean((2, 4))


def psnr(a: Any, b: Any) -> float:
    return float(10 * np.log10(255**2 / np.square(np.asarray(a, float) - b).mean()))


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_a_preview_sharpens_over_the_steps(pipe: wanflow.Pipeline, solver: str) -> None:
    """It is nearer to the video than the noisy sample is, from the first step on."""
    colours, clean, noisy = pipe.parts.colours(), list[Frames](), list[Frames]()
    before: Progress | None = None

    def on_step(progress: Progress) -> None:
        nonlocal before
        latent = expected(progress, pipe.spec, before)
        assert latent is not None
        clean.append(frames_of(latent, colours))
        noisy.append(frames_of(progress.latents, colours))
        before = progress

    video = pipe.generate(PROMPT, on_step, sample_solver=solver, **RUN)  # type: ignore[arg-type]
    final = small(video.frames)
    gains = [psnr(one, final) for one in clean]
    assert gains[-1] > 17 and gains[-1] > gains[0] + 3
    assert all(later > earlier - 0.7 for earlier, later in pairwise(gains))
    assert all(
        psnr(one, final) > psnr(other, final) + 2
        for one, other in zip(clean[:-1], noisy[:-1], strict=True)
    )


def test_the_fit_is_about_as_good_as_one_on_the_world_of_nano(vae: WanVAE) -> None:
    """R^2 on clips that neither has seen: 0.94 of the run-time fit, 0.96 of the world's."""

    def world(seed: int, count: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(seed)
        clips = [toy.render(toy.sample_scene(rng), rng, 17)[:, :5] for _ in range(count)]
        both = torch.stack(clips)
        with torch.no_grad():
            return vae.encode(both), preview.pooled(both, 8)

    def explained(colours: Tensor, latent: Tensor, colour: Tensor) -> float:
        made = torch.einsum("bzthw,tzc->bcthw", latent, colours[:, :-1])
        wrong = made + colours[:, -1].T[..., None, None] - colour
        around = colour - colour.mean((0, 2, 3, 4), keepdim=True)
        return float(1 - wrong.square().sum() / around.square().sum())

    unseen = world(2, 24)
    ours = explained(preview.fit(vae), *unseen)
    best = explained(preview.least_squares(*world(1, 48)), *unseen)
    print(f"R^2 {ours:.3f}, {best:.3f}")
    assert best > 0.94 and ours > best - 0.03, (ours, best)


def test_the_factors_are_fitted_once_a_machine(vae: WanVAE, tmp_path: Path) -> None:
    loads = []

    def load() -> WanVAE:
        loads.append(1)
        return vae

    first = preview.remembered_colours(str(tmp_path), "a", 16, load)
    again = preview.remembered_colours(str(tmp_path), "a", 16, load)
    assert first.shape == (2, 17, 3) and torch.equal(first, again) and len(loads) == 1
    preview.remembered_colours(str(tmp_path), "another VAE", 16, load)
    assert len(loads) == 2
    (file,) = tmp_path.glob("*.json")
    file.write_text(file.read_text().replace("[", '["no number", ', 3))
    assert torch.equal(preview.remembered_colours(str(tmp_path), "a", 16, load), first)
    assert len(loads) == 3


@pytest.mark.usefixtures("every_step")
def test_a_webp_moves_and_a_png_stands(pipe: wanflow.Pipeline, tmp_path: Path) -> None:
    wide, high = {"size": (96, 64)}, {"size": (64, 96)}
    for name, asked, size, count in (
        ("a.webp", wide, (96, 64), 2),
        ("a.png", wide, (2 * 96 + preview.GAP, 64), 1),
        ("b.png", {**high, "frame_num": 1}, (64, 96), 1),
        ("c.webp", {**high, "frame_num": 1}, (64, 96), 1),
    ):
        with Joined(pipe, tmp_path / name) as previewer:
            pipe.generate(PROMPT, previewer, **{**RUN, **asked, "sample_steps": 2})  # type: ignore[arg-type]
        with Image.open(tmp_path / name) as picture:
            assert picture.size == size and getattr(picture, "n_frames", 1) == count
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.png",
        "a.webp",
        "b.png",
        "c.webp",
    ]


def test_a_large_preview_is_small(tmp_path: Path) -> None:
    frames = preview.scaled(np.zeros((21, 90, 160, 3), np.uint8), preview.SIDE)
    assert frames.shape == (21, 180, 320, 3)
    with Image.open(io.BytesIO(preview.strip(frames))) as picture:
        assert picture.size == (4 * 320 + 3 * preview.GAP, 180)


def test_pictures_are_at_most_two_a_second(
    pipe: wanflow.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, shown = [100.0], list[Frames]()
    monkeypatch.setattr("wanflow.preview.time.monotonic", lambda: now[0])
    previewer = Joined(pipe, tmp_path / "a.png", lambda _, frames: shown.append(frames))

    def on_step(progress: Progress) -> None:
        now[0] += 0.2
        previewer(progress)

    pipe.generate(PROMPT, on_step, **RUN)
    assert len(shown) == 3  # steps 1 and 4, and the last one
    assert shown[0].dtype == np.uint8 and shown[0].shape == (2, 64, 64, 3)


@pytest.mark.usefixtures("every_step")
def test_a_preview_changes_no_bit_of_a_video(pipe: wanflow.Pipeline, tmp_path: Path) -> None:
    plain = pipe.generate(PROMPT, **RUN)
    with Previewer(pipe, tmp_path / "a.webp") as previewer:
        seen = pipe.generate(PROMPT, previewer, **RUN)
    assert np.array_equal(plain.frames, seen.frames)


@pytest.mark.usefixtures("every_step")
def test_what_goes_wrong_is_logged_once_and_ends_no_run(
    pipe: wanflow.Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "wanflow"), Joined(pipe, tmp_path / "a.png") as previewer:
        (tmp_path / "a.png").mkdir()
        assert len(pipe.generate(PROMPT, previewer, **RUN).frames) == 5
    (record,) = [one for one in caplog.records if "preview" in one.message]
    assert str(tmp_path / "a.png") in record.message


def test_euler_takes_two_steps_of_one_run(pipe: wanflow.Pipeline) -> None:
    """A run that goes on shows nothing before its second step, rather than a wrong picture."""
    steps = list[Progress]()
    pipe.generate(PROMPT, steps.append, sample_solver="euler", **RUN)
    third, fourth = steps[2], steps[3]
    assert expected(fourth, pipe.spec, third) is not None
    assert expected(fourth, pipe.spec, None) is None
    assert expected(fourth, pipe.spec, steps[1]) is None
    assert expected(fourth, pipe.spec, replace(third, run=replace(third.run, id="0" * 16))) is None


def test_a_given_first_frame_is_shown_as_it_is(pipe: wanflow.Pipeline) -> None:
    """Its prediction means nothing: the model is told that it is clean."""
    steps = list[Progress]()
    pipe.generate(PROMPT, steps.append, **RUN)
    given = replace(steps[1].run, pictures={"first": torch.zeros(3, 64, 64)})
    spec = replace(pipe.spec, conditioning="first_frame")
    made = expected(replace(steps[1], run=given), spec, None)
    data = steps[1].run.state.data[0]
    assert made is not None
    assert torch.equal(made[:, :, 0], steps[1].latents[:, :, 0])
    assert torch.equal(made[:, :, 1:], data[:, :, 1:])


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("kind", ["webp", "png"])
def test_only_a_preview_is_replaced(pipe: wanflow.Pipeline, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    for seed in (1, 2):
        with Previewer(pipe, file) as previewer:
            pipe.generate(PROMPT, previewer, **{**RUN, "seed": seed, "sample_steps": 1})  # type: ignore[arg-type]
        made = file.read_bytes()
    Image.new("RGB", (8, 8)).save(file)
    theirs = file.read_bytes()
    assert theirs != made and "no preview" in refusal(lambda: Previewer(pipe, file))
    assert file.read_bytes() == theirs
    assert ".webp" in refusal(lambda: Previewer(pipe, "a.gif"))


def test_the_fit_takes_the_vae_of_48_channels() -> None:
    """Its weights are random, and it has strides and channels of its own."""
    config = VAE22Config(dim=8, dec_dim=8, num_res_blocks=1)
    colours = preview.fit(filled(vae_of(config).to_empty(device="cpu"), 0))
    assert colours.shape == (2, 49, 3) and torch.isfinite(colours).all()
    assert frames_of(torch.randn(1, 48, 3, 4, 6), colours).shape == (3, 4, 6, 3)


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_every_step_of_every_solver_is_drawn(
    pipe: wanflow.Pipeline, tmp_path: Path, solver: Any
) -> None:
    shown = list[int]()
    with Joined(pipe, tmp_path / "a.png", lambda step, _: shown.append(step.step)) as previewer:
        for _ in range(2):
            pipe.generate(PROMPT, previewer, **{**RUN, "sample_solver": solver, "sample_steps": 3})  # type: ignore[arg-type]
    assert shown == [1, 2, 3, 1, 2, 3]
