"""Pictures on the command line: which are read, where a recipe's are, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.recipe_mutations import GOOD
from helpers.tiny import tiny_family
from PIL import Image

import wanflow
from wanflow.cli import _parse, main
from wanflow.cli.flags import request_from
from wanflow.cli.generate import _refuse_changes, _replay_job
from wanflow.clipfiles import read_frames, read_recipe
from wanflow.config import RequestError
from wanflow.front import with_pictures
from wanflow.media import recipe_tags, save_picture
from wanflow.pictures import open_picture
from wanflow.recipe import Recipe
from wanflow.request import Picture


def photo(path: str, seed: int = 0) -> str:
    noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Path(path).parent.mkdir(exist_ok=True)
    Image.fromarray(noise).save(path)
    return path


def record(path: str, **changes: Any) -> dict[str, Any]:
    return {**vars(open_picture(path).record), **changes}


def made(path: str, **request: Any) -> str:
    """A picture whose recipe begins with pictures."""
    Path(path).parent.mkdir(exist_ok=True)
    recipe = {**GOOD, "request": {**GOOD["request"], "frame_num": 5, **request}}
    save_picture(Path(path), np.zeros((16, 16, 3), np.uint8), recipe_tags(recipe, "x"))
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    return line


def replayed(*argv: str) -> Any:
    return _replay_job(_parse(["replay", *argv])).request


def test_replay_finds_the_picture(in_tmp: Path) -> None:
    """Where a flag says, in the folder of the video, or anywhere for who trusts the recipe."""
    kept = record(photo("in/a.png"))
    video = made("out/v.png", image=kept)
    for flags in (["--image", "in/a.png"], ["--trust_paths"], ["--lora_dir", "in"]):
        request = replayed(video, *flags)
        assert isinstance(request.image, Picture) and request.exact_size
        assert (request.image.sha256, request.size) == (kept["sha256"], (64, 64))
    (in_tmp / "in/a.png").rename("out/a.png")  # beside the video, by its name
    assert replayed(video).image.file == "out/a.png"
    last = made("out/w.png", image=kept, last_image=record(photo("out/b.png", 1)))
    request = replayed(last)
    assert request.last_image.sha256 == open_picture("out/b.png").sha256 != request.image.sha256
    Image.open("out/a.png").save("other.bmp")  # another file of the same pixels
    assert replayed(video, "--image", "other.bmp").image.file == "other.bmp"


def test_replay_asks_for_a_picture_by_its_hash(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = record(photo("in/a.png"))
    ask = f"name the picture of 64 x 48 pixels, sha256 {kept['sha256'][:12]} with --image FILE"
    elsewhere = refused(capsys, "replay", made("out/v.png", image=kept))
    assert "in/a.png" in elsewhere and ask in elsewhere and "--trust_paths" in elsewhere
    os.remove("in/a.png")
    gone = refused(capsys, "replay", "out/v.png", "--trust_paths")
    assert "in/a.png: there is no such file" in gone and ask in gone
    photo("out/a.png", seed=1)
    for flags in ([], ["--image", "out/a.png"]):
        other = refused(capsys, "replay", "out/v.png", *flags)
        assert "out/a.png is another picture (64 x 48 pixels, sha256 " in other and ask in other
        assert "wanflow generate --recipe VIDEO --image FILE" in other
    array = refused(capsys, "replay", made("out/w.png", last_image={**kept, "file": ""}))
    assert "its recipe names no file of its picture" in array
    assert ask.replace("--image", "--last_image") in array and "--trust_paths" not in array
    assert "no such file" in refused(capsys, "replay", "out/w.png", "--last_image", "gone.png")


def test_nothing_looks_into_what_only_a_recipe_names(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("pipe")  # opening one would hang
    Path("out").mkdir()
    kept = {"sha256": "0" * 64, "width": 64, "height": 48}
    for n, name in enumerate(("pipe", f"{in_tmp}/pipe", "out/../pipe", "/dev/zero", "\x1b[2Jx")):
        video = made(f"out/{n}.png", image={**kept, "file": name})
        for argv in (["replay", video], ["generate", "--recipe", video, "--prompt", "a"]):
            assert "its recipe names a picture at" in refused(capsys, *argv)
    os.mkfifo("out/pipe")  # beside the video
    assert "give a regular file" in refused(capsys, "replay", "out/0.png")
    assert "not a usable path" in refused(
        capsys, "replay", made("x.png", image={**kept, "file": "~nosuchuser/x"})
    )


def test_a_recipe_as_a_base_keeps_its_picture_or_takes_another(in_tmp: Path) -> None:
    kept = record(photo("a.png"))
    video = made("v.png", image=kept, size=[48, 32])
    other = photo("b.png", 1)

    def based(*flags: str) -> wanflow.Request:
        argv = ["generate", "--recipe", video, "--ckpt_dir", "nano", *flags]
        return with_pictures(request_from(_parse(argv)))

    same = based("--base_seed", "9")
    assert isinstance(same.image, Picture) and same.image.sha256 == kept["sha256"]
    assert (same.exact_size, same.size, same.seed) == (True, "48*32", 9)
    new = based("--image", other)
    assert isinstance(new.image, Picture) and new.image.file == other
    assert not new.exact_size and not based("--size", "64*64").exact_size
    assert based("--size", "64*64", "--exact_size").exact_size
    os.remove("a.png")
    with pytest.raises(RequestError, match=r"a\.png: there is no such file; name the picture of"):
        based()
    assert based("--image", other).size == "48*32"


def test_a_saved_run_keeps_its_picture(in_tmp: Path) -> None:
    request = {**GOOD["request"], "image": record(photo("a.png"))}
    recipe = Recipe.from_json({**GOOD, "request": request}, "x")
    os.rename("a.png", "b.png")
    _refuse_changes(_parse(["generate", "--resume", "x", "--image", "b.png"]), recipe)
    with pytest.raises(RequestError, match=r"--image c\.png \(it has 64 x 48 pixels, sha256"):
        _refuse_changes(_parse(["generate", "--resume", "x", "--image", photo("c.png", 1)]), recipe)
    plain = Recipe.from_json(GOOD, "x")
    with pytest.raises(RequestError, match=r"--last_image b\.png \(it has None\)"):
        _refuse_changes(_parse(["generate", "--resume", "x", "--last_image", "b.png"]), plain)


def test_a_model_that_takes_none_refuses_a_picture(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", "--ckpt_dir", "nano", "--prompt", "a red circle"]
    for flag in ("--image", "--last_image"):
        told = refused(capsys, *line, flag, photo("a.png"))
        assert "takes no picture" in told and "I2V-A14B" in told and "TI2V-5B" in told
        assert "takes no picture" in refused(capsys, "plan", "--ckpt_dir", "nano", flag, "a.png")
        assert "gone.png: there is no such file" in refused(capsys, *line, flag, "gone.png")
        assert "is a folder" in refused(capsys, *line, flag, ".")
        assert "is an address" in refused(capsys, *line, flag, "https://example.com/a.png")
    Path("text.png").write_text("text")
    assert "not a picture in JPEG" in refused(capsys, *line, "--image", "text.png")


def test_inspect_shows_the_picture(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = record(photo("a.png"), file="/x/\x1b[2J.png")
    assert main(["inspect", made("v.png", image=kept, last_image=record("a.png"))]) == 0
    told = capsys.readouterr().out
    assert f"64 x 48 pixels, sha256 {kept['sha256'][:12]}, from a.png" in told
    assert "\x1b" not in told and "wanflow replay v.png --trust_paths" in told
    assert main(["inspect", "v.png", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {"what": "last_image", "path": "a.png"} in files and len(files) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "0" * 63},
        {"sha256": "G" * 64},
        {"sha256": "0" * 64 + "\n"},
        {"sha256": 5},
        {"width": 0},
        {"width": -1},
        {"height": 2**31},
        {"height": 1.5},
        {"height": True},
        {"height": "64"},
        {"file": None},
        {"file": "x" * 5000},
        {"more": 1},
        None,
        [],
        "a.png",
        5,
    ],
)
def test_a_damaged_record_is_refused(changes: Any) -> None:
    kept = {"sha256": "0f" * 32, "width": 64, "height": 48, "file": "a.png"}
    good = json.loads(json.dumps(GOOD))
    good["request"]["image"] = kept
    assert Recipe.from_json(good, "x").to_json()["request"]["image"] == kept
    good["request"]["image"] = {**kept, **changes} if isinstance(changes, dict) else changes
    if changes is None:
        assert Recipe.from_json(good, "x").request.image is None
        return
    with pytest.raises(RequestError, match="x: the recipe is damaged"):
        Recipe.from_json(good, "x")
    if isinstance(changes, dict):
        del good["request"]["image"]["sha256"]
        with pytest.raises(RequestError, match="x: the recipe is damaged"):
            Recipe.from_json(good, "x")


# --- with a model that takes pictures ---


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_family(tmp_path_factory.mktemp("i2v"), "i2v"))


def test_a_video_of_a_picture_is_made_again_to_the_bit(
    in_tmp: Path, i2v: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--ckpt_dir", i2v, "--device", "cpu"]
    make = ["generate", *model, "--prompt", "a red circle", "--base_seed", "1"]
    assert "makes a video of a picture: give one with --image FILE" in refused(capsys, *make)
    picture = photo("in/a.png")
    assert main([*make, "--image", picture, "--save_file", "v.png", "--frame_num", "1"]) == 0
    kept = read_recipe(Path("v.png"))["request"]
    assert kept["image"] == record(picture) and kept["size"] == [48, 32]  # of the area 64 * 32
    os.rename(picture, "in/b.png")
    assert main(["replay", "v.png", *model, "--image", "in/b.png", "--save_file", "w.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("v.png")), np.asarray(Image.open("w.png")))
    pipe = wanflow.load(i2v, device="cpu")
    array = np.asarray(Image.open("in/b.png"))
    asked = {"seed": 1, "frame_num": 1}
    (video, again) = pipe.generate(["a red circle"] * 2, image=array, **asked)
    assert np.array_equal(video.frames[0], np.asarray(Image.open("v.png")))
    assert np.array_equal(video.frames, again.frames)
    assert video.recipe["request"]["image"] == record("in/b.png", file="")
    other = pipe.generate("a red circle", image=array[::-1], **asked)
    assert not np.array_equal(video.frames, other.frames)
    with pytest.raises(RequestError, match="makes a video of a picture: give one with image"):
        pipe.generate("a red circle")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_a_saved_run_goes_on_without_its_picture(
    in_tmp: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--ckpt_dir", str(tiny_family(tmp_path / "model", kind)), "--device", "cpu"]
    pictures = ["--image", photo("a.png")]
    pictures += ["--last_image", photo("b.png", 1)] if kind == "i2v" else []
    make = ["generate", *model, "--prompt", "a red circle", "--base_seed", "1", *pictures]
    assert main([*make, "--save_file", "whole.mkv"]) == 0

    def stop(pipe: wanflow.Pipeline, run: Any, on_step: Any = None) -> Any:
        def cancel(progress: Any) -> bool:
            on_step(progress)
            raise KeyboardInterrupt

        return wanflow.api.denoise(pipe.engine, run, cancel)

    with monkeypatch.context() as patched:
        patched.setattr(wanflow.api.Pipeline, "resume", stop)
        assert main([*make, "--save_file", "half.mkv"]) == 130
    for name in ("a.png", "b.png"):
        Path(name).unlink(missing_ok=True)
    state = "half.latent.safetensors"
    assert main(["inspect", state]) == 0
    assert main(["generate", "--resume", state, *model, "--save_file", "half.mkv"]) == 0
    whole, half = (read_frames(Path(name))[0] for name in ("whole.mkv", "half.mkv"))
    assert np.array_equal(whole, half)
