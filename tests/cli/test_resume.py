"""Going on with a saved run: what flags may change, and the command that goes on."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import numpy as np
import pytest
import torch
from helpers.common import PROMPT, let_appear
from safetensors import safe_open
from safetensors.torch import save_file

import wanflow
from wanflow import files, keeping
from wanflow.api import Pipeline
from wanflow.cli import command_parser, main
from wanflow.cli.keeping import StateKeeper, continuing
from wanflow.cli.output import Output
from wanflow.clipfiles import read_frames
from wanflow.pipeline import OnStep, Progress, Run

STATE = Path("a.latent.safetensors")
ASKED = {"frame_num": 5, "sample_steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def states() -> dict[int, Run]:
    """Runs of one request after each of their steps."""
    runs: dict[int, Run] = {}
    pipe = wanflow.load("nano", device="cpu")

    def keep(progress: wanflow.Progress) -> None:
        runs[progress.step] = progress.run

    pipe.generate(PROMPT, on_step=keep, **ASKED)
    return runs


@pytest.fixture
def state(states: dict[int, Run], in_tmp: Path) -> Run:
    states[2].save(STATE)
    return states[2]


@pytest.fixture(scope="module")
def whole(states: dict[int, Run]) -> np.ndarray:
    return wanflow.load("nano", device="cpu").finish(states[4]).frames


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


CHANGES = {
    "--prompt 'a green star'": "--prompt a green star (it has a red circle",
    "--negative_prompt gray": "--negative_prompt gray (it has )",
    "--seed 3": "--base_seed/--seed 3 (it has 7)",
    "--size 64*32": "--size 64*32 (it has (64, 64))",
    "--frame_num 9": "--frame_num 9 (it has 5)",
    "--sample_steps 9": "--sample_steps 9 (it has 4)",
    "--sample_solver euler": "--sample_solver euler (it has unipc)",
    "--sample_shift 3": "--sample_shift 3.0",
    "--cfg_high 2": "--cfg_high 2.0 (it has 4.0)",
    "--boundary 0.5": "--boundary 0.5",
    "--fps 5": "--fps 5.0 (it has 8",
    "--lora x.safetensors": "--lora ('x.safetensors',) (it has ())",
    "--dtype bfloat16": "--dtype bfloat16 (it has float32)",
    "--quantize fp8": "--quantize fp8",
    "--quantize_layers all": "--quantize_layers all (it has ffn)",
    "--noise_device cuda": "--noise_device cuda (it has cpu)",
    "--lora_mode fused": "--lora_mode fused (it has live)",
    "--preset lightning4": "--preset",
    "--sample_guide_scale 2": "--sample_guide_scale",
    "--use_prompt_extend": "--use_prompt_extend",
}


@pytest.mark.parametrize("flags", CHANGES)
def test_resume_refuses_what_the_saved_run_fixes(
    flags: str, state: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *shlex.split(f"generate --resume {STATE} {flags} --device cpu"))
    assert CHANGES[flags] in said and "--device" not in said
    assert Run.load(STATE).state.index == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--attention nonsense", "attention 'nonsense' is none of"),
        ("--attention sage", "sage"),
        ("--device cuda", "this machine has none"),
        ("--resident_blocks 7", "resident_blocks must be at most 6"),
        ("--vae_tile 7", "vae_tile"),
        ("--ulysses_size 2", "needs several processes"),
        ("--offload_model perhaps", "true or false"),
    ],
)
@pytest.mark.parametrize("command", ["generate --resume", "decode"])
def test_a_bad_value_is_refused_and_not_ignored(
    command: str,
    flags: str,
    words: str,
    states: dict[int, Run],
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "cuda" in flags:
        import torch

        if torch.cuda.is_available():
            pytest.skip("a GPU is here")
    states[4 if command == "decode" else 2].save(STATE)
    assert words in refused(capsys, *shlex.split(f"{command} {STATE} {flags}"))


def test_what_only_places_the_work_is_honoured(
    state: Run, whole: np.ndarray, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow import assemble

    seen = []
    real = assemble.LoadedParts

    def note(checkpoint: object, placement: object, *rest: object) -> object:
        seen.append(placement.runtime)  # type: ignore[attr-defined]
        return real(checkpoint, placement, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(assemble, "LoadedParts", note)
    flags = (
        "--device cpu --offload_model true --resident_blocks 2 --stream_from disk --chunk_tokens 64"
        " --vae_tile 64 --prefetch true --attention math --cfg_batch false --text_cache none"
        " --t5_cpu --timeout 60 --dtype float32 --seed 7 --size 64x64"
    )
    assert main(shlex.split(f"generate --resume {STATE} {flags}")) == 0
    (runtime,) = seen
    assert not runtime.keep_experts and runtime.prefetch and runtime.t5_cpu
    assert (runtime.resident_blocks, runtime.stream_from) == (2, "disk")
    assert (runtime.chunk_tokens, runtime.vae_tile, runtime.attention) == (64, 64, "math")
    assert runtime.cfg_batch is False and runtime.text_cache is None
    said = caplog.text
    assert said.count("the result may differ by rounding") == 1
    assert "--t5_cpu, --chunk_tokens, --vae_tile, --attention: not what" in said
    frames = read_frames(Path("a.mp4"))[0].astype(int)
    assert np.abs(frames - whole).mean() < 4  # the file's compression included


def test_a_finished_run_is_decoded_and_an_unfinished_one_resumed(
    states: dict[int, Run], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states[4].save(STATE)
    said = refused(capsys, "generate", "--resume", str(STATE), "--contact_sheet")
    assert f"step 4 of 4: its latent is finished; decode it with: wanflow decode {STATE}" in said
    assert "--contact_sheet" in said
    states[2].save(STATE)
    said = refused(capsys, "decode", str(STATE), "--save_file", "b.mp4", "--overwrite")
    command = f"wanflow generate --resume {STATE} --save_file b.mp4 --overwrite"
    assert f"{STATE} is at step 2 of 4; finish it with: {command}" in said


GIVEN = {
    "--ckpt_dir": "nano",
    "--gpus": "cpu,cpu",
    "--parallel": "cfg2xring1xulysses1",
    "--timeout": "30.0",
    "--offload_model": "False",
    "--resident_blocks": "2",
    "--attention": "math",
    "--vae": "my vae.safetensors",
}
DECIDED = ["--prompt", PROMPT, "--seed", "7", "--size", "64*64", "--dtype", "float32"]


def test_the_command_carries_every_flag_that_matters(states: dict[int, Run]) -> None:
    flags = [*(word for pair in GIVEN.items() for word in pair), "--overwrite", "--contact_sheet"]
    args = command_parser("generate").parse_args([*DECIDED, *flags, "--quantize", "fp8"])
    file, target = Path("it's a; $x.latent.safetensors"), Path("-a b.mp4")
    words = shlex.split(continuing(args, states[2], file, target))
    assert words[:2] == ["wanflow", "generate"]
    again = vars(command_parser("generate").parse_args(words[2:]))
    given = vars(args) | {"resume": file, "save_file": Path("./-a b.mp4")}
    given |= dict.fromkeys(("prompt", "size", "quantize")) | {"base_seed": -1}
    assert again == given | {"dtype": "auto"}
    args.parallel = None  # decode has no --parallel
    words = shlex.split(continuing(args, states[4], file, target))
    assert words[:3] == ["wanflow", "decode", str(file)]
    again = vars(command_parser("decode").parse_args(words[2:]))
    assert {name: again[name] for name in ("gpus", "overwrite", "contact_sheet", "ckpt_dir")} == {
        "gpus": "cpu,cpu",
        "overwrite": True,
        "contact_sheet": True,
        "ckpt_dir": "nano",
    }


def test_under_torchrun_the_command_starts_with_torchrun(
    states: dict[int, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = continuing(argparse.Namespace(), states[2], STATE)
    start = "torchrun --nnodes=2 --nproc_per_node=4 -m wanflow generate --resume"
    assert command == f"{start} {STATE}"
    assert continuing(argparse.Namespace(gpus="0,1"), states[2], STATE).startswith("wanflow ")


# A state belongs to its run

MAKE = ["generate", "--ckpt_dir", "nano", "--device", "cpu", "--frame_num", "5"]
MAKE += ["--sample_steps", "4", "--prompt", PROMPT, "--save_file", "a.mp4"]


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize("step", [2, 4])
def test_the_state_of_another_run_is_left_untouched(
    states: dict[int, Run],
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    step: int,
    more: list[str],
) -> None:
    states[step].save(STATE)
    before = STATE.read_bytes()
    said = refused(capsys, *MAKE, "--seed", "7", *more)
    go_on = "wanflow decode" if step == 4 else "wanflow generate --resume"
    assert f"{STATE} holds another run: step {step} of 4, seed 7, '{PROMPT}'" in said
    assert f"go on with it ({go_on} {STATE}), delete it, or name another --save_file" in said
    assert STATE.read_bytes() == before
    assert [path.name for path in in_tmp.iterdir()] == [STATE.name]


def test_a_file_that_is_no_state_is_left_untouched(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    STATE.write_bytes(b"mine")
    assert f"{STATE} exists and is no saved run" in refused(capsys, *MAKE)
    assert STATE.read_bytes() == b"mine"


def test_a_run_removes_only_its_own_state(
    states: dict[int, Run], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states[2].save(STATE)
    states[1].save("b.latent.safetensors")  # of the same run
    replace(states[2], id="0" * 16).save("c.latent.safetensors")
    said = refused(capsys, "generate", "--resume", str(STATE), "--save_file", "c.mp4")
    assert "c.latent.safetensors holds another run" in said
    assert main(["generate", "--resume", str(STATE), "--save_file", "b.mp4"]) == 0
    assert sorted(os.listdir()) == ["b.mp4", "c.latent.safetensors"]


def test_a_state_that_appears_meanwhile_is_not_replaced(
    states: dict[int, Run],
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wanflow import video

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "the cable is out")

    monkeypatch.setattr(keeping, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(Pipeline, "resume", planting(states[1]))
    monkeypatch.setattr(video, "save_frames", broken)
    assert main([*MAKE, "--seed", "8"]) == 1
    assert Run.load(STATE).id == states[1].id
    said = capsys.readouterr().err
    assert f"{STATE} is another run's now; this one is saved in a-" in said
    (command,) = re.findall(r"finish it with: wanflow (decode .*)$", said, re.M)
    monkeypatch.undo()
    os.chdir(in_tmp)
    assert main(shlex.split(command)) == 0
    assert Run.load(STATE).id == states[1].id and Path("a-2.mp4").exists()


def planting(other: Run) -> Callable[..., Run]:
    """Return `Pipeline.resume` beside which another run saves its state."""
    real = Pipeline.resume

    def resume(self: Pipeline, run: Run, on_step: OnStep | None = None) -> Run:
        other.save(STATE)
        return real(self, run, on_step)

    return resume


def test_a_run_of_an_earlier_version_is_resumed_over_its_own_file(
    state: Run, whole: np.ndarray
) -> None:
    with safe_open(STATE, framework="pt") as file:
        said = json.loads(file.metadata()["wanflow"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del said["id"]
    save_file(tensors, STATE, {"wanflow": json.dumps(said)})
    assert main(["generate", "--resume", str(STATE), "--device", "cpu"]) == 0
    assert os.listdir() == ["a.mp4"]


def test_the_printed_command_works_when_pasted(
    in_tmp: Path, whole: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after two steps, with a file of the video's name that is to be replaced."""
    folder = Path("a folder; $x")
    folder.mkdir()
    target = folder / "it's.mp4"
    target.write_bytes(b"old")
    flags = ["--seed", "7", "--overwrite", "--contact_sheet", "--chunk_tokens", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "resume", stopping(2))
        assert main([*MAKE[:-1], str(target), *flags]) == 130
    said = capsys.readouterr().err
    assert target.read_bytes() == b"old" and "Traceback" not in said
    (command,) = re.findall(r"stopped at step 2 of 4; go on with: wanflow (.*)$", said, re.M)
    assert main(shlex.split(command)) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["it's.mp4", "it's_sheet.png"]
    frames = read_frames(target)[0].astype(int)
    assert np.abs(frames - whole).mean() < 4  # the file's compression


def stopping(step: int) -> Callable[..., Run]:
    """Return `Pipeline.resume` that Ctrl-C interrupts after a step."""
    real = Pipeline.resume

    def resume(self: Pipeline, run: Run, on_step: Callable[[wanflow.Progress], object]) -> Run:
        def interrupted(progress: wanflow.Progress) -> None:
            on_step(progress)
            if progress.step == step:
                raise KeyboardInterrupt

        return real(self, run, interrupted)

    return resume


def test_the_command_names_a_free_file_where_the_video_appeared_meanwhile(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        let_appear(patch, "a.mp4")
        assert main(MAKE) == 2
    (command,) = re.findall(r"finish it with: wanflow (decode .*)$", capsys.readouterr().err, re.M)
    assert main(shlex.split(command)) == 0
    assert sorted(os.listdir()) == ["a-2.mp4", STATE.name, "a.mp4"]  # decode keeps its input
    assert Path("a.mp4").read_bytes() == b"mine"


def progress_of(run: Run) -> Progress:
    index = run.state.index
    return Progress(index, 4, 0.0, 0.0, 0.0, "low", run.state.x, run)


def keeper_of(run: Run, go_on: str = "go on") -> StateKeeper:
    return StateKeeper(run, STATE, lambda run, file: go_on, Output())


def test_a_step_does_not_wait_for_the_disk(
    states: dict[int, Run], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the state of step 1 is written, steps 2 and 3 go on; an abort then stores step 3."""
    monkeypatch.setattr(keeping, "SAVE_SECONDS", -1.0)
    save, begun, go_on, written = Run.save, Event(), Event(), []

    def slow(self: Run, path: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        save(self, path)
        written.append(self.state.index)

    monkeypatch.setattr(Run, "save", slow)
    keeper = keeper_of(states[1])
    assert keeper(progress_of(states[1])) and begun.wait(60)
    assert keeper(progress_of(states[2])) and keeper(progress_of(states[3]))
    assert not written and not STATE.exists()
    Timer(0.05, go_on.set).start()
    assert keeper.on_abort()
    assert written == [1, 3]
    assert torch.equal(Run.load(STATE).state.x, states[3].state.x)


def test_a_thread_that_saves_keeps_what_the_disk_refuses_for_later(
    states: dict[int, Run],
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(keeping, "SAVE_SECONDS", -1.0)
    keeper = keeper_of(states[1])
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda handle: raises(OSError(errno.EIO, "cable")))
        keeper(progress_of(states[1]))
        keeper.try_to_save()
    assert capsys.readouterr().err.count("is not saved for now") == 1
    assert not STATE.exists() and keeper.stored is None
    keeper.try_to_save()
    assert Run.load(STATE).state.index == 1
    keeper.remove()
    assert not STATE.exists()


def raises(error: Exception) -> None:
    raise error
