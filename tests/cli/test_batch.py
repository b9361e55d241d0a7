"""Several videos by one command: prompt files, seeds, grids, and the queue of their folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers.common import PROMPT
from PIL import Image
from safetensors.torch import save_file

import wanflow
from wanflow import pipeline
from wanflow.cli import command_parser, main
from wanflow.cli.flags import request_from
from wanflow.cli.prompts import Wanted, wanted
from wanflow.clipfiles import read_frames, read_recipe
from wanflow.models.dit import WanDiT
from wanflow.request import Request
from wanflow.sanity import LatentError
from wanflow.serve.local import LocalStore

MAKE = ["generate", "--ckpt_dir", "nano", "--device", "cpu", "--frame_num", "5"]
MAKE += ["--sample_steps", "2"]
STAR = "a green star moves up on a white background"


def asked(line: str) -> list[Wanted]:
    args = command_parser("generate").parse_args(shlex.split(line))
    return wanted(args, request_from(args))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def videos(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("0*"))


def seen(path: Path) -> np.ndarray:
    return read_frames(path)[0]


def write_lora(name: str, scale: float) -> None:
    dim, key = wanflow.presets.NANO.dit.dim, "diffusion_model.blocks.0.self_attn.q"
    down, up = torch.ones(2, dim), torch.full((dim, 2), scale)
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, name)


# What is asked for

EVERYTHING = (
    'a cat -- really, it\'s --w 832 --h 480 --f 81 --s 40 --d 7 --g 4 --n "a --dull, gray one"'
    " --fs 5.5 --i cat.png --sample_solver euler --lora 'a b.safetensors@0.5'"
)
ALL = Request(
    "a cat -- really, it's",
    negative_prompt="a --dull, gray one",
    image="cat.png",
    size=(832, 480),
    frame_num=81,
    sample_solver="euler",
    sample_steps=40,
    sample_shift=5.5,
    cfg_high=4.0,
    cfg_low=4.0,
    seed=7,
    lora=("a b.safetensors@0.5",),
)
OBJECT = {
    "prompt": ALL.prompt,
    "negative_prompt": ALL.negative_prompt,
    "image": "cat.png",
    "size": "832*480",
    "frame_num": 81,
    "sample_solver": "euler",
    "sample_steps": 40,
    "sample_shift": 5.5,
    "sample_guide_scale": 4.0,
    "base_seed": 7,
    "lora": ["a b.safetensors@0.5"],
}
COLUMNS = (
    "prompt,negative_prompt,image,size,frame_num,sample_solver,s,fs,g,seed,lora,fps\n"
    '"a cat -- really, it\'s","a --dull, gray one",cat.png,832*480,81,euler,40,5.5,4,7,'
    "'a b.safetensors@0.5',\n"
)
FILES = {
    "a.txt": f"# cats\n\n{EVERYTHING}\r\n",
    "a.jsonl": json.dumps(OBJECT) + "\n\n",
    "a.csv": "\ufeff" + COLUMNS,
    "b.csv": re.sub(",(?! )", ";", COLUMNS),
    "a.tsv": re.sub(",(?! )", "\t", COLUMNS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_says_the_same(name: str, in_tmp: Path) -> None:
    Path(name).write_text(FILES[name], encoding="utf-8")
    (one,) = asked(f"--prompt_file {name}")
    found = one.request
    assert found.size in ("832*480", (832, 480))
    assert wanflow.Request(**vars(found) | {"size": (832, 480)}) == ALL
    assert one.where.startswith(f"{name}:")


def test_flags_hold_for_every_line_and_a_line_overrides_them(in_tmp: Path) -> None:
    Path("a.txt").write_text("one\n--frame_num 9\ntwo --cfg_low 2\n")
    line = "--prompt_file a.txt --prompt all --sample_guide_scale 5 --fps 9"
    found = [one.request for one in asked(line)]
    assert [one.prompt for one in found] == ["one", "all", "two"]
    assert [one.frame_num for one in found] == [None, 9, None]
    assert [(one.cfg_high, one.cfg_low) for one in found] == [(5, 5), (5, 5), (5, 2)]
    assert {one.fps for one in found} == {9}


def test_seeds_numbers_and_grids_multiply(in_tmp: Path) -> None:
    def seeds(line: str) -> list[int | None]:
        return [one.request.seed for one in asked(f"--prompt a {line}")]

    assert seeds("--seeds 3,1-2") == [3, 1, 2]
    assert seeds("--num_videos 3 --base_seed 5") == [5, 6, 7]
    assert seeds("--num_videos 2") == [-1, -1]
    grid = asked("--prompt a --seeds 1,2 --grid cfg_high=3,4,5 sample_shift=8,12")
    assert len(grid) == 12
    assert grid[1].request == Request("a", seed=1, cfg_high=3.0, sample_shift=12.0)
    assert grid[1].cell == {"cfg_high": 3.0, "sample_shift": 12.0}
    both = asked("--prompt a --grid sample_guide_scale=2,3 size=64*64,32*32")
    assert both[-1].request == Request("a", cfg_high=3.0, cfg_low=3.0, size="32*32")
    Path("a.jsonl").write_text('{"prompt": "a", "w": 64, "h": 32, "g": 2, "seed": null}\n')
    size = Request("a", size=(64, 32), cfg_high=2, cfg_low=2)
    assert [one.request for one in asked("--prompt_file a.jsonl")] == [size]
    Path("a.txt").write_text("a --d 4\n")
    assert [one.request.seed for one in asked("--prompt_file a.txt --num_videos 2")] == [4, 5]


WRONG = {
    "a.txt": (
        "fine --f 5\na --s x\na --foo 3\na --f 6\n--d 3\na --g 200\na --s 2 --s 3\na --w 64\n"
        "a --lora no.safetensors\na --sample_solver eular\na --d\na --lora 'b\n"
        "a --i bad.png\na --d 1 --seed 2\na --g 3 --cfg_low 2\na --prompt b\n",
        {
            2: "--s must be a whole number (got 'x')",
            3: "unknown setting foo; known are prompt,",
            4: "frame_num 6 is not 4n+1",
            5: "there is no prompt",
            6: "--g must be a number from 0 to 100 (got 200)",
            7: "twice",
            8: "--w and --h name a size together",
            9: "no.safetensors: there is no such file",
            10: "--sample_solver must be one of",
            11: "--d must be a whole number",
            12: "No closing quotation",
            13: "bad.png",
            14: "seed stands there twice",
            15: "cfg_low stands there twice",
            16: "prompt stands there twice",
        },
    ),
    "a.jsonl": (
        '{"prompt": "fine"}\n{"prompt": 3}\n[]\n{"prompt": "a"\n{"prompt": "a", "fram_num": 5}\n'
        '{"prompt": "a", "frame_num": "5"}\n{"prompt": "a", "size": [64]}\n'
        '{"prompt": "a", "w": 64}\n{"prompt": "a", "w": 64.5, "h": 64}\n{"foo": null}\n'
        '{"prompt": "a", "seed": 1, "d": 2}\n{"prompt": "a", "size": "64*64", "w": 8, "h": 8}\n',
        {
            2: "prompt must be text",
            3: "expected a JSON object",
            4: "not a JSON object",
            5: "did you mean frame_num?",
            6: "frame_num must be a whole number",
            7: "size",
            8: "w and h name a size together",
            9: "size",
            10: "unknown setting foo",
            11: "seed stands there twice",
            12: "size stands there twice",
        },
    ),
    "a.csv": (
        "prompt,seed,cfg_high\nfine,1,3\na,x,3\na,1,3,4\n,1,3\n",
        {
            3: "seed must be a whole number (got 'x')",
            4: "4 cells, and the first line names 3",
            5: "there is no prompt",
        },
    ),
    "b.csv": (
        "prompt,seed,base_seed,prompt,\na,1,2,,\na,1,,b,\na,1,,,note\n",
        {2: "seed stands there twice", 3: "prompt stands there twice", 4: "no named column"},
    ),
    "c.csv": ("a red circle\na star\n", {1: "the first line names the columns: unknown setting"}),
    "a.json": ('[{"prompt": "a"}]\n', {1: "expected a JSON object"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_all_wrong_lines_are_named_at_once(
    name: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = WRONG[name]
    Path(name).write_text(text)
    Path("bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    said = refused(capsys, *MAKE[:-4], "--prompt_file", name).removeprefix("wanflow: ")
    lines = said.strip().split("\n")
    found = {int(line.split(":")[1]): line for line in lines if line.startswith(f"{name}:")}
    assert set(found) == set(words), said
    for number, part in words.items():
        assert part in found[number]
    assert sorted(os.listdir()) == sorted([name, "bad.png"])  # nothing was begun


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--grid cfg_hig=3", "did you mean cfg_high?"),
        ("--grid cfg_high=3,x", "cfg_high must be a number (got 'x')"),
        ("--grid cfg_high=3,3", "has a value twice"),
        ("--grid cfg_high", "write cfg_high=1,2"),
        ("--grid prompt=a,b", "--prompt_file"),
        ("--grid cfg_high=3 --cfg_high 3", "cfg_high is set by --grid and by another flag"),
        ("--grid cfg_high=3 sample_guide_scale=4", "twice"),
        (f"--grid sample_steps={','.join(map(str, range(1, 402)))}", "at most 400"),
        ("--seeds 1,1", "each seed once"),
        ("--seeds 4-1", "ranges such as"),
        ("--seeds 1 --num_videos 2", "leave out --num_videos"),
        ("--seeds 1 --base_seed 2", "leave out --num_videos and --base_seed"),
        ("--seeds 1 --save_file a.mp4", "--out_dir"),
        ("--out_dir a", "--out_dir is for several videos"),
        ("--resume a.latent.safetensors --seeds 1", "--resume"),
        ("--num_videos 0", "--num_videos must be a whole number from 1"),
        ("--prompt_file none.txt", "there is no such file"),
        ("--prompt_file empty.txt", "holds no prompt"),
        ("--prompt_file latin.txt", "UTF-8"),
        ("--prompt_file many.txt", "many.txt holds more than 10,000 prompts"),
    ],
)
def test_what_cannot_go_together_is_refused(
    flags: str, words: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("# nothing\n\n")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("many.txt").write_text("a\n" * 10_001)
    assert words in refused(capsys, *MAKE[:-4], "--prompt", "a", *shlex.split(flags))


# Runs


def test_a_list_makes_what_single_commands_make_and_grows(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow import assemble

    loads: list[object] = []
    real = assemble.LoadedParts
    monkeypatch.setattr(assemble, "LoadedParts", lambda *a: loads.append(a) or real(*a))
    Path("two.txt").write_text(f"{PROMPT} --d 7\n{STAR} --f 1\n")
    command = [*MAKE, "--prompt_file", "two.txt", "--json"]
    assert main(command) == 0
    assert len(loads) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["path"], document["completed"]) == ("two_videos", 2)
    first, second = document["videos"]
    assert "resume" not in document
    assert first["path"].endswith("0001_7_a-red-circle-moves-left-on-a-blue-background.mp4")
    assert re.fullmatch(r"two_videos/0002_\d+_a-green-star.*\.png", second["path"])
    assert (second["where"], second["prompt"]) == ("two.txt:2", STAR)
    assert "video 1/2" in printed.err and "ETA of all" in printed.err
    assert main([*MAKE, "--prompt", PROMPT, "--seed", "7", "--save_file", "one.mp4"]) == 0
    assert (seen(Path(first["path"])) == seen(Path("one.mp4"))).all()
    assert read_recipe(Path(first["path"])) == read_recipe(Path("one.mp4"))

    before = {name: Path("two_videos", name).stat().st_mtime_ns for name in videos("two_videos")}
    Path("two.txt").write_text(f"{STAR} --f 1\na blue square\n{PROMPT} --d 7\n")
    capsys.readouterr()
    assert main(command[:-1]) == 0
    printed = capsys.readouterr()
    assert printed.out == "two_videos\n"
    assert "1 video added to the 2 of its queue" in printed.err
    assert "2 videos there already" in printed.err
    names = videos("two_videos")
    assert len(names) == 3 and names[2].endswith("a-blue-square.mp4")
    assert all(Path("two_videos", name).stat().st_mtime_ns == at for name, at in before.items())
    loads.clear()
    assert main(command[:-1]) == 0 and not loads  # nothing is left, so no weights are read
    Path("two_videos", names[0]).unlink()
    assert main(command[:-1]) == 0
    assert videos("two_videos") == names


def test_a_grid_has_one_seed_and_a_labelled_sheet(in_tmp: Path) -> None:
    command = [*MAKE, "--prompt", PROMPT, "--grid", "cfg_high=1,4", "sample_shift=3,5,8"]
    assert main([*command, "--out_dir", "new/g"]) == 0
    names = videos("new/g")
    assert len(names) == 6 and len({name.split("_")[1] for name in names}) == 1
    recipes = [read_recipe(Path("new/g", name))["request"] for name in names]
    assert [(one["cfg_high"], one["sample_shift"]) for one in recipes] == [
        (high, shift) for high in (1, 4) for shift in (3, 5, 8)
    ]
    sheet = np.asarray(Image.open("new/g/grid.png"))
    # Two rows of three pictures of 192 pixels, and labels above and to the left.
    assert 2 * 192 < sheet.shape[0] < 2 * 192 + 80 and 3 * 192 < sheet.shape[1] < 3 * 192 + 120
    middle = seen(Path("new/g", names[4]))[2].repeat(3, 0).repeat(3, 1)
    width = sheet.shape[1]
    left = width - 2 * 196
    assert (sheet[-196:-4, left : left + 192] == middle).all()
    labels = sheet[: sheet.shape[0] - 2 * 196]
    assert (labels < 128).any() and (sheet[:, : left - 196] < 128).any()


def fails_at(call: int, error: Exception) -> Callable[..., None]:
    """Return a check of steps that raises at one call."""
    real, calls = pipeline.check_step, list[int]()

    def check(*args: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error
        real(*args)

    return check


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(LatentError("step 1 gave NaN"), "step 1 gave NaN", id="no video"),
        pytest.param(
            MemoryError("cannot allocate"), "out of memory", id="memory", marks=pytest.mark.slow
        ),
    ],
)
def test_a_failed_video_stops_no_other_and_is_tried_again(
    error: Exception, words: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*MAKE, "--prompt", PROMPT, "--grid", "seed=1,2,3", "--out_dir", "g", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "check_step", fails_at(4, error))
        assert main(command) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [one["status"] for one in document["videos"]] == ["completed", "failed", "completed"]
    assert words in document["videos"][1]["error"] and words in document["error"]
    assert (document["code"], document["completed"], document["failed"]) == (1, 2, 1)
    assert "1 of 3 videos failed" in document["error"]
    assert shlex.split(document["resume"]) == ["wanflow", *command]
    marked = np.asarray(Image.open("g/grid.png")).astype(int)
    red = (marked[..., 0] > 150) & (marked[..., 1] < 20) & (marked[..., 2] < 60)
    assert red[:, marked.shape[1] // 2].any()
    assert main(command[:-1]) == 0
    assert "1 video failed before" in capsys.readouterr().err
    assert [name.split("_")[1] for name in videos("g")] == ["1", "2", "3"]
    assert main([*MAKE, "--prompt", PROMPT, "--seed", "2", "--save_file", "one.mp4"]) == 0
    assert (seen(next(Path("g").glob("0002_*.mp4"))) == seen(Path("one.mp4"))).all()


def interrupt(command: list[str]) -> None:
    """Stop at the second step of the second video."""
    real: Callable[..., Any] = WanDiT.forward
    calls = []

    def struck(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanDiT, "forward", struck)
        assert main(command) == 130


def test_a_damaged_state_stops_no_other_video(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*MAKE, "--prompt", PROMPT, "--seeds", "1,2,3", "--out_dir", "g"]
    interrupt(command)
    (state,) = Path("g").glob("0002*.latent.safetensors")
    data = state.read_bytes()
    state.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(command) == 1
    said = capsys.readouterr().err
    assert f"{state.name} is not a saved wanflow run, or it is damaged" in said
    assert "delete it, and the video begins at its first step" in said
    assert len(list(Path("g").glob("*.mp4"))) == 2
    state.unlink()
    assert main(command) == 0
    assert [name.split("_")[1] for name in videos("g")] == ["1", "2", "3"]


def test_an_interrupted_list_goes_on_at_its_step(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*MAKE, "--prompt", PROMPT, "--seeds", "1,2,3", "--out_dir", "a b"]
    interrupt(command)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(list(Path("a b").glob("*.mp4"))) == 1
    (state,) = Path("a b").glob("0002*.latent.safetensors")
    assert pipeline.Run.load(state).state.index == 1
    (again,) = re.findall(r"stopped at step 1 of 2; go on with: wanflow (.*)$", said, re.M)
    assert shlex.split(again) == command
    real, calls = WanDiT.forward, list[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanDiT, "forward", lambda *a, **k: calls.append(1) or real(*a, **k))
        assert main(shlex.split(again)) == 0
    assert len(calls) == 3  # steps, each of them one batch
    assert [path.suffix for path in sorted(Path("a b").glob("0*"))] == [".mp4"] * 3
    assert main([*MAKE, "--prompt", PROMPT, "--seed", "2", "--save_file", "one.mp4"]) == 0
    assert (seen(next(Path("a b").glob("0002*"))) == seen(Path("one.mp4"))).all()


def test_videos_of_one_lora_are_made_together(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text(
        f"{PROMPT} --lora a.safetensors\n{STAR}\na star --lora a.safetensors\n"
    )
    write_lora("a.safetensors", 0.0)
    assert main([*MAKE[:-1], "1", "--prompt_file", "a.txt"]) == 0
    assert re.findall(r"^video \d/3.*: (\d+)_", capsys.readouterr().err, re.M) == [
        "0001",
        "0003",
        "0002",
    ]


def test_seeds_and_grids_override_a_recipe(in_tmp: Path) -> None:
    assert main([*MAKE, "--prompt", PROMPT, "--seed", "7", "--save_file", "one.mp4"]) == 0
    command = ["generate", "--recipe", "one.mp4", "--device", "cpu", "--seeds", "4"]
    assert main([*command, "--grid", "sample_guide_scale=2", "--out_dir", "."]) == 0
    (video,) = Path().glob("0001_4_*.mp4")
    request = read_recipe(video)["request"]
    assert (request["cfg_high"], request["cfg_low"], request["frame_num"]) == (2, 2, 5)


def test_an_interruption_before_a_step_says_how_to_go_on(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*MAKE, "--prompt", PROMPT, "--seeds", "1,2", "--out_dir", "g"]

    def struck(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanDiT, "forward", struck)
        assert main(command) == 130
    said = capsys.readouterr().err
    assert said.endswith(f"go on with: {shlex.join(['wanflow', *command])}\n")
    assert os.listdir() == ["g"]  # no claim is left


def test_a_video_that_was_published_before_the_end_is_kept(in_tmp: Path) -> None:
    command = [*MAKE, "--prompt", PROMPT, "--seeds", "1", "--out_dir", "g", "--contact_sheet"]
    assert main(command) == 0
    (video,) = Path("g").glob("*.mp4")
    (sheet,) = Path("g").glob("*_sheet.png")
    made, drawn = video.stat().st_mtime_ns, sheet.read_bytes()
    sheet.unlink()
    store = LocalStore(Path("g/.wanflow"))
    store.run("UPDATE wanflow_jobs SET state = 'in_progress', owner = 'gone'", [])
    store.close()
    preview = video.with_name(video.stem + ".preview.png")
    left = [preview, *(Path(f"{path}.01234567.part") for path in (video, preview, sheet))]
    left += [Path(f"{path}.claim") for path in (video, preview, sheet)]
    for path in left:
        path.touch()
    assert main(command) == 0
    assert not any(path.exists() for path in left)
    assert video.stat().st_mtime_ns == made
    assert sheet.read_bytes() == drawn


def test_one_process_owns_the_folder(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = Path("g.claim")
    with FileLock(claim):
        claim.write_text("1\n")
        said = refused(capsys, *MAKE, "--prompt", PROMPT, "--seeds", "1", "--out_dir", "g")
    assert "g is being made by another run (process 1" in said


# In processes of their own

OFTEN = """
import sys
from wanflow.cli import keeping, main
keeping.SAVE_SECONDS = 0
sys.exit(main(sys.argv[1:]))
"""


def step_of_second(process: subprocess.Popen[bytes]) -> int:
    """Wait until a state of the second video is on the disk; return its step."""
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        for state in Path("g").glob("0002*.safetensors"):
            return pipeline.Run.load(state).state.index
        time.sleep(0.02)
    raise AssertionError(f"no state of the second video; exit code {process.poll()}")


@pytest.mark.slow
def test_kill_9_in_the_middle_costs_no_video_and_no_bit(in_tmp: Path) -> None:
    command = [*MAKE[:-1], "30", "--prompt", PROMPT, "--num_videos", "3", "--out_dir", "g"]
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", OFTEN, *command], stderr=subprocess.DEVNULL
        )
        try:
            step = step_of_second(process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        (first,) = Path("g").glob("0001*.mp4")
        Path("g", next(Path("g").glob("0002*.safetensors")).name + ".01234567.part").touch()
        made = first.stat().st_mtime_ns
        assert step
    assert main(command) == 0
    assert first.stat().st_mtime_ns == made
    assert [path.suffix for path in Path("g").glob("0*")] == [".mp4"] * 3  # no leftovers
    for video in Path("g").glob("*.mp4"):
        seed = video.name.split("_")[1]
        single = [*command[:-4], "--seed", seed, "--save_file", f"{seed}.mp4"]
        assert main(single) == 0
        assert (seen(video) == seen(Path(f"{seed}.mp4"))).all()


@pytest.mark.slow
def test_two_ranks_share_every_video_of_a_list(in_tmp: Path) -> None:
    write_lora("bad.safetensors", 3e38)
    lines = f"{PROMPT} --d 1", f"{STAR} --lora bad.safetensors", f"{STAR} --d 2 --f 9"
    Path("a.txt").write_text("\n".join(lines))
    command = [*MAKE, "--prompt_file", "a.txt", "--gpus", "cpu,cpu", "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "wanflow", *command], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 1, run.stderr  # every rank finds the broken latent, and goes on
    document = json.loads(run.stdout)
    made = document["videos"]
    assert [one["status"] for one in made] == ["completed", "failed", "completed"]
    assert [len(seen(Path(one["path"]))) for one in made[::2]] == [5, 9]
    assert "NaN" in made[1]["error"] and "bad.safetensors" in document["error"]
    Path("a.txt").write_text("\n".join(lines[::2]))
    again = subprocess.run(
        [sys.executable, "-m", "wanflow", *command], capture_output=True, text=True, timeout=240
    )
    assert again.returncode == 0 and "2 videos there already" in again.stderr
