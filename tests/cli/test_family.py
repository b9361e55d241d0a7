"""Every command over the family: tasks, sizes, pictures, names, and what is refused in words."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.answers import Answer, server
from helpers.common import PROMPT
from helpers.tiny import tiny_family
from PIL import Image

import wanflow
from wanflow.cli import main
from wanflow.clipfiles import read_frames, read_recipe

ROOT = Path(__file__).parents[2]


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Run a command line that is refused with exit code 2, and return the line that says why."""
    try:
        code = main(shlex.split(line))
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    assert (code, said.out) == (2, ""), said.err
    *before, text = said.err.splitlines()  # `plan` and `bench` say first what they do
    assert "Traceback" not in said.err and text.startswith("wanflow: ")
    assert not before or line.startswith(("plan", "bench"))
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with both models in small, pictures, and files that are none; the current one."""
    folder = tmp_path_factory.mktemp("family")
    with chdir(folder):
        for kind in ("i2v", "ti2v"):
            tiny_family(folder / kind, kind)
        pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save("photo.png")
        Image.fromarray(pixels).save("wide.png")
        Image.new("RGB", (600, 40), "red").save("long.png")
        frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
        frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
        Path("text.png").write_text("no picture")
        yield folder


NANO = f"generate --ckpt_dir nano --prompt '{PROMPT}' "
I2V = "generate --ckpt_dir i2v --prompt 'a red circle' "
TI2V = "generate --ckpt_dir ti2v --prompt 'a red circle' "
PHOTO = "--image photo.png "


@pytest.mark.parametrize(
    ("line", "words"),
    [
        # tasks
        (NANO + "--task i2v-A14B " + PHOTO, "i2v-A14B nano t2v-A14B"),
        (NANO + "--task ti2v-5B", "ti2v-5B nano t2v-A14B"),
        (NANO + "--task animate-14B", "animate-14B i2v-A14B ti2v-5B"),
        (I2V + PHOTO + "--task ti2v-5B", "ti2v-5B Wan2.2-TI2V-5B tiny-i2v i2v-A14B --ckpt_dir"),
        (I2V + "--task t2v-A14B", "t2v-A14B Wan2.2-T2V-A14B tiny-i2v i2v-A14B --ckpt_dir"),
        (I2V + PHOTO + "--task s2v-14B", "s2v-14B"),
        (TI2V + "--task t2v-A14B", "t2v-A14B tiny-ti2v ti2v-5B"),
        (TI2V + PHOTO + "--task i2v-A14B", "i2v-A14B tiny-ti2v ti2v-5B"),
        # pictures
        (I2V, "tiny-i2v --image --last_image"),
        (I2V + "--task i2v-A14B", "I2V-A14B --image"),
        (NANO + PHOTO, "image nano I2V-A14B TI2V-5B"),
        (NANO + "--task t2v-A14B " + PHOTO, "image I2V-A14B TI2V-5B"),
        (TI2V + "--last_image photo.png", "last_image tiny-ti2v I2V-A14B"),
        (TI2V + "--task ti2v-5B --last_image photo.png", "last_image I2V-A14B"),
        (I2V + PHOTO + "--last_image photo.png --frame_num 1", "last_image frame_num 5"),
        (I2V + "--image none.png", "none.png"),
        (TI2V + "--image none.png", "none.png"),
        (I2V + PHOTO + "--last_image none.png", "none.png"),
        (I2V + "--image text.png", "text.png PNG"),
        (TI2V + "--image i2v", "i2v"),
        (TI2V + "--image moving.gif", "moving.gif"),
        (I2V + "--image long.png", "600*40 crop"),
        (TI2V + "--image long.png", "600*40 crop"),
        # sizes and lengths
        (I2V + PHOTO + "--size 48*40", "40 16 --size"),
        (I2V + PHOTO + "--size 7", "WIDTH"),
        (I2V + PHOTO + "--size 32*24 --exact_size", "24 16"),
        (TI2V + "--size 64*48", "48 32 --size"),
        (TI2V + "--size 1280*720", "720 --size 1280*704"),
        (TI2V + "--task ti2v-5B --size 1280*720", "720 --size 1280*704"),
        (TI2V + PHOTO + "--size 48*48 --exact_size", "48 32"),
        (I2V + PHOTO + "--frame_num 6", "frame_num 4n+1 5"),
        (TI2V + "--frame_num 120", "frame_num 121"),
        # parts
        (I2V + PHOTO + "--dit photo.png", "photo.png"),
        (TI2V + "--high photo.png", "--low"),
        (I2V + PHOTO + "--vae ti2v/Wan2.2_VAE.pth", "Wan2.2_VAE.pth"),
        (TI2V + "--vae i2v/Wan2.1_VAE.pth", "Wan2.1_VAE.pth"),
        # guidance, LoRAs, processes
        (TI2V + "--cfg_high 3 --cfg_low 4", "cfg_high 3.0 cfg_low 4.0 one"),
        (TI2V + "--boundary 0.9", "boundary 0.9"),
        (TI2V + "--lora photo.png@high=1,low=0.6", "lora FILE@0.8"),
        (I2V + PHOTO + "--lora none.safetensors", "none.safetensors"),
        (I2V + PHOTO + "--lora photo.png@high=x", "high=1,low=0.6"),
        (I2V + PHOTO + "--sample_guide_scale 3.5,3.5", "--sample_guide_scale number"),
        (I2V + PHOTO + "--boundary 2", "boundary"),
        (I2V + PHOTO + "--cfg_high -1", "cfg_high"),
        (TI2V + "--parallel cfg3", "cfg 1 2"),
        (I2V + PHOTO + "--save_file x.png", "PNG one frame"),
        # other commands
        ("plan --task ti2v-5B --size 1280*720", "--size 1280*704"),
        ("plan --task t2v-A14B --image photo.png", "I2V-A14B"),
        ("plan --task ti2v-5B --last_image photo.png", "I2V-A14B"),
        ("plan --ckpt_dir i2v --task ti2v-5B", "tiny-i2v i2v-A14B"),
        ("bench --ckpt_dir i2v --image none.png", "none.png"),
        ("bench --ckpt_dir ti2v --size 64*48", "32"),
        ("replay photo.png --image photo.png", "photo.png recipe"),
        ("generate --resume none.latent.safetensors --task i2v-A14B", "none.latent.safetensors"),
        ("convert ti2v out --to fp9", "fp9"),
    ],
)
def test_bad_input_gets_one_line(
    line: str, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.iterdir())
    text = refused(capsys, line)
    assert [word for word in words.split() if word not in text] == [], text
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--task i2v-A14B --ckpt_dir ./Wan2.2-I2V-A14B", "80 GB --task i2v-A14B"),
        ("--task ti2v-5B --ckpt_dir ./weights", "24 GB --task ti2v-5B"),
        ("--ckpt_dir ./TI2V_5B_weights", "24 GB --task ti2v-5B"),
        ("--ckpt_dir ./I2V_A14B_weights", "80 GB --task i2v-A14B"),
    ],
)
def test_missing_weights_are_those_of_the_task(
    command: str, words: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("Wan2.2-T2V-A14B", "T2V_A14B_weights"):  # no suggestion for another model
        Path(folder).mkdir()
    Image.new("RGB", (64, 48), "red").save("photo.png")
    line = f"generate {command} --prompt 'a red circle' --image photo.png"
    assert main(shlex.split(line)) == 2
    said = capsys.readouterr().err
    assert "is missing" in said and "did you mean" not in said
    first, second = words.split(" GB ")
    assert f"with {first} GB" in said and f"wanflow download {second} --local_dir" in said


# The commands of the official README, word for word; a tiny model gets a small size after them.
I2V_COMMAND = (
    "--task i2v-A14B --size 1280*720 --ckpt_dir ./Wan2.2-I2V-A14B --offload_model True"
    " --convert_model_dtype --image photo.png --prompt 'a red circle'"
)
TI2V_COMMAND = (
    "--task ti2v-5B --size 1280*704 --ckpt_dir ./Wan2.2-TI2V-5B --offload_model True"
    " --convert_model_dtype --t5_cpu --prompt 'a red circle'"
)
SMALL = " --frame_num 5 --sample_steps 2 --seed 3 --device cpu"


@pytest.mark.parametrize(
    ("command", "small", "size", "words"),
    [
        (I2V_COMMAND, "64*32", "48x32", "first frame photo.png (64*48)"),
        (TI2V_COMMAND, "64*32", "64x32", "2 unipc steps ->"),
        (TI2V_COMMAND + " --image photo.png", "64*64", "64x64", "first frame photo.png (64*48)"),
    ],
)
def test_the_published_commands(
    command: str,
    small: str,
    size: str,
    words: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, kind in (("Wan2.2-I2V-A14B", "i2v"), ("Wan2.2-TI2V-5B", "ti2v")):
        (tmp_path / name).symlink_to(place / kind)
    (tmp_path / "photo.png").symlink_to(place / "photo.png")
    monkeypatch.chdir(tmp_path)
    extra = f" --size {small} {SMALL} --contact_sheet"
    assert main(["generate", *shlex.split(command + extra)]) == 0
    said = capsys.readouterr()
    file = Path(said.out.strip())
    task, width, height = command.split()[1], *map(int, size.split("x"))
    assert file.name.startswith(f"{task}_{size}_a-red-circle_seed3_")
    assert file.with_name(f"{file.stem}_sheet.png").exists()
    frames, fps = read_frames(file)
    assert (frames.shape, fps) == ((5, height, width, 3), 16 if task == "i2v-A14B" else 24)
    assert f"{width}*{height}, 5 frames at {fps:g} fps" in said.err and words in said.err
    assert ("expert" in said.err) == (task == "i2v-A14B")
    assert re.search("step 2/2, (transformer|low-noise expert), sigma", said.err)
    request = read_recipe(file)["request"]
    wanted = {"sample_shift": 5.0, "cfg_high": 3.5 if task == "i2v-A14B" else 5.0}
    assert {name: request[name] for name in wanted} == wanted


def _reaches(step: int, progress: wanflow.Progress) -> bool:
    return progress.step != step


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_a_video_of_a_picture_is_made_again_and_finished(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("photo.png", "gone.png")
    settings = {"size": "64*64", "frame_num": 5, "sample_steps": 3, "seed": 3}
    flags = " ".join(f"--{name} {value}" for name, value in settings.items())
    line = f"generate --ckpt_dir {kind} --prompt 'a red circle' --image gone.png {flags}"

    def frames(words: str) -> np.ndarray:
        file = f"{kind}-{len(made)}.mp4"
        assert main([*shlex.split(words), "--save_file", file, "--device", "cpu"]) == 0
        made.append(file)
        return read_frames(Path(file))[0]

    made = list[str]()
    first = frames(line)
    assert np.array_equal(frames(f"replay {made[0]} --ckpt_dir {kind}"), first)
    other = frames(f"generate --recipe {made[0]} --ckpt_dir {kind} --seed 4")
    assert other.shape == first.shape and not np.array_equal(other, first)
    capsys.readouterr()
    assert main(["inspect", made[0]]) == 0
    assert re.search("image .*64 x 48 pixels.*gone.png", capsys.readouterr().out)

    pipe = wanflow.load(kind, device="cpu", progress=False)
    for step in (1, 3):
        stop = partial(_reaches, step)
        with pytest.raises(wanflow.Cancelled) as stopped:
            pipe.generate("a red circle", stop, image="gone.png", **settings)
        stopped.value.run.save(Path(f"{kind}-step{step}.latent.safetensors"))
    Path("gone.png").unlink()
    again = f"--ckpt_dir {kind}"
    assert np.array_equal(
        frames(f"generate --resume {kind}-step1.latent.safetensors {again}"), first
    )
    assert np.array_equal(frames(f"decode {kind}-step3.latent.safetensors {again}"), first)
    capsys.readouterr()
    assert "gone.png" in refused(capsys, f"replay {made[0]} {again}")


@pytest.mark.slow
def test_the_published_command_of_several_gpus(place: Path) -> None:
    command = (
        "--task ti2v-5B --size 64*64 --ckpt_dir ./ti2v --image photo.png --prompt 'a red circle'"
    )
    words = shlex.split(command + SMALL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    several = ["--dit_fsdp", "--t5_fsdp", "--ulysses_size", "2", "--save_file", "two.mp4"]
    line = [*torchrun, str(ROOT / "generate.py"), *words, *several]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert main(["generate", *words, "--save_file", "one.mp4"]) == 0
    one, two = (read_frames(Path(name))[0].astype(int) for name in ("one.mp4", "two.mp4"))
    assert one.shape == two.shape and np.abs(one - two).mean() < 1


def test_a_vision_model_extends_a_prompt_with_a_picture(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"choices": [{"message": {"content": "a red circle moves left"}}]}
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    line = I2V + PHOTO + SMALL + " --use_prompt_extend --prompt_extend_method dashscope"
    with server(lambda path: Answer(json.dumps(answer).encode())) as (url, asked):
        monkeypatch.setenv("DASH_API_URL", url)
        assert main(shlex.split(f"{line} --save_file extended.mp4")) == 0
    assert read_recipe(Path("extended.mp4"))["request"]["prompt"] == "a red circle moves left"
    (one,) = asked
    (picture, text) = json.loads(one.body)["messages"][1]["content"]
    assert (picture["type"], text["text"]) == ("image_url", "a red circle")
