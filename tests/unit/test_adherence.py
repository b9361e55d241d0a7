"""The adherence metric: exact on true clips, unimpressed by wrong ones, and fair to blurry ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.screen import Screen
from wanflow.train import adherence, toy
from wanflow.train.adherence import Frames, Reading, Tally
from wanflow.train.toy import Scene


def frames_of(clip: Tensor) -> Frames:
    pixels = ((clip + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    frames: Frames = pixels.permute(1, 2, 3, 0).contiguous().numpy()
    return frames


def painted(cover: Tensor, scene: Scene) -> Frames:
    return frames_of(toy.paint(cover, toy.COLOURS[scene.colour], toy.BACKGROUNDS[scene.background]))


def blurred(clip: Tensor, sigma: float) -> Tensor:
    """[3, T, H, W] with every frame convolved with a gaussian of `sigma` pixels."""
    reach = int(4 * sigma + 1)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = F.pad(clip.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    across = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return across[:, 0].view(clip.shape)


def tally_of(
    count: int,
    seed: int,
    frames: int = 17,
    side: int = 64,
    spoil: Callable[[Tensor], Tensor] = lambda clip: clip,
) -> tuple[Tally, list[tuple[Scene, Reading | None]]]:
    rng, tally, pairs = random.Random(seed), Tally(), []
    for _ in range(count):
        scene = toy.sample_scene(rng, None)
        reading = adherence.read(frames_of(spoil(toy.render(scene, rng, frames, side))))
        tally.add(reading, scene)
        pairs.append((scene, reading))
    return tally, pairs


@pytest.fixture(scope="module")
def truth() -> tuple[Tally, list[tuple[Scene, Reading | None]]]:
    torch.set_num_threads(1)
    return tally_of(320, seed=1)


def shares(tally: Tally) -> dict[str, float]:
    return {name: tally.right[name] / tally.clips for name in adherence.JUDGED}


@pytest.mark.slow
def test_true_clips_are_read_right(truth: tuple[Tally, list[tuple[Scene, Reading | None]]]) -> None:
    share = shares(truth[0])
    assert all(share[slot] > 0.99 for slot in ("background", "colour", "shape", "motion")), share
    assert (
        share["all"] > 0.98
        and share["strict"] > 0.98
        and share["size"] > 0.95
        and share["speed"] > 0.9
    ), share
    readings = [reading for _, reading in truth[1] if reading is not None]
    assert max(max(reading.colour_error, reading.background_error) for reading in readings) < 2


@pytest.mark.parametrize(
    ("frames", "side", "count"), [(25, 96, 40), (5, 48, 40), (17, 128, 20), (9, 200, 10)]
)
def test_other_sizes_and_lengths(frames: int, side: int, count: int) -> None:
    share = shares(tally_of(count, seed=2, frames=frames, side=side)[0])
    assert (
        share["all"] > 0.98
        and share["strict"] > 0.98
        and share["size"] > 0.95
        and share["speed"] > 0.9
    ), share


def test_objects_cut_by_the_edge_keep_their_course() -> None:
    rng = random.Random(3)
    for shape in toy.SHAPES:
        for motion in toy.DIRECTIONS:
            scene = Scene("red", "black", shape, motion, "large", "fast")
            course = toy.draw(scene, rng, 17)
            course[:, :2] += 0.06 * torch.tensor(
                toy.DIRECTIONS[motion]
            )  # further out than any clip in training
            reading = adherence.read(painted(toy.coverage(shape, course, 64), scene))
            assert reading is not None and adherence.compare(reading, scene)["strict"], (
                scene,
                reading,
            )
            assert (reading.size, reading.speed) == ("large", "fast"), (scene, reading)
            assert reading.radius == pytest.approx(float(course[0, 2]), rel=0.03), scene


def test_captions_of_other_clips_score_chance(
    truth: tuple[Tally, list[tuple[Scene, Reading | None]]],
) -> None:
    scenes, readings = zip(*truth[1], strict=True)
    wrong = Tally()
    for shift in (1, 7, 31):
        for scene, reading in zip(scenes, readings[shift:] + readings[:shift], strict=True):
            wrong.add(reading, scene)
    share = shares(wrong)
    chance = {
        "background": 0.125,
        "colour": 0.125,
        "shape": 0.2,
        "motion": 0.125,
        "size": 0.375,
        "speed": 0.42,
    }
    assert all(abs(share[slot] - expected) < 0.05 for slot, expected in chance.items()), share
    assert share["all"] < 0.01 and share["strict"] < 0.01


def test_one_wrong_word_is_noticed(truth: tuple[Tally, list[tuple[Scene, Reading | None]]]) -> None:
    for scene, reading in truth[1][:100]:
        others = {
            "colour": toy.COLOURS,
            "background": toy.BACKGROUNDS,
            "shape": toy.SHAPES,
            "motion": toy.MOTIONS,
            "size": toy.SIZES,
        }
        for slot, values in others.items():
            for value in values:
                if value != getattr(scene, slot):
                    judged = adherence.compare(reading, Scene(**(vars(scene) | {slot: value})))
                    assert not judged[slot] and judged["all"] == (slot == "size")


def test_blur_is_forgiven_until_the_shape_is_gone() -> None:
    share = shares(tally_of(100, seed=4, spoil=lambda clip: blurred(clip, 1.0))[0])
    assert share["all"] > 0.95 and share["strict"] > 0.95, share
    _, pairs = tally_of(20, seed=5, spoil=lambda clip: blurred(clip, 5.0))
    assert not any(
        adherence.compare(reading, scene)["strict"]
        for scene, reading in pairs
        if scene.shape in ("star", "cross")
    )


@pytest.mark.parametrize("noise", ["pixels", "low frequencies"])
def test_noise_as_of_a_decoder_is_forgiven(noise: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def spoil(clip: Tensor) -> Tensor:
        if noise == "pixels":
            return clip + 0.08 * torch.randn(clip.shape, generator=generator)
        coarse = torch.randn(1, 3, 5, 8, 8, generator=generator)
        return clip + 0.1 * F.interpolate(coarse, size=clip.shape[1:], mode="trilinear")[0]

    share = shares(tally_of(40, seed=6, spoil=spoil)[0])
    assert share["all"] > 0.95 and share["strict"] > 0.9, share


@pytest.mark.parametrize("spread", [0.3, 0.5, 0.8])
def test_blobs_are_no_stars(spread: float) -> None:
    rng, at = random.Random(7), (torch.arange(64) + 0.5) / 64
    for _ in range(20):
        scene = Scene(
            "white",
            "blue",
            rng.choice(("star", "cross")),
            rng.choice(("left", "grows", "still", "spins")),
            "large",
        )
        x, y, radius = toy.draw(scene, rng, 17)[:, :3, None, None].unbind(1)
        blob = torch.exp(-((at - x) ** 2 + (at[:, None] - y) ** 2) / (2 * (spread * radius) ** 2))
        reading = adherence.read(painted(blob, scene))
        assert reading is not None and reading.shape not in ("star", "cross"), reading
        assert not any(
            adherence.compare(reading, Scene(**(vars(scene) | {"shape": shape})))["strict"]
            for shape in toy.SHAPES
        )


def nothing() -> dict[str, Frames]:
    rng = np.random.default_rng(8)
    ramp = np.arange(64)[None, None, :, None]
    pictures = {
        "black": 0,
        "white": 255,
        "faint": 128 + 3 * rng.normal(size=(17, 64, 64, 3)),
        "gray noise": 128 + 50 * rng.normal(size=(17, 64, 64, 1)),
        "uniform": rng.integers(0, 256, (17, 64, 64, 3)),
        "noise": 128 + 20 * rng.normal(size=(17, 64, 64, 3)),
        "salt": np.where(rng.random((17, 64, 64, 1)) < 0.05, 255, 20),
        "snow": np.where(rng.random((17, 64, 64, 1)) < 0.45, 255, 20),
        "ramp": 4 * ramp,
        "edge": np.where(ramp < 30, 20, 220),
        "flash": np.where(np.arange(17)[:, None, None, None] == 3, 255, 0),
    }
    return {
        name: np.broadcast_to(np.asarray(picture).clip(0, 255), (17, 64, 64, 3)).astype(np.uint8)
        for name, picture in pictures.items()
    }


def test_clips_of_nothing_satisfy_no_caption() -> None:
    for name, clip in nothing().items():
        assert adherence.read(clip) is None, name
        assert not any(
            adherence.judge(clip, Scene("white", "black", "circle", "still")).values()
        ), name


def test_an_object_that_vanishes_is_not_clear() -> None:
    scene = Scene("white", "black", "square", "still")
    clip = frames_of(toy.render(scene, random.Random(9)))
    assert adherence.judge(clip, scene)["strict"]
    clip[12:] = clip[0, 0, 0]
    assert not adherence.judge(clip, scene)["strict"]
    clip[5:] = clip[0, 0, 0]
    assert adherence.read(clip) is None


def test_shapes_that_morph_are_not_strictly_right() -> None:
    rng = random.Random(10)
    for motion in ("left", "grows"):
        for shapes in (
            ("star", "circle"),
            ("square", "circle"),
            ("triangle", "cross"),
            ("cross", "square", "star"),
            toy.SHAPES,
        ):
            course = toy.draw(Scene("red", "black", shapes[0], motion), rng, 17)
            covers = [toy.coverage(shape, course, 64) for shape in shapes]
            cover = torch.stack([covers[t * len(shapes) // 17][t] for t in range(17)])
            scenes = [Scene("red", "black", shape, motion) for shape in toy.SHAPES]
            clip = painted(cover, scenes[0])
            assert not any(adherence.judge(clip, scene)["strict"] for scene in scenes), (
                motion,
                shapes,
            )
    flicker = torch.stack([covers[t % len(covers)][t] for t in range(17)])
    assert not any(adherence.judge(painted(flicker, scene), scene)["strict"] for scene in scenes)


def test_between_two_shapes_is_not_strictly_either() -> None:
    """A rounded square overlaps well with both the square and the circle."""
    at = (torch.arange(64) + 0.5) / 64 - 0.5
    cover = (
        (0.5 - 64 * ((at.abs() ** 3 + at[:, None].abs() ** 3) ** (1 / 3) - 0.22))
        .clamp(0, 1)
        .expand(17, 64, 64)
    )
    scenes = [Scene("red", "black", shape, "still") for shape in ("square", "circle")]
    reading = adherence.read(painted(cover, scenes[0]))
    assert reading is not None and reading.shape_overlap > 0.9
    assert not any(adherence.compare(reading, scene)["strict"] for scene in scenes)


def test_bad_clips_are_refused() -> None:
    for clip in (
        np.zeros((4, 64, 64, 3), np.uint8),
        np.zeros((17, 64, 64), np.uint8),
        np.zeros((17, 64, 64, 3), np.float32),
    ):
        with pytest.raises(ValueError, match="uint8"):
            adherence.read(clip)  # type: ignore[arg-type]


def test_rate_is_wilsons_interval() -> None:
    cell = adherence.rate(81, 100)  # by hand: centre 0.79853, half width 0.07626
    assert cell["share"] == 0.81
    assert [cell["low"], cell["high"]] == pytest.approx([0.7222, 0.8749], abs=1e-4)
    assert adherence.rate(20, 20)["high"] == 1.0 and adherence.rate(20, 20)["low"] == pytest.approx(
        0.8389, abs=1e-4
    )
    assert (adherence.rate(0, 0)["low"], adherence.rate(0, 0)["high"]) == (0.0, 1.0)


def test_evaluate_asks_with_captions_and_counts_confusions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(11)
    scenes = [toy.sample_scene(rng, unseen) for unseen in (False, True) for _ in range(16)]
    asked: list[tuple[str, int]] = []

    def generate(caption: str, seed: int) -> Frames:
        scene = scenes[len(asked)]
        asked.append((caption, seed))
        shown = (
            Scene(**(vars(scene) | {"shape": "circle", "motion": "still"}))
            if scene.shape == "star"
            else scene
        )
        return frames_of(toy.render(shown, random.Random(seed)))

    tally = adherence.evaluate(generate, scenes, range(32), Screen())
    assert asked == [(toy.caption(scene), seed) for seed, scene in enumerate(scenes)]
    stars = sum(scene.shape == "star" for scene in scenes)
    table = json.loads(json.dumps(tally.as_dict()))
    assert (
        stars
        and table["clips"] == 32
        and table["slots"]["shape"]["right"] == table["slots"]["strict"]["right"] == 32 - stars
    )
    assert (
        table["shape"]["star"]["read"] == {"circle": stars} and table["shape"]["star"]["share"] == 0
    )
    assert (
        table["kinds"]["seen"]["all"]["of"]
        == 16
        == sum(cell["all"]["of"] for kind, cell in table["kinds"].items() if kind != "seen")
    )
    shown = capsys.readouterr().err
    assert "clip 32/32" in shown and shown.endswith(f"{tally}\n")
    (line,) = (line for line in str(tally).splitlines() if line.startswith("star "))
    assert line.endswith(f"circle {stars}")

    asked.clear()
    worded = adherence.evaluate(generate, scenes, range(32), Screen(quiet=True), random.Random(0))
    assert worded.as_dict() == tally.as_dict() and asked != [
        (toy.caption(scene), seed) for seed, scene in enumerate(scenes)
    ]
    asked.clear()
    with pytest.raises(ValueError, match="argument 2"):
        adherence.evaluate(generate, scenes, [0], Screen(quiet=True))
