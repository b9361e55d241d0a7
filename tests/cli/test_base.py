"""Flags override a recipe, which overrides a config file, which overrides the environment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.common import PROMPT

from wanflow.cli import _parse, main
from wanflow.cli.flags import request_from, runtime_from
from wanflow.clipfiles import read_recipe
from wanflow.config import RequestError

SHORT = ["--sample_steps", "2", "--frame_num", "5", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANFLOW_CKPT_DIR", raising=False)
    return tmp_path


@pytest.fixture
def made(in_tmp: Path) -> dict[str, Any]:
    """A video with values that are no defaults; its recipe."""
    flags = ["--seed", "5", "--cfg_high", "2", "--noise_device", "cpu", "--vae_tile", "64"]
    argv = ["generate", "--ckpt_dir", "nano", "--prompt", PROMPT, *SHORT, *flags]
    assert main([*argv, "--save_file", "a.mp4"]) == 0
    return read_recipe(Path("a.mp4"))


def write(text: str, name: str = "w.toml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


CONFIG = """
ckpt_dir = "nano"
sample_steps = 7
gpu = "rtx4090"            # of plan; no flag of generate
[generate]
sample_steps = 8
keep_experts = false       # a field's name: --offload_model true
t5_cpu = true
fps = 12
lora = ["a.safetensors@0.5", "b.safetensors"]
negative_prompt = "-- dashes first"
[plan]
sample_steps = 9
"""


def test_a_config_file_says_what_flags_do_not(in_tmp: Path) -> None:
    args = _parse(["generate", "--config", write(CONFIG), "--fps", "10", "--lora", "c"])
    request, runtime = request_from(args), runtime_from(args)
    assert (args.ckpt_dir, request.sample_steps, request.fps) == ("nano", 8, 10.0)
    assert request.lora == ("c",) and request.negative_prompt == "-- dashes first"
    assert runtime.keep_experts is False and runtime.t5_cpu is True
    args = _parse(["plan", "--config", "w.toml"])
    assert (args.gpu, args.sample_steps, args.ckpt_dir) == ("rtx4090", 9, "nano")


def test_a_flag_that_decides_several_overrides_each_of_them() -> None:
    write("cfg_high = 2\ncfg_low = 2\nsample_steps = 30\nulysses_size = 2")
    line = ["generate", "--config", "w.toml", "--ckpt_dir", "nano", "--prompt", "a"]
    args = _parse([*line, "--sample_guide_scale", "5", "--parallel", "cfg2"])
    request, runtime = request_from(args), runtime_from(args)
    assert (request.cfg_high, request.cfg_low, request.sample_steps) == (5, 5, 30)
    assert (runtime.cfg_parallel, runtime.ulysses_size) == (True, 1)
    assert request_from(_parse([*line, "--preset", "lightning4"])).sample_steps == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("promt = 'a'", "w.toml: promt is unknown to wanflow generate; did you mean prompt?"),
        ("ckpt-dir = 'a'", "did you mean ckpt_dir?"),
        ("[genrate]\nsize = '1'", "[genrate] is no command; did you mean generate?"),
        ("[generate]\ngpu = 'h200'", "gpu is unknown to wanflow generate"),
        ("frame_num = '5'", "frame_num must be a number (got '5')"),
        ("frame_num = true", "frame_num must be a number (got True)"),
        ("frame_num = 5.5", "frame_num must be a whole number (got '5.5')"),
        ("frame_num = 0", "frame_num must be a whole number from 1 to"),
        ("fps = nan", "fps must be a number"),
        ("fps = inf", "fps must be a number"),
        ("seed = 0x" + "f" * 9000, "base_seed"),
        ("seed = " + "9" * 5000, "w.toml: not a TOML file"),
        ("size = 832", "size must be text in quotes (got 832)"),
        ("size = 1979-05-27", "size must be text in quotes"),
        ("prompt = 'a\\u0000'\nfps = 'x'", "w.toml"),
        ('prompt = "a\\u0000"', "prompt"),
        ("sample_solver = 'unpic'", "did you mean unipc?"),
        ("overwrite = 'yes'", "overwrite must be true or false (got 'yes')"),
        ("prefetch = 1", "prefetch must be true or false (got 1)"),
        ("lora = [1]", "lora must be text in quotes (got 1)"),
        ("config = 'x.toml'", "config belongs on the command line"),
        ("resume = 'x'", "resume belongs on the command line"),
        ("a = " + "[" * 5000 + "]" * 5000, "w.toml"),
        ("size = ", "w.toml: not a TOML file"),
        ("a = '\x1b[31m'", "w.toml"),
        ("x = 1\n" * 20_000, "too long"),
    ],
)
def test_a_config_file_is_refused_by_key(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(text)
    argv = ["generate", "--config", "w.toml", "--ckpt_dir", "nano", "--prompt", "a"]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words.replace("base_seed", "seed") in line and len(line) < 400 and line.isprintable()


@pytest.mark.parametrize("flag", ["--config", "--recipe"])
def test_only_a_regular_file_is_read(
    flag: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("pipe")
    Path("binary.toml").write_bytes(b"\xff\xfe\0" * 100)
    Path("deep.json").write_text("[" * 10_000)
    for name in ("/dev/zero", "pipe", ".", "missing", "binary.toml", "deep.json", "~nosuchuser/x"):
        assert main(["generate", flag, name, "--ckpt_dir", "nano", "--prompt", "a"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name.removeprefix("~") in line


def test_the_environment_names_the_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", "--prompt", PROMPT, *SHORT, "--save_file", "a.mp4"]
    assert main(line) == 2
    assert "WANFLOW_CKPT_DIR" in capsys.readouterr().err
    monkeypatch.setenv("WANFLOW_CKPT_DIR", "/nowhere")
    assert main(line) == 2 and "/nowhere is missing" in capsys.readouterr().err
    assert main([*line, "--config", write("ckpt_dir = 'nano'")]) == 0
    monkeypatch.setenv("WANFLOW_CKPT_DIR", "nano")
    assert main([*line, "--overwrite"]) == 0
    assert _parse(["train", "--data", "x"]).ckpt_dir == "nano"
    monkeypatch.setenv("WANFLOW_CKPT_DIR", "")
    assert _parse(["generate"]).ckpt_dir is None
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "WANFLOW_CKPT_DIR" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["video", "picture", "JSON", "document"])
def test_a_recipe_is_a_base(
    form: str, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANFLOW_CKPT_DIR", "/nowhere")
    write("sample_steps = 3\nfps = 5\nseed = 1\nprefetch = true\n[generate]\npreset = 'lightning4'")
    file, target = "a.mp4", "c.mp4"
    if form == "picture":
        argv = ["--save_file", "b.png", "--frame_num", "1"]
        assert main(["generate", "--recipe", "a.mp4", *argv]) == 0
        file, target, made["request"]["frame_num"] = "b.png", "c.png", 1
    elif form != "video":
        file = write(json.dumps({"recipe": made} if form == "document" else made), "r.json")
    argv = ["generate", "--recipe", file, "--config", "w.toml", "--save_file", target]
    assert main([*argv, "--device", "cpu"]) == 0
    assert read_recipe(Path(target)) == made
    if form == "video":
        assert Path("a.mp4").read_bytes() == Path("c.mp4").read_bytes()


def test_flags_override_a_recipe(made: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seed", "6", "--size", "48*48", "--sample_guide_scale", "3", "--vae_tile", "96"]
    assert main(["generate", "--recipe", "a.mp4", *flags, "--save_file", "b.mp4"]) == 0
    again = read_recipe(Path("b.mp4"))
    assert again["request"] == made["request"] | {
        "seed": 6,
        "size": [48, 48],
        "cfg_high": 3.0,
        "cfg_low": 3.0,
    }
    assert again["runtime"] == made["runtime"] | {"vae_tile": 96}
    preset = request_from(_parse(["generate", "--recipe", "a.mp4", "--preset", "lightning4"]))
    assert (preset.sample_steps, preset.seed, preset.prompt) == (4, 5, PROMPT)
    assert main(["generate", "--recipe", "a.mp4", "--resume", "x.safetensors"]) == 2
    assert "leave one out" in capsys.readouterr().err


def test_a_recipe_without_flags_names_its_weights(made: dict[str, Any]) -> None:
    made["model"] |= {"name": "x", "folder": "/their/weights", "parts": {"vae": "/their/vae"}}
    write(json.dumps(made), "r.json")
    with pytest.raises(RequestError, match="vae /their/vae"):
        _parse(["generate", "--recipe", "r.json"])
    args = _parse(["generate", "--recipe", "r.json", "--trust_paths"])
    assert (args.ckpt_dir, args.vae) == ("/their/weights", Path("/their/vae"))
    args = _parse(["generate", "--recipe", "r.json", "--ckpt_dir", "mine"])
    assert (args.ckpt_dir, args.vae) == ("mine", None)


def test_a_damaged_recipe_is_named(
    made: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made["request"]["seed"] = "many"
    assert main(["generate", "--recipe", write(json.dumps(made), "r.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "r.json" in line and "seed" in line
