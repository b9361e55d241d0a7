"""Fine-tuning: clips in, LoRAs or a model out, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.common import PROMPT, refusal
from helpers.kept import kept_by_autograd
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import wanflow
from wanflow.cli import main
from wanflow.config import DiTConfig
from wanflow.media import VideoWriter, save_picture
from wanflow.models.dit import WanDiT, run_blocks
from wanflow.opening import resolve
from wanflow.outputs import Claims
from wanflow.pipeline import to_uint8
from wanflow.plan.gpus import Machine
from wanflow.presets import NANO, T2V_A14B
from wanflow.screen import Screen
from wanflow.train import memory, toy
from wanflow.train.clips import Form, find_clips, prepare, read_clip
from wanflow.train.finetune import attach, finetune, lora_tensors
from wanflow.train.objective import Objective, checkpointed
from wanflow.train.tuning import FineTune
from wanflow.train.views import Views

FORM = Form((64, 64), 17, 8)
MACHINE = Machine(0, "", 16 * 2**30, 12 * 2**30, 10**12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips with captions."""
    root = tmp_path_factory.mktemp("clips")
    rng = random.Random(0)
    for number in range(4):
        scene = toy.sample_scene(rng)
        with VideoWriter(root / f"{number}.mp4", 64, 64, 8, {}) as writer:
            writer.write(to_uint8(toy.render(scene, rng).unsqueeze(0)))
        (root / f"{number}.txt").write_text(toy.caption(scene))
    return root


def settings(folder: Path, root: Path, **more: Any) -> FineTune:
    given = {
        "data": folder,
        "out": root / "out",
        "work": root / "work",
        "form": FORM,
        "steps": 4,
        "batch": 4,
        "rank": 4,
        "alpha": 2.0,
    }
    return FineTune(**{**given, "learning_rate": 2e-3, "dtype": torch.float32, **more})


quiet = Screen(quiet=True)


# Clips


def test_clips_and_captions_in_every_form(folder: Path, tmp_path: Path) -> None:
    beside = find_clips(folder)
    assert [clip.path.name for clip in beside] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    for name, text in (
        (
            "metadata.jsonl",
            "\n".join(
                json.dumps({"file_name": clip.path.name, "text": clip.caption}) for clip in beside
            ),
        ),
        (
            "captions.jsonl",
            "\n".join(
                json.dumps({"file_name": clip.path.name, "caption": clip.caption})
                for clip in beside
            ),
        ),
        (
            "metadata.csv",
            "file_name,text\n" + "\n".join(f'{clip.path.name},"{clip.caption}"' for clip in beside),
        ),
    ):
        (folder / name).write_text(text)
        assert find_clips(folder) == beside
        (folder / name).unlink()


def test_clips_are_brought_to_one_form(folder: Path, tmp_path: Path) -> None:
    whole = read_clip(folder / "0.mp4", FORM)
    assert whole.shape == (3, 17, 64, 64) and whole.abs().max() <= 1
    scene = toy.sample_scene(random.Random(0))
    drawn = toy.render(scene, random.Random(0))
    assert (
        whole - drawn
    ).abs().mean() < 1  # it is a clip and not noise; its course is another seed's
    half = read_clip(folder / "0.mp4", replace(FORM, frame_num=9, fps=4))
    assert torch.equal(half, whole[:, ::2])
    double = read_clip(folder / "0.mp4", replace(FORM, frame_num=5, fps=16))
    assert torch.equal(double[:, 0], whole[:, 0]) and torch.equal(double[:, -1], whole[:, 2])
    wide = read_clip(folder / "0.mp4", replace(FORM, size=(64, 32)))
    assert torch.equal(wide, whole[:, :, 16:48])  # cut from the middle, nothing scaled
    assert read_clip(folder / "0.mp4", replace(FORM, size=(32, 32))).shape == (3, 17, 32, 32)
    save_picture(tmp_path / "a.png", np.full((48, 80, 3), 200, np.uint8), {})
    for name in ("a.jpg", "a.webp"):
        Image.fromarray(np.full((48, 80, 3), 200, np.uint8)).save(tmp_path / name)
        assert read_clip(tmp_path / name, Form((48, 48), 1, 8)).shape == (3, 1, 48, 48)
    picture = read_clip(tmp_path / "a.png", Form((48, 48), 1, 8))
    assert picture.shape == (3, 1, 48, 48) and torch.allclose(
        picture, torch.tensor(200 / 127.5 - 1)
    )


def test_clips_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(lambda: find_clips(tmp_path / "none"))
    assert "holds no clips" in refusal(lambda: find_clips(tmp_path))
    told = refusal(lambda: read_clip(folder / "0.mp4", replace(FORM, frame_num=81)))
    assert "0.mp4" in told and "need 10.00 s" in told and "room for 17" in told
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert "1 of 1 clips" in refusal(lambda: find_clips(tmp_path))
    (tmp_path / "a.txt").write_text(" ")
    assert "empty" in refusal(lambda: find_clips(tmp_path))
    (tmp_path / "a.txt").write_text("a red circle")
    (tmp_path / "b.txt").write_text("a blue star")
    assert "b.txt is a caption without a clip" in refusal(lambda: find_clips(tmp_path))
    (tmp_path / "b.txt").unlink()
    assert "a.mp4" in refusal(lambda: read_clip(find_clips(tmp_path)[0].path, FORM))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.mp4", "text": "x"}')
    assert "b.mp4" in refusal(lambda: find_clips(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"name": "b.mp4"}')
    assert "metadata.jsonl" in refusal(lambda: find_clips(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.jsonl", "[" * 100_000, "line 1: JSON of more than"),
        ("metadata.jsonl", '{"file_name": 7, "text": "x"}', "row 1 has no file_name and text"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": ["x"]}', "row 1 has no"),
        ("metadata.jsonl", "[1]", "row 1 has no"),
        ("metadata.jsonl", '{"file_name": "' + "x" * 300 + '.mp4", "text": "x"}', "not exist"),
        ("metadata.jsonl", '{"file_name": "\\u0000.mp4", "text": "x"}', "not exist"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "\\ud800"}', "is no Unicode text"),
        ("metadata.jsonl", '{"a": "' + "x" * 2_000_000 + '"}', "more than 1,048,576 bytes"),
        ("metadata.csv", "file_name,text\na.mp4," + "x" * 200_000, "is no table"),
        ("metadata.csv", "file_name\n\0\n", "metadata.csv"),
        ("metadata.jsonl", "\udcff", "cannot be read as text"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text(text, errors="surrogateescape")
    assert words in refusal(lambda: find_clips(tmp_path))


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    os.mkfifo(tmp_path / "metadata.jsonl")
    assert "metadata.jsonl is a pipe" in refusal(lambda: find_clips(tmp_path))
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "a.txt").write_text("a red circle")
    (tmp_path / "a.mp4").unlink()
    os.mkfifo(tmp_path / "a.mp4")
    assert "a.mp4 is a pipe" in refusal(lambda: find_clips(tmp_path))


def test_what_was_encoded_is_not_encoded_again(folder: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def clips() -> Any:
        seen.append("vae")
        return lambda clip: {"latent": clip.mean(dim=(2, 3))}

    def texts() -> Any:
        seen.append("t5")
        return lambda caption: {"text": torch.full((1 + len(caption), 2), float(len(caption)))}

    def run(form: Form = FORM) -> Any:
        return prepare(find_clips(folder), form, tmp_path, "model", clips, texts, quiet)

    samples, empty = run()
    assert (
        seen == ["t5", "vae"]
        and samples[0].latent().shape == (3, 17)
        and load_file(empty)["text"].shape == (1, 2)
    )
    caption = find_clips(folder)[0].caption
    text = samples[0].text(200)
    assert (
        text.shape == (200, 2)
        and text[len(caption)].tolist() == [len(caption)] * 2
        and not text[len(caption) + 1 :].any()
    )
    run()
    assert seen == ["t5", "vae"]
    samples[1].latent_file.unlink()
    run()
    assert seen == ["t5", "vae", "vae"]
    run(replace(FORM, frame_num=13))
    assert seen == ["t5", "vae", "vae", "vae"]
    for file in (samples[2].latent_file, samples[2].text_file):  # cut, as by a full disk
        file.write_bytes(file.read_bytes()[:-8])
        assert "is damaged or gone" in refusal(lambda: (samples[2].latent(), samples[2].text(99)))
        run()
        samples[2].latent(), samples[2].text(99)
    assert seen == ["t5", "vae", "vae", "vae", "vae", "t5"]


# The objective


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from wanflow.train.finetune import _clip_encoder, _text_encoder

    root = tmp_path_factory.mktemp("prepared")
    checkpoint, wanted = resolve("nano"), settings(folder, root)
    samples, empty = prepare(
        find_clips(folder),
        FORM,
        root,
        "nano",
        lambda: _clip_encoder(checkpoint, wanted),
        lambda: _text_encoder(checkpoint, wanted),
        quiet,
    )
    return checkpoint, samples, empty


def gradients(
    prepared: Any, folder: Path, root: Path, share: tuple[int, int] = (0, 1), **more: Any
) -> tuple[float, dict[str, Tensor]]:
    from wanflow.checkpoint.load import load_expert

    checkpoint, samples, empty = prepared
    wanted = settings(folder, root, **more)
    model = load_expert(checkpoint, "low", torch.float32, "cpu")
    adapters = attach(model, wanted)
    for slot in adapters.slots("finetune").values():
        torch.nn.init.normal_(slot.up, std=0.02, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for part in Objective(model, samples, empty, (0.0, 0.875), wanted, Views(NANO, FORM), share)(
        3, random.Random(0), torch.Generator().manual_seed(5)
    ):
        part.backward()
        total += float(part.detach())
    return total, {
        name: slot.up.grad
        for name, slot in adapters.slots("finetune").items()
        if slot.up.grad is not None
    }


def test_parts_of_a_batch_and_shares_add_up_to_the_whole(
    prepared: Any, folder: Path, tmp_path: Path
) -> None:
    loss, whole = gradients(prepared, folder, tmp_path)
    assert len(whole) == 60 and loss > 0
    for more in (
        {"accumulate": 2},
        {"accumulate": 4},
        {"checkpointing": True},
        {"checkpointing": True, "accumulate": 4},
    ):
        other, parts = gradients(prepared, folder, tmp_path, **more)
        assert other == pytest.approx(loss, rel=1e-5)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-3)
    shares = [gradients(prepared, folder, tmp_path, (rank, 2)) for rank in range(2)]
    assert sum(loss for loss, _ in shares) / 2 == pytest.approx(loss, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(
            (shares[0][1][name] + shares[1][1][name]) / 2, value, atol=1e-6, rtol=1e-3
        )


def test_checkpointing_is_the_plain_trunk() -> None:
    model = WanDiT(
        DiTConfig(
            dim=32, ffn_dim=64, num_heads=2, num_layers=3, text_dim=24, text_len=8, freq_dim=16
        )
    )
    given = torch.randn(1, 16, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 8, 24)
    results = []
    for trunk in (run_blocks, checkpointed):
        model.zero_grad()
        out = model(*given, trunk)
        out.square().mean().backward()
        results.append(
            (
                out.detach(),
                [
                    parameter.grad.clone()
                    for parameter in model.parameters()
                    if parameter.grad is not None
                ],
            )
        )
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(one, two) for one, two in zip(results[0][1], results[1][1], strict=True))


# Whole trainings


@pytest.mark.slow
def test_a_lora_is_learnt_written_and_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = finetune(resolve("nano"), settings(folder, tmp_path, steps=12, dropout=0.0), Screen())
    shown = capsys.readouterr().err
    assert [file.name for file in files] == [
        "high_noise_lora.safetensors",
        "low_noise_lora.safetensors",
    ]
    tensors = load_file(files[1])
    assert tensors["diffusion_model.blocks.0.ffn.0.lora_A.weight"].shape == (4, 160)
    assert tensors["diffusion_model.blocks.0.ffn.0.lora_B.weight"].shape == (640, 4)
    assert tensors["diffusion_model.blocks.0.ffn.0.alpha"] == 2.0 and len(tensors) == 3 * 60
    assert all(tensors[name].any() for name in tensors)
    pipe = wanflow.load("nano", device="cpu")
    quick: dict[str, Any] = {"seed": 1, "frame_num": 5, "sample_steps": 2}
    plain, with_it = (
        pipe.generate(PROMPT, **quick, lora=lora).frames for lora in ((), (str(tmp_path / "out"),))
    )
    assert not np.array_equal(plain, with_it)
    assert "exists" in refusal(lambda: finetune(resolve("nano"), settings(folder, tmp_path), quiet))
    assert re.search(r"step 12/12, loss \S+, took", shown)


def test_a_stopped_training_gives_the_same_lora(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(folder, tmp_path, experts=("low",), save_seconds=0.0)
    first = replace(wanted, out=tmp_path / "a", work=tmp_path / "w1")
    (whole,) = finetune(resolve("nano"), first, quiet)
    steps = 0
    real = Objective.__call__

    def stop(self: Objective, step: int, rng: Any, generator: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return real(self, step, rng, generator)

    monkeypatch.chdir(tmp_path)
    second = replace(wanted, out=Path("b"), work=Path("w2"))
    monkeypatch.setattr(Objective, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(resolve("nano"), second, quiet)
    assert not (tmp_path / "b").exists()
    (again,) = finetune(resolve("nano"), second, quiet)
    assert steps == 3 + 2 and again.read_bytes() == whole.read_bytes()
    # What was trained is taken from the work folder, unless it is damaged there.
    (trained,) = (tmp_path / "w2").glob("low-*.safetensors")
    trained.write_bytes(trained.read_bytes()[:-1])
    assert "exists" in refusal(lambda: finetune(resolve("nano"), second, quiet))
    (again,) = finetune(resolve("nano"), replace(second, overwrite=True), quiet)
    assert steps == 5 and again.read_bytes() == whole.read_bytes()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a", "b", "w1", "w2"]


def test_a_training_that_was_stopped_between_the_experts_goes_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Objective.__call__

    def stop(self: Objective, step: int, rng: Any, generator: Any) -> Any:
        if self.range[0] == 0.0:
            raise KeyboardInterrupt
        return real(self, step, rng, generator)

    monkeypatch.setattr(Objective, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(resolve("nano"), settings(folder, tmp_path, steps=2), quiet)
    monkeypatch.setattr(Objective, "__call__", real)
    files = finetune(resolve("nano"), settings(folder, tmp_path, steps=2), Screen())
    assert "high-noise expert: trained already" in capsys.readouterr().err
    assert all(file.exists() for file in files)


def test_the_lora_is_what_other_programs_read(tmp_path: Path) -> None:
    """diffusers' own converter of such files gives W + alpha / rank B A in its model."""
    from diffusers import WanTransformer3DModel
    from safetensors.torch import save_file

    config = DiTConfig(
        dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=24, text_len=8, freq_dim=16
    )
    model = WanDiT(config).requires_grad_(False)
    adapters = attach(model, replace(settings(tmp_path, tmp_path), rank=4, alpha=2.0))
    for slot in adapters.slots("finetune").values():
        torch.nn.init.normal_(slot.up, generator=torch.Generator().manual_seed(0))
    save_file(lora_tensors(adapters, 2.0), tmp_path / "low_noise_lora.safetensors")
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    )
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    state = WanLoraLoaderMixin.lora_state_dict(str(tmp_path / "low_noise_lora.safetensors"))
    theirs.load_lora_adapter(state)
    layer = theirs.blocks[1].attn2.to_v
    slot = adapters.slots("finetune")["blocks.1.cross_attn.v.weight"]
    x = torch.randn(3, 32)
    torch.testing.assert_close(
        layer(x) - layer.base_layer(x), 0.5 * x @ slot.down.T @ slot.up.T, atol=1e-5, rtol=1e-4
    )


@pytest.mark.slow
def test_full_fine_tuning_writes_a_model(folder: Path, tmp_path: Path) -> None:
    wanted = settings(folder, tmp_path, method="full", steps=2, learning_rate=1e-4)
    out = finetune(resolve("nano"), wanted, quiet)[0]
    checkpoint = resolve(out)
    assert checkpoint.layout == "official" and checkpoint.spec.dit == resolve("nano").spec.dit
    quick: dict[str, Any] = {"seed": 1, "frame_num": 5, "sample_steps": 2}
    tuned, plain = (
        wanflow.load(model, device="cpu").generate(PROMPT, **quick).frames
        for model in (out, "nano")
    )
    assert not np.array_equal(tuned, plain)


# The command, and what does not fit


def command(folder: Path, out: Path, *more: str) -> list[str]:
    given = ["train", "--data", str(folder), "--ckpt_dir", "nano", "--out", str(out)]
    return [*given, "--batch", "2", "--rank", "2", "--device", "cpu", *more]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--steps 0", "--steps must be from 1"),
        ("--steps -3", "--steps must be from 1"),
        ("--batch 0", "--batch must be from 1"),
        ("--rank 0", "--rank must be from 1"),
        ("--rank 100000", "--rank must be from 1 to 4,096 (got 100000)"),
        ("--save_every nan", "--save_every must be from 0"),
        ("--save_every inf", "--save_every must be from 0"),
        ("--save_every -1", "--save_every must be from 0"),
        ("--seed 100000000000000000000", "--seed must be from 0"),
        ("--seed -1", "--seed must be from 0"),
        ("--alpha 0", "--alpha between"),
        ("--alpha inf", "--alpha between"),
        ("--learning_rate 0", "--learning_rate"),
        ("--learning_rate nan", "--learning_rate"),
        ("--caption_dropout nan", "--caption_dropout"),
        ("--train_shift inf", "--train_shift"),
        ("--grad_accum 0", "--grad_accum must be"),
        ("--fps nan", "fps"),
        ("--out ~nosuchuser/x", "not a usable path"),
    ],
)
def test_values_that_no_training_takes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    assert main(command(folder, tmp_path / "x", *flags.split())) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_nano_and_evaluation_check_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ("--nano --scale nan", "--nano --scale 0", "--evaluate nano --prompts 0"):
        assert main(["train", *flags.split()]) == 2
        assert flags.split()[-2] in capsys.readouterr().err


def test_an_output_that_is_taken_is_refused_before_the_training(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "low_noise_lora.safetensors").write_text("mine")
    (taken / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, more, words in (
        (tmp_path / "file", "", "--out"),
        (tmp_path / "file" / "x", "", "cannot write"),
        (Path("/proc/x"), f"--work_dir {tmp_path / 'w'}", "cannot write /proc/x"),
        (tmp_path / ("x" * 250), f"--work_dir {tmp_path / 'w'}", "too long"),
        (taken, "", "low_noise_lora.safetensors exists; name another --out"),
        (taken, "--method full", "exists; name another place"),
        (taken, "--method full --overwrite", "thesis.tex, so it is more than a model"),
        (tmp_path / "x", f"--work_dir {tmp_path / 'file'}", "--work_dir"),
        (tmp_path / "x", f"--method full --work_dir {tmp_path / 'x' / 'w'}", "overlap"),
    ):
        assert main(command(folder, out, *more.split())) == 2, more
        assert words in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    Path("training").touch()
    assert main(command(folder, Path("."))) == 2
    assert "--work_dir training is no folder" in capsys.readouterr().err
    Path("training").unlink()
    with Claims() as others:
        for name in ("x", "x_training"):
            others.take(tmp_path / name)
            assert main(command(folder, tmp_path / "x")) == 2
            assert f"{name} is being made by another run" in capsys.readouterr().err
            others.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_a_training_that_is_stopped_prints_the_command_that_goes_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Objective.__call__

    def stop(self: Objective, step: int, rng: Any, generator: Any) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, rng, generator)

    monkeypatch.setattr(Objective, "__call__", stop)
    given = command(folder, tmp_path / "my lora", "--steps", "3", "--train_experts", "low")
    assert main(given) == 130
    said = capsys.readouterr().err
    work = tmp_path / "my lora_training"
    assert f"the state of the training are in {work}\n" in said
    assert f"stopped at step 2 of 3; its state is {work}/low-" in said
    monkeypatch.setattr(Objective, "__call__", real)
    line = next(line for line in said.splitlines() if line.startswith("go on with: "))
    again = shlex.split(line.removeprefix("go on with: wanflow "))
    assert again == given and main(again) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my lora", "my lora_training"]
    assert "is needed no longer" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "train",
        "--data",
        str(folder),
        "--ckpt_dir",
        "nano",
        "--out",
        str(tmp_path / "lora"),
        "--work_dir",
        str(tmp_path / "work"),
    ]
    assert (
        main(
            [
                *command,
                "--steps",
                "2",
                "--batch",
                "4",
                "--grad_accum",
                "2",
                "--activation_checkpointing",
                "--rank",
                "2",
            ]
        )
        == 0
    )
    assert (tmp_path / "lora" / "high_noise_lora.safetensors").exists()
    assert main([*command, "--steps", "2"]) == 2
    assert "exists; name another --out" in capsys.readouterr().err
    other = [*command[:5], "--out", str(tmp_path / "x")]
    for more, words in (
        (["--targets", "norm"], "must be some of"),
        (["--batch", "3", "--grad_accum", "2"], "equal parts"),
        (["--rank", "0"], "from 1 to 4,096 (got 0)"),
        (["--frame_num", "6"], "nearest is"),
        (["--size", "50*50"], "multiple of 16"),
        (["--fsdp"], "torchrun"),
    ):
        assert main([*other, *more]) == 2 and words in capsys.readouterr().err
    assert main(["train", "--data", str(folder)]) == 2 and "--ckpt_dir" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_learn_the_same(folder: Path, tmp_path: Path) -> None:
    """The command under torchrun: the model split in two, the files written once."""
    command = [
        "train",
        "--data",
        str(folder),
        "--ckpt_dir",
        "nano",
        "--steps",
        "2",
        "--batch",
        "4",
        "--rank",
        "2",
        "--dtype",
        "float32",
    ]
    command += ["--train_experts", "low", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "one"), "--work_dir", str(tmp_path / "w1")]) == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "wanflow",
        *command,
    ]
    torchrun += ["--out", str(tmp_path / "two"), "--work_dir", str(tmp_path / "w2"), "--fsdp"]
    done = subprocess.run(
        torchrun,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("saved") == 1  # one process speaks
    one, two = (
        load_file(tmp_path / name / "low_noise_lora.safetensors") for name in ("one", "two")
    )
    # Adam makes steps of one size out of gradients of any, rounding's too
    assert (
        all((value - two[name]).abs().max() < 2e-4 for name, value in one.items())
        and one.keys() == two.keys()
    )


def test_the_full_model_is_refused_with_what_it_would_need() -> None:
    checkpoint: Any = SimpleNamespace(spec=T2V_A14B)
    wanted = FineTune(Path(), Path(), Path(), Form((832, 480), 81, 16), batch=2)
    with pytest.raises(wanflow.RequestError) as caught:
        memory.refuse(checkpoint, wanted, MACHINE)
    lines = str(caught.value).splitlines()
    assert (
        len(lines) == 3
        and "a LoRA of rank 16" in lines[0]
        and "here: 12.0 GiB of free RAM" in lines[1]
    )
    assert (
        "--activation_checkpointing" in lines[2]
        and "--grad_accum 2" in lines[2]
        and "--fsdp" in lines[2]
    )
    full = memory.need(checkpoint, replace(wanted, method="full"))
    assert full.trained == 14_288_491_584 and full.training == full.trained * 16
    less = memory.need(checkpoint, replace(wanted, checkpointing=True, accumulate=2))
    assert less.activations * 8 < memory.need(checkpoint, wanted).activations and less.total < 80e9
    memory.refuse(
        checkpoint,
        replace(wanted, checkpointing=True, accumulate=2, device="cuda"),
        replace(MACHINE, gpu=80 * 10**9),
    )


def test_the_memory_is_what_autograd_keeps(prepared: Any, folder: Path, tmp_path: Path) -> None:
    """The estimate by fake tensors against bytes counted in a real step of nano."""
    from wanflow.checkpoint.load import load_expert

    checkpoint, samples, empty = prepared
    wanted = settings(folder, tmp_path)
    model = load_expert(checkpoint, "low", torch.float32, "cpu")
    attach(model, wanted)
    with kept_by_autograd(model) as held:
        next(
            Objective(model, samples, empty, (0.0, 0.875), wanted, Views(NANO, FORM))(
                0, random.Random(0), torch.Generator().manual_seed(0)
            )
        )
    assert memory.need(checkpoint, wanted).activations == pytest.approx(
        sum(held.values()), rel=0.05
    )
    assert memory.need(checkpoint, wanted).weights == pytest.approx(
        sum(p.nbytes for p in model.parameters()), rel=0.01
    )
    assert NANO.dit.num_layers == 6
