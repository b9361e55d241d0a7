"""Runs of small I2V-A14B and TI2V-5B: resumed without the pictures' files, and short of memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.common import PROMPT, refusal
from helpers.features import KINDS, made, picture
from PIL import Image

import wanflow
from wanflow.api import Pipeline
from wanflow.models.vae import WanVAE
from wanflow.pipeline import Cancelled, Run
from wanflow.request import Request

PICTURED = [kind for kind, (_, pictures) in KINDS.items() if pictures]
QUICK = ("i2v, both pictures", "ti2v, picture")
CLIP: dict[str, Any] = {"frame_num": 5, "sample_steps": 3, "seed": 3}


def opened(kind: str, **runtime: Any) -> Pipeline:
    name = KINDS[kind][0]
    return wanflow.load(made(name) / name, device="cpu", **runtime)


def asked(kind: str) -> dict[str, Any]:
    return CLIP | {which: picture(which) for which in KINDS[kind][1]}


@pytest.mark.parametrize("stop", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in PICTURED]
)
def test_a_run_goes_on_in_another_pipeline_without_the_pictures_files(
    kind: str, stop: int, tmp_path: Path
) -> None:
    files = {which: tmp_path / f"{which}.png" for which in KINDS[kind][1]}
    for which, file in files.items():
        Image.fromarray(picture(which).pixels).save(file)
    whole = opened(kind).generate(PROMPT, **CLIP, **files)
    with pytest.raises(Cancelled) as stopped:
        opened(kind).generate(PROMPT, on_step=lambda told: told.step < stop, **CLIP, **files)
    stopped.value.run.save(tmp_path / "run.safetensors")
    for file in files.values():
        file.unlink()
    loaded = Run.load(tmp_path / "run.safetensors")
    assert loaded.state.index == stop
    pipe = opened(kind)
    assert np.array_equal(pipe.finish(pipe.resume(loaded)).frames, whole.frames)


def out_of_memory_while(
    monkeypatch: pytest.MonkeyPatch, pipe: Pipeline, holds: bool
) -> list[Exception]:
    """Let the encode fail, always, or only while an expert is in memory; note the failures."""
    encode, failures = WanVAE.encode_parts, list[Exception]()

    def failing(vae: WanVAE, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        held = any(pipe.parts.holds(expert) for expert in pipe.parts.spec.expert_names)
        if held or not holds:
            failures.append(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
            raise failures[-1]
        return encode(vae, parts)

    monkeypatch.setattr(WanVAE, "encode_parts", failing)
    return failures


@pytest.mark.parametrize("kind", ["i2v", "ti2v, picture"])
def test_pictures_without_room_beside_the_experts_are_encoded_without_them(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = opened(kind, keep_experts=True)
    first = pipe.generate(PROMPT, **asked(kind)).frames
    failures = out_of_memory_while(monkeypatch, pipe, holds=True)
    with caplog.at_level(logging.WARNING):
        again = pipe.generate(PROMPT, **asked(kind)).frames
    assert len(failures) == 1 and np.array_equal(first, again)
    told = [line for line in caplog.messages if "out of memory" in line]
    assert len(told) == 1 and "going on without the experts" in told[0]


def test_pictures_without_any_room_say_what_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = opened("i2v", keep_experts=True)
    failures = out_of_memory_while(monkeypatch, pipe, holds=False)
    with pytest.raises(torch.OutOfMemoryError) as ended:
        pipe.generate(PROMPT, **asked("i2v"))
    assert len(failures) == 1
    (note,) = ended.value.__notes__
    assert note.startswith("in encoding the pictures: ") and "offload_model True" in note
    assert "a smaller --size or fewer frames" in note or "a smaller size or fewer frames" in note
    assert pipe.parts.go_on_with == {"offload_model": True}


@pytest.mark.parametrize("kind", ["i2v", "i2v, last picture", "ti2v, picture"])
def test_another_picture_makes_another_video(kind: str) -> None:
    pipe = opened(kind)
    name, (which,) = KINDS[kind]
    frames = pipe.generate(PROMPT, **asked(kind)).frames
    assert np.array_equal(frames, pipe.generate(PROMPT, **asked(kind)).frames)
    other = picture("image" if which == "last_image" else "last_image")
    assert not np.array_equal(frames, pipe.generate(PROMPT, **CLIP, **{which: other}).frames)
    if name == "ti2v":
        assert not np.array_equal(frames, pipe.generate(PROMPT, size="64*32", **CLIP).frames)


def test_the_first_latent_frame_of_ti2v_is_the_picture_at_every_step() -> None:
    pipe, seen = opened("ti2v, picture"), []
    request = Request(PROMPT, **asked("ti2v, picture"))
    run = pipe.resume(pipe.begin(request), lambda told: seen.append(told.latents[:, :, :1]))
    with torch.no_grad():
        first = pipe.parts.vae().encode(run.pictures["first"][None, :, None])
    assert len(seen) == CLIP["sample_steps"]
    assert all(torch.equal(each, first) for each in seen)


def test_a_lora_has_one_strength_on_one_network() -> None:
    """A file that was found, in a recipe of an A14B model too, has one for each expert."""
    file, pipe = str(made("ti2v") / "both.safetensors"), opened("ti2v")
    for text in (f"{file}@0.5", f"{file}@high=0.5,low=0.5"):
        run = pipe.begin(Request(PROMPT, lora=(text,), **CLIP))
        assert run.request.lora == (f"{file}@0.5",)
        assert [lora.strength("dit", 1) for lora in run.request.loras] == [0.5]
    words = refusal(lambda: pipe.begin(Request(PROMPT, lora=(f"{file}@high=1,low=0",), **CLIP)))
    assert "write FILE@0.8 in place of high= and low=" in words
