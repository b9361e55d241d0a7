"""Which of the files that a recipe names are read: those that flags name, or none."""

from __future__ import annotations

import json
import logging
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.recipe_mutations import GOOD
from safetensors.torch import save_file
from torch import Tensor, ones, randn

import wanflow
from wanflow.api import Pipeline
from wanflow.cli import main
from wanflow.clipfiles import read_recipe
from wanflow.media import recipe_tags, save_picture
from wanflow.presets import NANO_FOLDER

TINY = ["--size", "64*64", "--frame_num", "1", "--sample_steps", "2", "--base_seed", "3"]
MAKE = ["generate", "--ckpt_dir", "nano", "--prompt", "a red circle", *TINY]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    name, tensors = "diffusion_model.blocks.0.ffn.0", dict[str, Tensor]()
    tensors |= {f"{name}.lora_down.weight": randn(4, 160), f"{name}.alpha": ones(())}
    tensors[f"{name}.lora_up.weight"] = randn(640, 4)
    (tmp_path / "mine").mkdir()
    save_file(tensors, tmp_path / "mine/x.safetensors")
    return tmp_path / "mine/x.safetensors"


def picture(path: Path, **changes: Any) -> Path:
    """A stranger's picture, whose recipe differs from a good one."""
    recipe = json.loads(json.dumps(GOOD))
    for section, values in changes.items():
        recipe[section] |= values
    save_picture(path, np.zeros((16, 16, 3), np.uint8), recipe_tags(recipe, "x"))
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    return capsys.readouterr().err


def test_what_a_strangers_recipe_names_is_listed_and_not_touched(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pipe", "model", "vae"):
        os.mkfifo(name)  # opening one would hang
    here = str(in_tmp)
    lora = {"lora": [f"{here}/pipe@1.0"]}
    for changes, words in (
        ({"request": lora}, [f"lora {here}/pipe"]),
        ({"model": {"folder": f"{here}/model"}}, [f"model {here}/model"]),
        ({"model": {"parts": {"vae": f"{here}/vae"}}}, [f"vae {here}/vae"]),
        ({"model": {"name": "other", "folder": "/etc"}, "request": lora}, ["/etc", "pipe"]),
        ({"request": {"lora": [f"{here}/mine/../pipe@1.0"]}}, ["mine/../pipe"]),
    ):
        path = picture(in_tmp / "x.png", **changes)
        for argv in (("replay", path), ("generate", "--recipe", path)):
            told = refused(capsys, *argv, "--save_file", "y.png")
            assert all(word in told for word in [*words, "--trust_paths", "--ckpt_dir"]), told
        path.unlink()
    path = picture(in_tmp / "x.png", request={"lora": ["/dev/zero@1.0", "~nosuchuser/x@1.0"]})
    assert "not a usable path" in refused(capsys, "replay", path, "--trust_paths")
    path.unlink()
    path = picture(in_tmp / "x.png", request={"lora": ["/dev/zero@1.0"]})
    assert "regular file" in refused(capsys, "replay", path, "--trust_paths", "--force")


@pytest.mark.slow
def test_a_lora_is_read_where_a_flag_names_its_folder(
    in_tmp: Path, lora: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*MAKE, "--lora", str(lora), "--save_file", "a.png"]) == 0
    assert "lora" in refused(capsys, "replay", "a.png", "--save_file", "b.png")
    with caplog.at_level(logging.INFO, "wanflow"):
        for number, flags in enumerate((["--lora_dir", "mine"], ["--trust_paths"])):
            assert main(["replay", "a.png", "--save_file", f"{number}.png", *flags]) == 0
            assert f"reads lora {lora}" in caplog.text
    assert Path("0.png").read_bytes() == Path("1.png").read_bytes() == Path("a.png").read_bytes()
    Path("yours").mkdir()
    lora.rename("yours/x.safetensors")  # as on the machine of another person
    assert "no such file" in refused(capsys, "replay", "a.png", "--trust_paths")
    assert main(["replay", "a.png", "--lora_dir", "mine", "yours", "--save_file", "c.png"]) == 0
    assert read_recipe(Path("c.png"))["request"]["lora"][0].startswith("yours/x")
    other = Path("yours/x.safetensors")
    save_file({"diffusion_model.blocks.0.ffn.0.diff": randn(640, 160)}, other)
    again = refused(capsys, "replay", "a.png", "--lora_dir", "yours", "--save_file", "d.png")
    assert "another LoRA" in again


@pytest.mark.slow
def test_the_folder_of_the_weights_is_named_by_a_flag_or_the_environment(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("models").mkdir()
    Path("models/own").symlink_to(NANO_FOLDER)
    make = [*MAKE, "--save_file", "a.png"]
    make[2] = f"{in_tmp}/models/own"
    assert main(make) == 0
    assert f"model {in_tmp}/models/own" in refused(capsys, "replay", "a.png")
    for flags in (["--ckpt_dir", "models/own"], ["--trust_paths"]):
        assert main(["replay", "a.png", "--overwrite", *flags]) == 0
    monkeypatch.setenv("WANFLOW_CKPT_DIR", "models")
    assert main(["replay", "a.png", "--overwrite"]) == 0


def test_the_printed_command_goes_on_with_a_run_of_ones_own(
    in_tmp: Path,
    lora: Path,
    nano: Pipeline,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(pipe: Pipeline, run: Any, on_step: Any = None) -> Any:
        def cancel(progress: Any) -> bool:
            on_step(progress)
            raise KeyboardInterrupt

        return wanflow.api.denoise(pipe.engine, run, cancel)

    assert main([*MAKE, "--lora", str(lora), "--save_file", "whole.png"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "resume", stop)
        assert main([*MAKE, "--lora", str(lora), "--save_file", "a.png"]) == 130
    told = capsys.readouterr().err
    command = shlex.split(told.partition("go on with: wanflow ")[2].splitlines()[0])
    state = command[command.index("--resume") + 1]
    assert f"lora {lora}" in refused(capsys, "generate", "--resume", state)
    assert main(command) == 0
    assert Path("a.png").read_bytes() == Path("whole.png").read_bytes()


def test_inspect_shows_how_a_file_was_made(
    in_tmp: Path, nano: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    video = nano.generate("a red circle", seed=5, size="64*64", frame_num=5, sample_steps=2)
    for name in ("a.mp4", "a.webm", "a.mkv", "a.gif", "a.apng", "frames"):
        video.save(name)
        assert main(["inspect", name]) == 0
        told = capsys.readouterr().out
        assert all(
            word in told
            for word in ("a red circle", "64*64, 5 frames", "2, unipc", f"wanflow replay {name}\n")
        ), told
    assert main(["inspect", "a.mp4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recipe"] == json.loads(json.dumps(video.recipe)) and document["files"] == []

    run = nano.begin(wanflow.Request("a red circle", size="64*64", frame_num=1, sample_steps=2))
    run.save("x.latent.safetensors")
    assert main(["inspect", "x.latent.safetensors"]) == 0
    told = capsys.readouterr().out
    assert "step 0 of 2" in told and "wanflow generate --resume x.latent.safetensors" in told
    nano.resume(run).save("x.latent.safetensors")
    assert main(["inspect", "x.latent.safetensors", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["step"], document["finished"]) == (2, True)
    assert document["command"] == "wanflow decode x.latent.safetensors"

    stranger = picture(in_tmp / "s.png", request={"lora": ["/x/\x1b[2J.safetensors@1.0"]})
    assert main(["inspect", str(stranger)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told and "--trust_paths" in told and "/x/" in told
    save_picture(in_tmp / "plain.png", np.zeros((16, 16, 3), np.uint8), {})
    assert "no wanflow recipe" in refused(capsys, "inspect", "plain.png")
