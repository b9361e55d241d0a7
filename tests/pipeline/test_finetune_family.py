"""Fine-tuning I2V-A14B and TI2V-5B: clips whose first frame is the picture."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.common import refusal
from helpers.kept import kept_by_autograd
from helpers.tiny import FAMILY, randomised, tiny_family
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import wanflow
from wanflow.checkpoint.load import load_expert
from wanflow.cli import main
from wanflow.media import VideoWriter, save_picture
from wanflow.models.dit import WanDiT, run_blocks, time_features
from wanflow.opening import resolve
from wanflow.pictures import open_picture
from wanflow.presets import I2V_A14B, NANO, TI2V_5B
from wanflow.screen import Screen
from wanflow.train import memory, toy
from wanflow.train.clips import Form, Sample, find_clips, prepare
from wanflow.train.finetune import _clip_encoder, attach, finetune
from wanflow.train.objective import Objective
from wanflow.train.tuning import FineTune
from wanflow.train.views import Views, flow_loss

quiet = Screen(quiet=True)
FORM = Form((64, 32), 9, 8)
CAPTION = "a red circle moves left"


def moving(start: int) -> np.ndarray:
    """Nine frames of 64*32 in which a bright square goes right."""
    frames = np.full((9, 32, 64, 3), 40 + 20 * start, np.uint8)
    for number, frame in enumerate(frames):
        frame[8:20, 4 * number + start : 4 * number + start + 12] = (220, 60, 30)
    return frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips with captions."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(3):
        with VideoWriter(root / f"{number}.mp4", 64, 32, 8, {}) as writer:
            writer.write(moving(number))
        (root / f"{number}.txt").write_text(CAPTION)
    return root


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("family")
    return lambda kind: root / kind if (root / kind).exists() else tiny_family(root / kind, kind)


def settings(folder: Path, root: Path, **more: Any) -> FineTune:
    given = {"data": folder, "out": root / "out", "work": root / "work", "form": FORM, "steps": 4}
    given |= {"batch": 4, "rank": 4, "alpha": 4.0, "learning_rate": 2e-3, "dtype": torch.float32}
    return FineTune(**{**given, **more})


def samples_of(kind: str, folder: Path, root: Path) -> tuple[list[Sample], Path]:
    """Encode the clips without a VAE: latents are random, and unlike for each clip."""
    views = Views(FAMILY[kind], FORM)

    def encode(clip: Tensor) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(int(clip.double().sum().abs()))
        latent = torch.randn(views.shape, generator=noise)
        held = views.fullest().held(latent.unsqueeze(0))  # zeros where a first frame is held
        given = latent if kind == "i2v" else latent[:, :1]
        assert held.shape == (1, *latent.shape)
        return {"latent": latent, "picture": given + 1}

    def state(caption: str) -> dict[str, Tensor]:
        return {"text": torch.full((1 + len(caption) % 7, 64), 0.5)}

    return prepare(find_clips(folder), FORM, root / kind, "m", lambda: encode, lambda: state, quiet)


class Seen(nn.Module):
    """Keeps what it is asked, and answers with zeros that have a gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.config = FAMILY[kind].dit
        self.asked: list[Any] = []

    def forward(self, latent: Tensor, time: Tensor, text: Tensor, trunk: Any, runs: Any) -> Tensor:
        shape = len(latent), self.config.out_dim, *latent.shape[2:]
        answer = torch.zeros(shape, requires_grad=True)
        self.asked.append((latent, time, runs, answer))
        return answer


def losses(model: Any, kind: str, given: Any, root: Path, **more: Any) -> list[Tensor]:
    wanted = settings(root, root, **more)
    views = Views(FAMILY[kind], FORM)
    objective = Objective(model, *given, (0.0, 0.9), wanted, views)
    return list(objective(3, random.Random(0), torch.Generator().manual_seed(5)))


def test_i2v_sees_a_mask_and_the_encoded_first_frame(folder: Path, tmp_path: Path) -> None:
    given, model = samples_of("i2v", folder, tmp_path), Seen("i2v")
    losses(model, "i2v", given, tmp_path)
    ((latent, time, runs, _),) = model.asked
    assert latent.shape == (4, 36, 3, 4, 8) and runs == () and time.shape == (4, 1, 32)
    mask, pictures = latent[:, 16:20], latent[:, 20:]
    assert (mask[:, :, 0] == 1).all() and not mask[:, :, 1:].any()
    known = [sample.picture()[0] for sample in given[0]]
    assert all(any(torch.equal(one, other) for other in known) for one in pictures)


def test_ti2v_holds_the_first_frame_of_some_clips_and_learns_the_others(
    folder: Path, tmp_path: Path
) -> None:
    given, model = samples_of("ti2v", folder, tmp_path), Seen("ti2v")
    (loss,) = losses(model, "ti2v", given, tmp_path, batch=16)
    ((latent, time, runs, answer),) = model.asked
    loss.backward()
    assert latent.shape == (16, 48, 3, 2, 4) and time.shape == (16, 2, 32)
    assert runs == ((0, 2), (1, 4))  # of 3 latent frames with a token pair each
    now = time_features(torch.tensor([0.0]), 32)
    held = [bool(torch.equal(row[:1], now)) for row in time]
    assert 4 <= sum(held) <= 12  # both ways, drawn by the step
    known = [sample.picture()[0, :, 0] for sample in given[0]]
    for row, frames, slope, first in zip(time, latent, answer.grad, held, strict=True):
        clean = any(torch.equal(frames[:, 0], other) for other in known)
        assert clean == first
        assert bool(slope[:, 0].any()) != first and slope[:, 1:].any()
        if not first:
            assert torch.equal(row[0], row[1])
    again = losses(Seen("ti2v"), "ti2v", given, tmp_path, batch=16)
    assert torch.equal(again[0], loss)
    # The mean of the clips' own means: a held frame makes a clip weigh no less.
    own = losses(model, "ti2v", given, tmp_path, batch=16, accumulate=16)
    assert float(sum(own).detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    flat = [float((part * 16).detach()) for part in own]
    assert min(flat) > 1.5  # of noise minus a latent, about 2


def test_parts_of_a_mixed_batch_add_up_to_the_whole(folder: Path, tmp_path: Path) -> None:
    given = samples_of("ti2v", folder, tmp_path)
    found = []
    for more in ({}, {"accumulate": 2}, {"checkpointing": True, "accumulate": 4}):
        with torch.device("meta"):
            model = WanDiT(FAMILY["ti2v"].dit)
        model = randomised(model, 0)
        adapters = attach(model, settings(folder, tmp_path))
        for slot in adapters.slots("finetune").values():
            nn.init.normal_(slot.up, std=0.02, generator=torch.Generator().manual_seed(1))
        parts = losses(model, "ti2v", given, tmp_path, **more)
        sum(parts).backward()
        slopes = {name: slot.up.grad for name, slot in adapters.slots("finetune").items()}
        found.append((float(sum(parts).detach()), slopes))
    for loss, slopes in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, slope in found[0][1].items():
            torch.testing.assert_close(slopes[name], slope, atol=1e-6, rtol=1e-3)


def test_a_picture_shows_no_first_frame_of_a_video() -> None:
    single = replace(FORM, frame_num=1)
    assert Views(TI2V_5B, single).share == 0 < Views(TI2V_5B, FORM).share < 1
    assert Views(I2V_A14B, single).share == Views(I2V_A14B, FORM).share == 1
    assert Views(NANO, FORM).share == 0


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_the_first_frame_is_encoded_as_a_run_encodes_it(
    folder: Path, families: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """What training stores is what a video of that picture would be conditioned on."""
    from wanflow.train.clips import read_clip

    clip = read_clip(folder / "0.mp4", FORM)
    clip = ((clip + 1) * 127.5).round() / 127.5 - 1  # as a picture of bytes
    checkpoint = resolve(families(kind))
    encoded = _clip_encoder(checkpoint, settings(folder, tmp_path))(clip)
    pixels = ((clip[:, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    pipe = wanflow.load(families(kind), device="cpu")
    asked: dict[str, Any] = {"size": "64*32", "frame_num": 9, "exact_size": True}
    request = wanflow.Request(CAPTION, image=open_picture(pixels), **asked)
    seen = pipe.engine.condition(pipe.begin(request))
    ours = Views(checkpoint.spec, FORM).of(encoded["picture"].unsqueeze(0))
    x = torch.randn(1, *ours.shape)
    torch.testing.assert_close(ours.latent(ours.held(x)), seen.latent(seen.held(x)))
    if kind == "ti2v":
        torch.testing.assert_close(encoded["picture"][:, 0], encoded["latent"][:, 0])


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_a_lora_learns_its_clips_and_changes_the_video(
    folder: Path, families: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    model = families(kind)
    which = {"i2v": "low", "ti2v": "dit"}[kind]
    wanted = settings(folder, tmp_path, steps=16, dropout=0.0, learning_rate=1e-2)
    wanted = replace(wanted, experts=("low",) if kind == "i2v" else ())
    losses: list[float] = []
    real = Objective.__call__

    def noted(self: Objective, *given: Any) -> Any:
        for part in real(self, *given):
            losses.append(float(part.detach()))
            yield part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "__call__", noted)
        (file,) = finetune(resolve(model), wanted, quiet)
    assert file.name == {"low": "low_noise_lora.safetensors", "dit": "lora.safetensors"}[which]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["wanflow"])["expert"] == which
    pipe = wanflow.load(model, device="cpu")
    given: dict[str, Any] = {"seed": 1, "image": open_picture(moving(0)[0])}
    plain, with_it = (
        pipe.generate(CAPTION, **given, lora=lora).frames for lora in ((), (str(tmp_path / "out"),))
    )
    assert not np.array_equal(plain, with_it)


def test_a_stopped_training_of_one_network_gives_the_same_lora(
    folder: Path, families: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = resolve(families("ti2v"))
    wanted = settings(folder, tmp_path, save_seconds=0.0)
    (whole,) = finetune(checkpoint, replace(wanted, out=tmp_path / "a", work=tmp_path / "w"), quiet)
    real = Objective.__call__

    def stop(self: Objective, step: int, rng: Any, generator: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return real(self, step, rng, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(checkpoint, wanted, quiet)
    (again,) = finetune(checkpoint, wanted, quiet)
    assert again.read_bytes() == whole.read_bytes()


def test_a_lora_of_another_model_is_refused(
    folder: Path, families: Callable[[str], Path], tmp_path: Path
) -> None:
    """Shapes tell models apart, and the message names one."""
    finetune(resolve(families("ti2v")), settings(folder, tmp_path, steps=1), quiet)
    pipe = wanflow.load("nano", device="cpu")
    told = refusal(lambda: pipe.generate(CAPTION, seed=1, lora=str(tmp_path / "out")))
    assert "lora.safetensors" in told and "blocks" in told


def test_the_command_trains_one_network_on_pictures_and_refuses_an_expert(
    families: Callable[[str], Path],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "pictures"
    data.mkdir()
    save_picture(data / "a.png", moving(0)[0], {})
    (data / "a.txt").write_text(CAPTION)
    command = ["train", "--data", str(data), "--ckpt_dir", str(families("ti2v")), "--out"]
    command += [str(tmp_path / "x"), "--rank", "2", "--steps", "2", "--device", "cpu"]
    assert main([*command, "--frame_num", "1", "--train_experts", "low"]) == 2
    said = capsys.readouterr().err
    assert "--train_experts low" in said and "one network" in said and "leave the flag out" in said
    assert main([*command, "--frame_num", "1", "--size", "64*48"]) == 2
    assert "multiple of 32" in capsys.readouterr().err
    assert main([*command, "--frame_num", "1"]) == 0
    assert "are also the picture" not in capsys.readouterr().err
    tensors = load_file(tmp_path / "x" / "lora.safetensors")
    assert any(value.any() for name, value in tensors.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_every_weight_is_trained_on_a_picture_and_written_as_the_same_model(
    families: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    data, out = tmp_path / "pictures", tmp_path / "tuned"
    data.mkdir()
    save_picture(data / "a.png", moving(0)[0], {})
    (data / "a.txt").write_text(CAPTION)
    command = ["train", "--data", str(data), "--ckpt_dir", str(families(kind)), "--out", str(out)]
    command += ["--method", "full", "--steps", "1", "--device", "cpu", "--frame_num", "1"]
    assert main([*command, "--batch", "2", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().err
    assert ("are also the picture that tiny-i2v is given" in shown) == (kind == "i2v")
    before, after = resolve(families(kind)), resolve(out)
    assert after.layout == "official" and after.spec == before.spec
    name = "blocks.0.ffn.0.weight"
    for expert in before.spec.expert_names:
        old, new = (one.source(expert).read(name) for one in (before, after))
        assert new.shape == old.shape and not torch.equal(new, old)


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_the_memory_is_what_autograd_keeps(folder: Path, tmp_path: Path, kind: str) -> None:
    given, spec = samples_of(kind, folder, tmp_path), FAMILY[kind]
    wanted = settings(folder, tmp_path)
    with torch.device("meta"):
        model = WanDiT(spec.dit)
    model = randomised(model, 0)
    attach(model, wanted)
    with kept_by_autograd(model) as held:
        losses(model, kind, given, tmp_path)
    checkpoint: Any = SimpleNamespace(spec=spec)
    found = memory.need(checkpoint, wanted)
    assert found.activations == pytest.approx(sum(held.values()), rel=0.05)


def test_the_full_models_are_refused_with_what_they_would_need() -> None:
    from wanflow.plan.gpus import Machine

    machine = Machine(0, "", 16 * 2**30, 12 * 2**30, 10**12)
    for spec, size, frames, words in (
        (I2V_A14B, (832, 480), 81, "one expert of Wan2.2-I2V-A14B"),
        (TI2V_5B, (1280, 704), 121, "a LoRA of rank 16 on Wan2.2-TI2V-5B"),
    ):
        checkpoint: Any = SimpleNamespace(spec=spec)
        wanted = FineTune(Path(), Path(), Path(), Form(size, frames, 24), checkpointing=True)
        with pytest.raises(wanflow.RequestError, match=words):
            memory.refuse(checkpoint, wanted, machine)


def test_nano_i2v_sees_in_training_what_it_was_made_for(tmp_path: Path) -> None:
    """The picture of its own clip makes a clip easier to predict than another clip's picture."""
    checkpoint = resolve("nano-i2v")
    form = Form((64, 64), 9, 8)
    views = Views(checkpoint.spec, form)
    encode = _clip_encoder(checkpoint, settings(tmp_path, tmp_path, form=form))
    clips = []
    for number in range(3):
        rng = random.Random(number)
        clips.append(encode(toy.render(toy.sample_scene(rng), rng, 9, 64)))
    latents = torch.stack([clip["latent"] for clip in clips])
    seen = [views.of(clip["picture"].unsqueeze(0)) for clip in clips]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    texts = torch.zeros(3, checkpoint.spec.dit.text_len, checkpoint.spec.dit.text_dim)
    model = load_expert(checkpoint, "high", torch.float32, "cpu")
    with torch.no_grad():
        own, others = (
            float(flow_loss(model, given, latents, noise, [0.95] * 3, texts, run_blocks))
            for given in (seen, [*seen[1:], seen[0]])
        )
    assert own < 0.5 * others
