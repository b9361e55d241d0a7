"""The pipeline on nano: runs as values, cancel and resume, experts in and out of memory, outputs
that are refused.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.common import PROMPT, QUICK
from helpers.golden_parts import GoldenParts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wanflow
from wanflow.api import Pipeline
from wanflow.clipfiles import read_recipe
from wanflow.config import DiTConfig, RequestError, VAEConfig
from wanflow.models.dit import WanDiT
from wanflow.models.vae import WanVAE
from wanflow.pipeline import Cancelled, Progress, Run
from wanflow.presets import NANO, Expert
from wanflow.sampling.solvers import SolverState
from wanflow.sanity import OutputError


def test_a_prompt_becomes_a_video(nano: Pipeline, tmp_path: Path) -> None:
    told: list[Progress] = []
    video = nano.generate(PROMPT, on_step=told.append, **QUICK)
    assert video.frames.shape == (5, 64, 64, 3)
    assert video.frames.dtype == np.uint8
    assert [p.step for p in told] == [1, 2, 3, 4]
    assert [p.expert for p in told] == sorted(
        (p.expert for p in told), reverse=False
    )  # high before low
    assert told[0].snr < told[-1].snr
    path = video.save(tmp_path / "out.mp4")
    recipe = read_recipe(path)
    assert recipe == json.loads(json.dumps(video.recipe))
    assert recipe["request"]["seed"] == 7
    assert recipe["model"]["fingerprint"]


def test_same_seed_same_video_and_other_seed_other_video(nano: Pipeline) -> None:
    first, again = (nano.generate(PROMPT, **QUICK).frames for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, nano.generate(PROMPT, **{**QUICK, "seed": 8}).frames)


def test_a_seed_is_drawn_and_kept(nano: Pipeline) -> None:
    one, two = (nano.begin(wanflow.Request(PROMPT)).request.seed for _ in range(2))
    assert one != two
    assert one >= 0


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_stopped_saved_loaded_finished_is_the_same_run(
    nano: Pipeline, tmp_path: Path, solver: str, stop: int
) -> None:
    whole = nano.resume(nano.begin(wanflow.Request(PROMPT, sample_solver=solver, **QUICK)))  # type: ignore[arg-type]
    with pytest.raises(Cancelled) as stopped:
        nano.generate(PROMPT, on_step=lambda p: p.step < stop, sample_solver=solver, **QUICK)
    stopped.value.run.save(tmp_path / "run.safetensors")
    loaded = Run.load(tmp_path / "run.safetensors")
    assert loaded.state.index == stop
    assert loaded.request == whole.request
    assert torch.equal(nano.resume(loaded).state.x, whole.state.x)


@pytest.mark.slow
def test_a_run_is_finished_in_a_new_process(nano: Pipeline, tmp_path: Path) -> None:
    whole = nano.generate(PROMPT, **QUICK)
    with pytest.raises(Cancelled) as stopped:
        nano.generate(PROMPT, on_step=lambda p: p.step < 2, **QUICK)
    stopped.value.run.save(tmp_path / "run.safetensors")
    state, frames = str(tmp_path / "run.safetensors"), str(tmp_path / "frames.npy")
    code = f"""
import numpy, pathlib, wanflow
pipe = wanflow.load("nano", device="cpu")
run = wanflow.Run.load(pathlib.Path({state!r}))
numpy.save({frames!r}, pipe.finish(pipe.resume(run)).frames)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert np.array_equal(np.load(tmp_path / "frames.npy"), whole.frames)


def test_a_damaged_state_is_refused(tmp_path: Path, nano: Pipeline) -> None:
    file = tmp_path / "run.safetensors"
    with pytest.raises(RequestError, match="no saved run"):
        Run.load(file)
    nano.begin(wanflow.Request(PROMPT, **QUICK)).save(file)
    data = file.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"{}" * 50):
        file.write_bytes(broken)
        with pytest.raises(RequestError, match="not a saved wanflow run"):
            Run.load(file)


def test_a_bit_that_flipped_is_noticed(stopped: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    stopped.save(file)
    data = bytearray(file.read_bytes())
    tensors = 8 + int.from_bytes(data[:8], "little")
    for at in (tensors, (tensors + len(data)) // 2, len(data) - 4):
        flipped = bytearray(data)
        flipped[at] ^= 1  # the lowest bit of a number
        file.write_bytes(flipped)
        with pytest.raises(RequestError, match="not those that were saved"):
            Run.load(file)
    file.write_bytes(data)
    assert torch.equal(Run.load(file).state.x, stopped.state.x)


def nan(state: dict[str, torch.Tensor]) -> None:
    state["origin"][0, 3, 1, 2, 2] = torch.nan


# What is done to the tensors of a state after two steps, and what the refusal names.
WRONG_TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "x is F32 [1, 16, 2, 8, 9]": lambda state: state.update(x=torch.zeros(1, 16, 2, 8, 9)),
    "data.1 is F32 [16, 2, 8, 8]": lambda state: state.update({"data.1": state["x"][0].clone()}),
    "x is BOOL": lambda state: state.update(x=state["x"] > 0),
    "x is F16": lambda state: state.update(x=state["x"].half()),
    "x is U8": lambda state: state.update(x=state["x"].to(torch.uint8)),
    "origin is F8_E4M3": lambda state: state.update(origin=state["x"].to(torch.float8_e4m3fn)),
    "origin holds NaN": nan,
    "expected ['data.0', 'data.1', 'origin', 'x']": lambda state: state.pop("origin"),
    "['data.0', 'data.1', 'more', 'origin', 'x']": lambda state: state.update(more=torch.zeros(1)),
}
# What the file says about itself, and what the refusal names.
WRONG_WORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "step -1 of 4": lambda said: said.update(index=-1),
    "step 5 of 4": lambda said: said.update(index=5),
    "step 2.0 of 4": lambda said: said.update(index=2.0),
    "step True of 4": lambda said: said.update(index=True),
    "index": lambda said: said.pop("index"),
    "expected ['x']": lambda said: said["recipe"]["request"].update(sample_solver="euler"),
    "expected F32 [1, 16, 2, 4, 8]": lambda said: said["recipe"]["request"].update(size="64*32"),
    "id is ../../x": lambda said: said.update(id="../../x"),
    "str": lambda said: said.update(id=["x"]),
}


@pytest.fixture(scope="module")
def stopped(nano: Pipeline) -> Run:
    with pytest.raises(Cancelled) as cancelled:
        nano.generate(PROMPT, on_step=lambda p: p.step < 2, **QUICK)
    return cancelled.value.run


@pytest.mark.parametrize("words", [*WRONG_TENSORS, *WRONG_WORDS])
def test_a_state_that_does_not_fit_its_request_is_refused(
    words: str, stopped: Run, tmp_path: Path
) -> None:
    file = tmp_path / "run.safetensors"
    stopped.save(file)
    said, tensors = stored(file)
    WRONG_TENSORS.get(words, lambda _: None)(tensors)
    WRONG_WORDS.get(words, lambda _: None)(said)
    save_file(tensors, file, {"wanflow": json.dumps(said)})
    with pytest.raises(RequestError, match=re.escape(words)) as refused:
        Run.load(file)
    assert "not a saved wanflow run" in str(refused.value)


def stored(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        return json.loads(opened.metadata()["wanflow"]), tensors


def test_a_run_keeps_its_id_and_two_runs_of_a_recipe_have_two(
    nano: Pipeline, stopped: Run, tmp_path: Path
) -> None:
    file = tmp_path / "run.safetensors"
    stopped.save(file)
    assert Run.load(file).id == stopped.id == Run.header(file)[2]
    one, two = (nano.begin(wanflow.Request(PROMPT, **QUICK)) for _ in range(2))
    assert one.recipe == two.recipe and one.id != two.id
    assert nano.resume(one).id == one.id


def test_a_run_of_an_earlier_version_has_the_id_of_its_recipe(stopped: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    stopped.save(file)
    said, tensors = stored(file)
    del said["id"], said["sha256"]
    save_file(tensors, file, {"wanflow": json.dumps(said)})
    old = Run.load(file)
    assert old.id == Run.load(file).id != stopped.id
    assert torch.equal(old.state.x, stopped.state.x)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no names here")
def test_a_pipe_is_no_saved_run_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="regular file"):
        Run.load(tmp_path / "pipe")


def test_an_unfinished_run_is_not_decoded(nano: Pipeline) -> None:
    with pytest.raises(RequestError, match="step 0 of 4"):
        nano.finish(nano.begin(wanflow.Request(PROMPT, **QUICK)))


def test_guidance_one_leaves_the_second_branch_out(
    nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    forward = WanDiT.forward

    def counted(
        self: WanDiT, latent: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor:
        batches.append(latent.shape[0])
        return forward(self, latent, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(WanDiT, "forward", counted)
    nano.generate(PROMPT, cfg_high=1, cfg_low=1, **QUICK)
    assert batches == [1] * 4
    batches.clear()
    nano.generate(PROMPT, cfg_high=4, cfg_low=1, **QUICK)
    assert sorted(batches, reverse=True) == batches
    assert set(batches) == {1, 2}


def test_a_new_prompt_reads_no_expert_again_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that is not small encodes beside its experts; without room it frees them before."""
    from wanflow.loaders import parts, text_encoder

    read: list[Expert] = []
    open_expert = parts.open_expert

    def counted(checkpoint: Any, which: Expert, *rest: Any) -> Any:
        read.append(which)
        return open_expert(checkpoint, which, *rest)

    monkeypatch.setattr(parts, "is_small", lambda _: False)
    monkeypatch.setattr(parts, "open_expert", counted)
    pipe = wanflow.load("nano", device="cpu", keep_experts=True, text_cache=None)
    first = pipe.generate("a red circle", **QUICK)
    pipe.generate("a blue square", **QUICK)
    assert read == ["high", "low"]
    monkeypatch.setattr(text_encoder, "memory", lambda: (2**40, 2**20, True))
    again = pipe.generate("a red circle", **QUICK)
    assert read == ["high", "low"] * 2
    assert np.array_equal(first.frames, again.frames)


def test_one_expert_at_a_time(nano: Pipeline) -> None:
    """The high-noise expert is gone before the low-noise one is read, and the video is the same to
    the bit.
    """
    lean = wanflow.load("nano", device="cpu", keep_experts=False)
    alive: list[int] = []
    seen: list[weakref.ref[WanDiT]] = []
    read = lean.parts.expert

    def watched(which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT:
        model = read(which, strengths)
        if not seen or seen[-1]() is not model:
            seen.append(weakref.ref(model))
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))
        return model

    lean.parts.expert = watched  # type: ignore[method-assign]
    video = lean.generate(PROMPT, **QUICK)
    assert len(seen) == 2
    assert max(alive) == 1
    assert np.array_equal(video.frames, nano.generate(PROMPT, **QUICK).frames)


def test_nan_is_reported_at_its_step(tmp_path: Path) -> None:
    pipe = wanflow.load("nano", device="cpu")
    with torch.no_grad():
        pipe.parts.expert("low").head.head.bias.fill_(float("nan"))
    with pytest.raises(OutputError, match="step 2 gave NaN|step 3 gave NaN|step 4 gave NaN"):
        pipe.generate(PROMPT, **QUICK)


def test_a_constant_video_is_reported(tmp_path: Path) -> None:
    pipe = wanflow.load("nano", device="cpu")
    with torch.no_grad():
        for parameter in pipe.parts.vae().parameters():
            parameter.zero_()
    with pytest.raises(OutputError, match="constant"):
        pipe.generate(PROMPT, **QUICK)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": "65*64"}, "multiple of 16; the nearest is 64"),
        ({"size": "banana"}, "WIDTH"),
        ({"frame_num": 6}, "4n"),
        ({"frame_num": 5.0}, "whole number"),
        ({"sample_steps": 0}, "sample_steps"),
        ({"sample_shift": float("nan")}, "sample_shift"),
        ({"sample_solver": "heun"}, "unipc"),
        ({"cfg_high": -1}, "cfg_high"),
        ({"boundary": 2}, "boundary"),
        ({"fps": 0}, "fps"),
        ({"seed": 2**64}, "seed"),
        ({"stepz": 3}, "does not know stepz"),
    ],
)
def test_bad_requests_are_named(nano: Pipeline, wrong: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        nano.generate(PROMPT, **wrong)
    with pytest.raises(RequestError, match="prompt is empty"):
        nano.generate("  ")


def test_other_sizes_and_a_single_frame(nano: Pipeline, tmp_path: Path) -> None:
    assert nano.generate(
        PROMPT, size=(96, 48), frame_num=9, sample_steps=2, seed=1
    ).frames.shape == (9, 48, 96, 3)
    picture = nano.generate(PROMPT, frame_num=1, sample_steps=2, seed=1)
    assert read_recipe(picture.save(tmp_path / "one.png"))["request"]["frame_num"] == 1


def golden_parts(folder: Path) -> GoldenParts:
    """The reference models of T2V."""
    manifest = json.loads((folder / "pipeline.json").read_text())
    vae = json.loads((folder / "vae.json").read_text())
    config = DiTConfig(**manifest["config"])
    statistics = {"latent_mean": vae["latent_mean"], "latent_std": vae["latent_std"]}
    spec = replace(NANO, dit=config, vae=VAEConfig(**vae["config"], **statistics))
    cases = load_file(folder / manifest["cases_file"])
    models: dict[Expert, WanDiT] = {}
    for which in spec.expert_names:
        models[which] = WanDiT(config)
        models[which].load_state_dict(load_file(folder / manifest[f"{which}_weights_file"]))
    decoder = WanVAE(spec.vae)
    decoder.load_state_dict(load_file(folder / vae["weights_file"]))
    return GoldenParts(spec, models, decoder, [cases["context"], cases["context_null"]])


@pytest.mark.parametrize("together", [True, False])
def test_the_loop_gives_the_reference_latents(golden: Path, together: bool) -> None:
    manifest = json.loads((golden / "pipeline.json").read_text())
    cases = load_file(golden / manifest["cases_file"])
    limit = manifest["tolerance"]["latents"]
    pipe = Pipeline(golden_parts(golden).engine(together))
    for run in manifest["runs"]:
        request = wanflow.Request(
            "golden",
            "none",
            size=(manifest["width"], manifest["height"]),
            frame_num=manifest["frames"],
            sample_solver="unipc" if run["solver"] == "unipc" else "dpm++",
            sample_steps=run["steps"],
            sample_shift=run["shift"],
            cfg_high=manifest["guide_scale"]["high"],
            cfg_low=manifest["guide_scale"]["low"],
            boundary=manifest["boundary"],
            seed=0,
        )
        begun = replace(
            pipe.begin(request), state=SolverState(0, cases[f"{run['name']}.noise"].unsqueeze(0))
        )
        told: list[Progress] = []
        done = pipe.resume(begun, told.append)
        assert [p.expert for p in told] == run["expert"]
        assert [int(p.timestep) for p in told] == run["timesteps"]
        for index, progress in enumerate(told):
            torch.testing.assert_close(
                progress.latents[0],
                cases[f"{run['name']}.latents"][index + 1],
                atol=limit["atol"],
                rtol=limit["rtol"],
            )
        frames = np.concatenate(list(pipe.frames(done)))
        wanted = (
            ((cases[f"{run['name']}.video"].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0).numpy()
        )
        assert np.abs(frames - (wanted - 0.5)).max() <= 0.52  # truncated to whole values
