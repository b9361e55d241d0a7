"""LoRAs in a run: which file works where and when, live and fused, on any base, changed and removed
without reloading.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import PROMPT, refusal
from safetensors.torch import save_file
from torch import Tensor

import wanflow
from wanflow.api import Pipeline
from wanflow.checkpoint import load
from wanflow.cli import main
from wanflow.clipfiles import read_recipe
from wanflow.loaders import parts
from wanflow.loaders.parts import open_expert
from wanflow.lora import stack
from wanflow.lora.find import find_loras, lora_fingerprints
from wanflow.lora.reader import read_adapter
from wanflow.pipeline import Cancelled, Run
from wanflow.presets import NANO, T2V_A14B
from wanflow.recipe import Recipe
from wanflow.request import Lora, Request, parse_lora, with_settings
from wanflow.sampling.timeline import timeline

RUN: dict[str, Any] = {"frame_num": 5, "sample_steps": 4, "seed": 3}


def write_lora(
    file: Path, seed: int = 0, modules: tuple[str, ...] = (), size: float = 0.05, alpha: float = 2.0
) -> Path:
    """A random LoRA of rank 4 on some of nano's modules, in ComfyUI's naming."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    wide = {"ffn.0": (640, 160), "ffn.2": (160, 640)}
    names = modules or tuple(
        f"blocks.{n}.{m}"
        for n in range(6)
        for m in ("self_attn.q", "cross_attn.k", "cross_attn.v", "ffn.0", "ffn.2")
    )
    for name in names:
        out, into = wide.get(name.split(".", 2)[-1], (160, 160))
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(
            4, into, generator=generator
        )
        tensors[f"diffusion_model.{name}.lora_up.weight"] = (
            torch.randn(out, 4, generator=generator) * size
        )
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(alpha)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return wanflow.load("nano", device="cpu")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors"))


def latent(pipe: Pipeline, **request: Any) -> Tensor:
    return pipe.resume(pipe.begin(Request(PROMPT, **{**RUN, **request}))).state.x


# What a user writes


@pytest.mark.parametrize(
    ("text", "named", "high", "low", "steps"),
    [
        ("a.safetensors", None, 1, 1, (None, None)),
        ("a.safetensors", "high", 1, 0, (None, None)),
        ("a.safetensors@0.8", "low", 0, 0.8, (None, None)),
        ("a@high=1.0,low=0.6", "high", 1, 0.6, (None, None)),
        ("a@low=-0.5", None, 0, -0.5, (None, None)),
        ("a@1,steps=3-8", None, 1, 1, (3, 8)),
        ("a@steps=3-", None, 1, 1, (3, None)),
        ("a@high=2;steps=-4", None, 2, 0, (None, 4)),
        ("a@steps=2", None, 1, 1, (2, 2)),
        ("folder@x/a.pt", None, 1, 1, (None, None)),
    ],
)
def test_what_a_user_writes(
    text: str, named: Any, high: float, low: float, steps: tuple[int | None, int | None]
) -> None:
    lora = parse_lora(text).resolved(named)
    assert (lora.high, lora.low, lora.first, lora.last) == (high, low, *steps)
    assert parse_lora(str(lora)) == Lora(lora.path, 1.0, lora.high, lora.low, lora.first, lora.last)
    begin, end = steps[0] or 1, steps[1] or 99
    assert [lora.strength("high", step) for step in (begin, end)] == [high, high]
    assert not lora.strength("high", begin - 1) and (
        steps[1] is None or not lora.strength("low", end + 1)
    )


@pytest.mark.parametrize(
    "text",
    [
        "a@strong",
        "a@high",
        "a@steps=",
        "a@steps=8-3",
        "a@steps=0",
        "@1",
        "a@1,high=2",
        "a@mid=1",
        "a@inf",
        "a@1e9",
    ],
)
def test_what_cannot_be_read(text: str) -> None:
    assert text.split("@")[0] in refusal(lambda: parse_lora(text))


# What it does


def test_a_lora_changes_the_video_and_its_strength_matters(pipe: Pipeline, lora: str) -> None:
    plain, full, half = (
        latent(pipe),
        latent(pipe, lora=(lora,)),
        latent(pipe, lora=(f"{lora}@0.5",)),
    )
    assert 0 < (half - plain).abs().mean() < (full - plain).abs().mean()
    assert torch.equal(latent(pipe, lora=(f"{lora}@0",)), plain)
    assert torch.equal(latent(pipe), plain)  # gone again, and nothing was reloaded
    assert torch.equal(latent(pipe, lora=(lora,)), full)


def test_nothing_is_reloaded(lora: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        parts,
        "open_expert",
        lambda checkpoint, which, *rest: (
            read.append(which) or open_expert(checkpoint, which, *rest)
        ),
    )
    pipe = wanflow.load("nano", device="cpu")
    for value in ((lora,), (f"{lora}@0.3",), (), (lora, f"{lora}@-0.5")):
        latent(pipe, lora=value)
    assert read == ["high", "low"]


@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_file_is_read_once_a_run(
    lora: str, mode: str, keep: bool, prefetch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(
        stack, "read_adapter", lambda path, *how: read.append(path) or read_adapter(path, *how)
    )
    pipe = wanflow.load("nano", device="cpu", lora=mode, keep_experts=keep, prefetch=prefetch)
    held = pipe.parts.loras._held  # type: ignore[attr-defined]
    latent(pipe, lora=(lora,))
    assert read == [Path(lora)] and not any(held.values())
    latent(pipe, lora=(lora,))  # experts in memory have it; an expert that loads again needs it
    assert read == [Path(lora)] * (1 if keep else 2) and not any(held.values())
    pipe.parts.close()
    read.clear()
    latent(pipe)
    latent(pipe, lora=(lora, f"{lora}@-0.5"))
    assert read == [Path(lora)]


def effective(pipe: Pipeline, which: Any, name: str, strengths: tuple[float, ...]) -> Tensor:
    """The weight that an expert multiplies by, read off its output."""
    model = pipe.parts.expert(which, strengths)
    leaf = model.get_submodule(name)
    return leaf(torch.eye(160)).T - leaf(torch.zeros(1, 160)).T


def test_live_and_fused_give_w_plus_strength_alpha_over_rank_b_a(lora: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors, name = load_file(lora), "blocks.2.cross_attn.v"
    product = (
        tensors[f"diffusion_model.{name}.lora_up.weight"]
        @ tensors[f"diffusion_model.{name}.lora_down.weight"]
    )
    for mode in ("live", "fused"):
        pipe = wanflow.load("nano", device="cpu", lora=mode)
        plain = load.load_expert(pipe.parts.checkpoint, "low", torch.float32, "cpu").get_parameter(
            f"{name}.weight"
        )  # type: ignore[attr-defined]
        pipe.parts.loras.use((parse_lora(f"{lora}@high=1,low=0.6"),))  # type: ignore[attr-defined]
        torch.testing.assert_close(
            effective(pipe, "low", name, (0.6,)),
            plain + 0.6 * (2.0 / 4) * product,
            atol=3e-5,
            rtol=1e-5,
        )


@pytest.mark.slow
def test_fused_follows_live_through_changes_and_removal(lora: str, pipe: Pipeline) -> None:
    fused = wanflow.load("nano", device="cpu", lora="fused")
    for value in ((lora,), (f"{lora}@high=0.4,low=0",), (f"{lora}@1,steps=2-3",), ()):
        torch.testing.assert_close(
            latent(fused, lora=value), latent(pipe, lora=value), atol=1e-3, rtol=0
        )
    assert torch.equal(latent(fused), latent(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
def test_each_expert_has_its_strength(pipe: Pipeline, lora: str, keep: bool) -> None:
    other = wanflow.load("nano", device="cpu", keep_experts=keep)
    values = [
        latent(other, lora=(f"{lora}@{text}",))
        for text in ("high=1,low=0", "high=0,low=1", "high=1,low=1", "high=0.4,low=0.6")
    ]
    assert all(not torch.equal(a, b) for n, a in enumerate(values) for b in values[:n])
    assert torch.equal(values[2], latent(pipe, lora=(lora,)))


def test_a_pair_goes_where_it_belongs(pipe: Pipeline, tmp_path: Path) -> None:
    high, low = (
        write_lora(tmp_path / "x_high_noise.safetensors", 1),
        write_lora(tmp_path / "x_low_noise.safetensors", 2),
    )
    by_hand = latent(pipe, lora=(f"{high}@high=1", f"{low}@low=1"))
    assert torch.equal(latent(pipe, lora=(str(low), str(high))), by_hand)
    assert torch.equal(latent(pipe, lora=(str(tmp_path),)), by_hand)  # a folder with a pair
    assert not torch.equal(
        latent(pipe, lora=(f"{high}@high=1,low=1", f"{low}@high=1,low=1")), by_hand
    )
    assert not torch.equal(latent(pipe, lora=(f"{tmp_path}@0.5",)), by_hand)
    write_lora(tmp_path / "third.safetensors")
    assert "3 files" in refusal(lambda: latent(pipe, lora=(str(tmp_path),)))


def test_steps_of_a_lora(pipe: Pipeline, lora: str) -> None:
    """Only in the steps it is for: those before are the plain run's, and the text is prepared anew
    where the text's keys change.
    """
    states: dict[str, list[Tensor]] = {}
    for text in ("@0", "@1", "@1,steps=3-"):
        run = states[text] = []
        request = Request(PROMPT, **RUN, lora=(f"{lora}{text}",), boundary=0.0)
        pipe.resume(pipe.begin(request), lambda progress, run=run: run.append(progress.latents))  # type: ignore[misc]
    plain, late = states["@0"], states["@1,steps=3-"]
    assert all(torch.equal(plain[n], late[n]) for n in (0, 1)) and not torch.equal(
        plain[2], late[2]
    )
    # from there on it is the LoRA's own step: the same as a run with it that starts from that state
    run = pipe.begin(Request(PROMPT, **RUN, lora=(lora,), boundary=0.0))
    with pytest.raises(Cancelled) as stopped:
        pipe.resume(
            pipe.begin(Request(PROMPT, **RUN, boundary=0.0)), lambda progress: progress.step < 2
        )
    again = pipe.resume(replace(run, state=stopped.value.run.state))
    assert torch.equal(again.state.x, late[3])
    assert "begins at step 5" in refusal(lambda: latent(pipe, lora=(f"{lora}@1,steps=5-",)))


def test_two_of_them_add_up(pipe: Pipeline, lora: str, tmp_path: Path) -> None:
    half = latent(pipe, lora=(f"{lora}@0.5", f"{lora}@0.5"))
    torch.testing.assert_close(half, latent(pipe, lora=(lora,)), atol=1e-3, rtol=0)
    other = str(write_lora(tmp_path / "b.safetensors", 5))
    torch.testing.assert_close(
        latent(pipe, lora=(lora, other)), latent(pipe, lora=(other, lora)), atol=1e-3, rtol=0
    )


# Refusals and reports


def test_the_report(lora: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(lora) | {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.zeros(4, 160)
    }
    tensors |= {"diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.zeros(160, 4)}
    save_file(tensors, tmp_path / "i2v.safetensors")
    with caplog.at_level(logging.INFO, "wanflow"):
        latent(wanflow.load("nano", device="cpu"), lora=(str(tmp_path / "i2v.safetensors"),))
    assert (
        "applied 30 of 31 modules" in caplog.text
        and "k_img" in caplog.text
        and "rank 4" in caplog.text
    )


def test_what_is_refused(pipe: Pipeline, lora: str, tmp_path: Path) -> None:
    save_file(
        {
            "diffusion_model.blocks.77.ffn.0.lora_down.weight": torch.zeros(4, 160),
            "diffusion_model.blocks.77.ffn.0.lora_up.weight": torch.zeros(640, 4),
        },
        tmp_path / "far.safetensors",
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x07" * 20)
    (tmp_path / "empty").mkdir()
    for name in (
        "far.safetensors",
        "none.safetensors",
        "broken.safetensors",
        "missing.safetensors",
        "empty",
    ):
        assert name.split(".")[0] in refusal(
            lambda name=name: latent(pipe, lora=(str(tmp_path / name),))
        )  # type: ignore[misc]
    assert "live, fused" in refusal(lambda: wanflow.load("nano", lora="both"))
    torch.testing.assert_close(
        latent(pipe), latent(pipe, lora=(f"{lora}@0",)), atol=0, rtol=0
    )  # and the pipeline is as good as before


# Runs that are saved


def test_a_run_keeps_its_loras(pipe: Pipeline, lora: str, tmp_path: Path) -> None:
    request = Request(PROMPT, **RUN, lora=(f"{lora}@0.7,steps=2-",))
    whole = pipe.resume(pipe.begin(request))
    with pytest.raises(Cancelled) as cancelled:
        pipe.resume(pipe.begin(request), lambda progress: progress.step < 2)
    cancelled.value.run.save(tmp_path / "state.safetensors")
    loaded = Run.load(tmp_path / "state.safetensors")
    assert loaded.request.lora == (f"{lora}@high=0.7,low=0.7,steps=2-",)
    assert torch.equal(wanflow.load("nano", device="cpu").resume(loaded).state.x, whole.state.x)
    write_lora(Path(lora).with_name("other.safetensors"), 9).rename(
        moved := tmp_path / "moved.safetensors"
    )
    copy = Run.load(tmp_path / "state.safetensors")
    swapped = json.dumps(copy.recipe.to_json()).replace(lora, str(moved))
    other = replace(copy, recipe=Recipe.from_json(json.loads(swapped), "a file"))
    assert "another file" in refusal(lambda: pipe.resume(other))


@pytest.mark.slow
def test_the_command_line_and_replay(
    lora: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "a.mp4"
    base = [
        "generate",
        "--ckpt_dir",
        "nano",
        "--prompt",
        PROMPT,
        "--frame_num",
        "5",
        "--sample_steps",
        "3",
        "--seed",
        "5",
    ]
    assert (
        main(
            [
                *base,
                "--lora",
                f"{lora}@high=1.0,low=0.6",
                "--lora_mode",
                "fused",
                "--save_file",
                str(target),
            ]
        )
        == 0
    )
    assert "applied 30 of 30 modules (LoRA, rank 4, alpha 2)" in caplog.text
    recipe = read_recipe(target)
    assert (
        recipe["request"]["lora"] == [f"{lora}@high=1.0,low=0.6"]
        and recipe["runtime"]["lora"] == "fused"
        and recipe["loras"]
    )
    again = ["replay", str(target), "--trust_paths", "--save_file"]
    assert main([*again, str(tmp_path / "b.mp4")]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == target.read_bytes()
    original = Path(lora).read_bytes()
    try:
        write_lora(Path(lora), 77)
        assert main([*again, str(tmp_path / "c.mp4")]) == 2
        refused = capsys.readouterr().err.splitlines()[-1]
        assert lora in refused and "--force" in refused
    finally:
        Path(lora).write_bytes(original)
    assert main([*base, "--lora", "nowhere.safetensors"]) == 2
    assert "nowhere.safetensors" in capsys.readouterr().err


# Settings presets


def test_lightning_gives_the_model_the_published_timesteps() -> None:
    request = with_settings(Request("x"), "lightning4").complete(T2V_A14B)
    steps = timeline(request, T2V_A14B)
    assert [round(step.timestep, 2) for step in steps] == [1000, 937.5, 833.33, 625]
    assert [step.expert for step in steps] == ["high", "high", "low", "low"]
    assert (request.sample_solver, request.cfg_high, request.cfg_low) == ("euler", 1, 1)
    eight = with_settings(Request("x"), "lightning8").complete(T2V_A14B)
    assert (
        eight.sample_steps == 8
        and [step.expert for step in timeline(eight, T2V_A14B)].count("high") == 4
    )


def test_three_phases() -> None:
    request = with_settings(
        Request("x", lora=("a_high.pt", "b_low.pt")), "lightning-motion"
    ).complete(T2V_A14B)
    working = [step.expert for step in timeline(request, T2V_A14B)]
    high, low = (
        lora.resolved(which) for lora, which in zip(request.loras, ("high", "low"), strict=True)
    )  # type: ignore[arg-type]
    phases = [
        (which, request.guidance(which, n), high.strength(which, n), low.strength(which, n))
        for n, which in enumerate(working, 1)
    ]
    assert phases == [("high", 3.5, 0, 0)] * 2 + [("high", 1, 1, 0)] * 2 + [("low", 1, 0, 1)] * 4


def test_what_the_user_sets_stays(pipe: Pipeline, lora: str) -> None:
    request = with_settings(
        Request("x", sample_steps=6, cfg_low=2.0, lora=("a@1,steps=1-2",)), "lightning-motion"
    ).complete(NANO)
    assert (request.sample_steps, request.cfg_low, request.cfg_high) == (6, 2.0, 1.0)
    assert request.loras[0].first == 1
    video = pipe.generate(PROMPT, preset="lightning4", lora=(lora,), frame_num=5, seed=1)
    assert video.recipe["request"]["sample_steps"] == 4 and len(video.frames) == 5
    assert "lightning5" in refusal(lambda: pipe.generate(PROMPT, preset="lightning5"))


def test_guidance_of_the_first_steps(pipe: Pipeline) -> None:
    whole = latent(pipe, cfg_high=2.0, cfg_low=2.0)
    assert torch.equal(
        latent(pipe, cfg_high=1.0, cfg_low=1.0, cfg_start=2.0, cfg_start_steps=4), whole
    )
    assert not torch.equal(
        latent(pipe, cfg_high=1.0, cfg_low=1.0, cfg_start=2.0, cfg_start_steps=2), whole
    )
    assert "cfg_start_steps" in refusal(lambda: latent(pipe, cfg_start_steps=5))


def test_a_preset_without_a_lora_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [
        "generate",
        "--ckpt_dir",
        "nano",
        "--prompt",
        PROMPT,
        "--frame_num",
        "5",
        "--preset",
        "lightning4",
    ]
    assert main([*command, "--save_file", str(tmp_path / "a.mp4")]) == 0
    assert "no --lora is given" in caplog.text


def test_a_missing_file_is_found_before_anything_is_read(lora: str) -> None:
    missing = str(Path(lora).parent / "x")
    assert missing in refusal(lambda: find_loras((Lora(missing),)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_regular_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        assert "give a regular file" in refusal(lambda path=path: find_loras((Lora(path),)))
        assert "give a regular file" in refusal(lambda path=path: lora_fingerprints((Lora(path),)))
    assert "not a usable path" in refusal(lambda: find_loras((Lora("~nosuchuser/x"),)))
    assert "at most 64 items" in refusal(Request("a", lora=("x",) * 100_000).loras)
