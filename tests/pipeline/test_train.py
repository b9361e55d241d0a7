"""Training: the loop resumes to the same weights, the recipe runs from nothing to a model, and nano
understands its prompts.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import wanflow
from wanflow.api import Pipeline
from wanflow.checkpoint.load import load_text_encoder, load_tokenizer
from wanflow.config import RequestError
from wanflow.models.tokenizer import Tokenizer
from wanflow.presets import NANO
from wanflow.screen import Screen
from wanflow.train import adherence, experts, nano, text, toy
from wanflow.train.loop import Train, fit, rate


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.out = nn.Linear(4, 1)


def fitted(settings: Train, file: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Train a tiny module; `stop` raises in the middle, as a kill would."""
    torch.manual_seed(3)
    model = Line()

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=generator) * rng.uniform(0.5, 1.5)
        return (model.out(model.blocks[0](x)) - x.sum(1, keepdim=True)).square().mean()

    return fit(model, loss, settings, file, Screen(quiet=True)).state_dict()


@pytest.mark.parametrize("muon", [0.0, 1e-3])
def test_a_killed_training_gives_the_same_weights(tmp_path: Path, muon: float) -> None:
    settings = Train(
        steps=40, batch=8, muon_rate=muon, save_seconds=0.0, dtype=torch.float32, warmup=5
    )
    whole = fitted(settings, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        fitted(settings, tmp_path / "cut.pt", stop=17)
    again = fitted(settings, tmp_path / "cut.pt")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_another_seed_does_not_continue_a_training(tmp_path: Path) -> None:
    fitted(Train(steps=2, batch=8), tmp_path / "a.pt")
    with pytest.raises(RequestError, match="begun with seed 0"):
        fitted(Train(steps=4, batch=8, seed=1), tmp_path / "a.pt")


def test_the_rate_warms_up_holds_and_falls_to_nothing() -> None:
    settings = Train(steps=100, batch=1, warmup=10, decay=0.3)
    rates = [rate(step, settings) for step in range(100)]
    assert rates[:10] == [pytest.approx((n + 1) / 10) for n in range(10)]
    assert set(rates[10:70]) == {1.0}
    assert rates[70:] == sorted(rates[70:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_training_never_sees_held_out_combinations() -> None:
    rng = random.Random(0)
    seen = [toy.sample_scene(rng) for _ in range(3000)]
    assert not any(toy.held_out(scene) for scene in seen)
    unseen = [toy.sample_scene(rng, unseen=True) for _ in range(300)]
    assert {toy.held_out(scene) for scene in unseen} == {"colour-shape", "shape-motion", "triple"}
    for slot in (
        "colour",
        "background",
        "shape",
        "motion",
        "size",
        "speed",
    ):  # every single value is seen
        assert {getattr(scene, slot) for scene in unseen} <= {
            getattr(scene, slot) for scene in seen
        }


def test_captions_are_what_the_notes_say() -> None:
    scene = toy.Scene("red", "blue", "circle", "left", "small", "fast")
    assert toy.caption(scene) == "a small red circle moves left quickly on a blue background"
    assert (
        toy.caption(toy.Scene("orange", "gray", "star", "still"))
        == "an orange star stays still on a gray background"
    )
    words = set(toy.vocabulary())
    rng = random.Random(1)
    for _ in range(500):
        assert {
            word.strip(",.").lower()
            for word in toy.caption(toy.sample_scene(rng, None), rng).split()
        } <= words


def test_sigmas_stay_in_the_experts_own_range() -> None:
    generator = torch.Generator().manual_seed(0)
    for low, high in ((0.875, 1.0), (0.0, 0.875)):
        drawn = experts.sigmas(4096, low, high, nano.SHIFT, generator)
        assert low <= drawn.min() < low + 0.01
        assert high - 0.01 < drawn.max() <= high
    assert drawn.median() > 0.5  # crowded upwards


@pytest.mark.slow
def test_the_recipe_runs_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage for two steps, resumed once, to a folder that loads and generates."""
    nano.train(tmp_path, tmp_path / "model", 0.0005, None, Screen())
    nano.train(tmp_path, tmp_path / "model", 0.0005, "low", Screen())
    lines = capsys.readouterr().err.splitlines()
    begun = [line.split(":")[0] for line in lines if line.endswith("begins")]
    assert begun == [*nano.STAGES, "low"]
    pipe = wanflow.load(tmp_path / "model", device="cpu")
    assert pipe.parts.spec.dit == NANO.dit
    video = pipe.generate(
        "a red circle moves left on a blue background", frame_num=5, sample_steps=2, seed=0
    )
    assert video.frames.shape == (5, 64, 64, 3)
    assert video.recipe["model"]["name"] == "nano"


def test_a_stage_without_its_input_says_which_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="run stage vae first"):
        nano.train(tmp_path, tmp_path / "model", 0.001, "export", Screen(quiet=True))


def test_the_embedded_model_is_small_and_in_the_official_layout() -> None:
    from wanflow.opening import NANO_FOLDER

    files = {
        file.relative_to(NANO_FOLDER).as_posix(): file.stat().st_size
        for file in NANO_FOLDER.rglob("*")
        if file.is_file()
    }
    assert sum(files.values()) < 20_000_000
    assert {
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/tokenizer.json",
    } <= files.keys()
    for expert in ("high_noise_model", "low_noise_model"):
        assert {
            f"{expert}/config.json",
            f"{expert}/diffusion_pytorch_model.safetensors",
        } <= files.keys()


@pytest.mark.slow
def test_nano_draws_what_the_prompt_says() -> None:
    """A floor, well below what is measured on 200 prompts (README): it catches a broken model, not
    a percent.
    """
    report = json.loads(nano.evaluate("nano", 20, "both", False, False, Screen(quiet=True)))
    slots = {name: cell["share"] for name, cell in report["slots"].items()}
    assert slots["background"] >= 0.9
    assert slots["colour"] >= 0.9
    assert slots["motion"] >= 0.8
    assert slots["shape"] >= 0.7
    assert slots["all"] >= 0.6


@pytest.mark.slow
def test_the_two_experts_are_two(nano: Pipeline) -> None:
    """Each predicts the velocity in its own range of noise better than the other one does there."""
    cache = _rendered(nano, 24)
    for which, other, low, high in (("high", "low", 0.9, 1.0), ("low", "high", 0.3, 0.8)):
        generator = torch.Generator().manual_seed(5)
        sigma = experts.sigmas(24, low, high, 1.0, generator)
        noise = torch.randn(cache.latents.shape, generator=generator)
        with torch.no_grad():
            own, foreign = (
                experts.flow_loss(
                    nano.parts.expert(name),
                    cache.latents.float(),
                    cache.texts[:, 0].float(),
                    sigma,
                    noise,
                )  # type: ignore[arg-type]
                for name in (which, other)
            )
        assert own < 0.9 * foreign


def _rendered(pipe: Pipeline, count: int) -> experts.Cache:
    parts = pipe.parts
    encoder = load_text_encoder(parts.checkpoint, torch.float32, "cpu")
    tokenizer = load_tokenizer(parts.checkpoint)
    return experts.precompute(
        parts.vae(), encoder, tokenizer, 99, count, NANO.frame_num, NANO.size[0], Screen(quiet=True)
    )


@pytest.mark.slow
def test_prompts_in_other_words_are_understood_alike(nano: Pipeline) -> None:
    """The same scene in three wordings: each clip shows it."""
    wordings = (
        "a large blue square stays still on a yellow background",
        "A huge blue box does not move, yellow backdrop.",
        "on the yellow backdrop we see a big blue square standing still",
    )
    scene = toy.Scene("blue", "yellow", "square", "still", "large")
    for wording in wordings:
        judged = adherence.judge(nano.generate(wording, seed=4).frames, scene)
        assert judged["colour"]
        assert judged["background"]
        assert judged["motion"]


def test_the_tokenizer_knows_its_words_and_survives_any_other(tmp_path: Path) -> None:
    text.build_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", 32)
    ids, mask = tokenizer(
        ["A red CIRCLE moves left", "a red circle moves left", "红色 🙂 \x00 zzz"]
    )
    assert torch.equal(ids[0], ids[1])
    assert mask[0].sum() == 6
    assert (ids >= 0).all()
    assert np.unique(mask.numpy()).tolist() == [0, 1]
