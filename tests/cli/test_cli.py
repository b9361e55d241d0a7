"""The command line as a user meets it: the official flags, refusals in words, resume, decode,
replay.
"""

from __future__ import annotations

import errno
import io
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

import numpy as np
import pytest
import torch
from helpers.common import PROMPT, let_appear

from wanflow.cli import build_parser, main
from wanflow.clipfiles import read_frames, read_recipe
from wanflow.presets import NANO_FOLDER

ROOT = Path(__file__).parents[2]
DOCUMENT_ONE = (
    "python generate.py --task t2v-A14B --size 1280*720 --ckpt_dir ./T2V_A14B_weights"
    ' --offload_model True --convert_model_dtype --prompt "A beautiful sunset over the ocean"'
)
DOCUMENT_MANY = (
    "torchrun --nproc_per_node=4 generate.py --task t2v-A14B --size 1280*720 --ckpt_dir"
    ' ./T2V_A14B_weights --dit_fsdp --t5_fsdp --ulysses_size 4 --prompt "A beautiful sunset over'
    ' the ocean"'
)
BASE = [
    "generate",
    "--ckpt_dir",
    "nano",
    "--device",
    "cpu",
    "--frame_num",
    "5",
    "--sample_steps",
    "4",
]
MAKE = [*BASE, "--prompt", PROMPT, "--seed", "7"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run, expect exit code 2 and no traceback, and return what was said."""
    try:
        code = main(list(argv))
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    return said


def test_every_official_flag_has_its_official_default() -> None:
    args = build_parser().parse_args(["generate"])
    official = {
        "task": None,  # the weights decide
        "size": None,
        "frame_num": None,
        "ckpt_dir": None,
        "offload_model": None,
        "ulysses_size": 1,
        "t5_fsdp": False,
        "t5_cpu": False,
        "dit_fsdp": False,
        "save_file": None,
        "use_prompt_extend": False,
        "prompt_extend_method": "local_qwen",
        "prompt_extend_model": None,
        "prompt_extend_target_lang": "zh",
        "base_seed": -1,
        "sample_solver": None,
        "sample_steps": None,
        "sample_shift": None,
        "sample_guide_scale": None,
        "convert_model_dtype": False,
    }
    assert {name: getattr(args, name) for name in official} == official
    from wanflow.presets import T2V_A14B

    made = [
        T2V_A14B.size,
        T2V_A14B.frame_num,
        T2V_A14B.sample_solver,
        T2V_A14B.sample_steps,
        T2V_A14B.sample_shift,
    ]
    assert made == [(1280, 720), 81, "unipc", 40, 12.0]
    assert (T2V_A14B.cfg_high, T2V_A14B.cfg_low, T2V_A14B.boundary, T2V_A14B.fps) == (
        4.0,
        3.0,
        0.875,
        16,
    )


def test_the_documents_first_command_word_for_word(in_tmp: Path) -> None:
    words = shlex.split(DOCUMENT_ONE)
    done = subprocess.run(
        [sys.executable, str(ROOT / words[1]), *words[2:]],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for expected in (
        "T2V_A14B_weights",
        "80 GB",
        "64 GB",
        "150 GB",
        "here:",
        "wanflow download",
        "Alibaba PAI",
        "nano",
    ):
        assert expected in done.stderr


@pytest.mark.slow
def test_the_documents_second_command_word_for_word(in_tmp: Path) -> None:
    """By the real torchrun, which adds its own report (with a traceback of its own) to the one
    message of ours, and ends with 1.
    """
    words = shlex.split(DOCUMENT_MANY)
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        words[1],
        str(ROOT / words[2]),
        *words[3:],
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    # On a busy machine one process may say it before all have found it out, and then says which it
    # is.
    (said,) = re.findall(r"^wanflow: (?:rank \d of 4: )?(.*)$", done.stderr, re.M)
    assert said.startswith("./T2V_A14B_weights is missing")
    assert "80 GB" in done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("generate --prompt hello", "--ckpt_dir is missing"),
        ("generate --ckpt_dir nano", "--prompt is missing"),
        ("generate --ckpt_dir nano --prompt ''", "--prompt is missing"),
        ("generate --ckpt_dir nano --prompt a --size 100*100", "multiple of 16"),
        ("generate --ckpt_dir nano --prompt a --size 1280", "WIDTH"),
        ("generate --ckpt_dir nano --prompt a --frame_num 80", "the nearest is 81"),
        ("generate --ckpt_dir nano --prompt a --sample_solver heun", "heun"),
        ("generate --ckpt_dir nano --prompt a --sample_steps 0", "sample_steps"),
        ("generate --ckpt_dir nano --prompt a --sample_shift -1", "sample_shift"),
        ("generate --ckpt_dir nano --prompt a --offload_model perhaps", "true or false"),
        ("generate --ckpt_dir nano --prompt a --task s2v-14B", "another model"),
        ("generate --ckpt_dir nano --prompt a --task t3v", "t3v"),
        ("generate --ckpt_dir nano --prompt a --dit_fsdp", "--dit_fsdp needs several processes"),
        (
            "generate --ckpt_dir nano --prompt a --ulysses_size 4",
            "a layout of 4 processes needs several processes",
        ),
        ("generate --ckpt_dir nano --prompt a --parallel cfg2xring3", "--gpus 0,1,2,3,4,5"),
        ("generate --ckpt_dir nano --prompt a --parallel tensor4", "cfg2xulysses4"),
        (
            "generate --ckpt_dir nano --prompt a --parallel cfg2 --ring_size 2",
            "leave out --ring_size",
        ),
        ("plan --ckpt_dir nano --gpus cpu,cpu --num_gpus 2", "describe another"),
        ("plan --ckpt_dir nano --gpus 0,0", "twice"),
        ("generate --ckpt_dir nano --prompt a --device tpu", "device"),
        ("generate --ckpt_dir nano --prompt a --dtype int3", "dtype"),
        ("generate --ckpt_dir nano --prompt a --save_file x.avi", "mp4"),
        ("generate --resume missing.safetensors", "no saved run"),
        ("generate --ckpt_dir nano --prompt a --size 7", "WIDTH"),
        ("generate --ckpt_dir nano --prompt a --use_prompt_extend", "local_qwen"),
        (
            (
                "generate --ckpt_dir nano --prompt a --use_prompt_extend --prompt_extend_method"
                " dashscope"
            ),
            "DASH_API_KEY",
        ),
        ("generate --ckpt_dir nano --prompt a --promt b", "--promt"),
        ("generate --ckpt_dir /nowhere --prompt a", "/nowhere"),
        ("replay missing.mp4", "missing.mp4"),
        ("decode missing.safetensors", "no saved run"),
        ("train", "--nano"),
        ("train --evaluate /nowhere", "/nowhere"),
        ("fly", "fly"),
    ],
)
def test_bad_input_gets_words_and_exit_code_2(
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: str,
    words: str,
) -> None:
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    monkeypatch.delenv("DASH_API_URL", raising=False)
    assert words in refused(capsys, *shlex.split(argv))
    assert not list(in_tmp.iterdir())


def test_cuda_is_refused_where_there_is_none(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not torch.cuda.is_available():
        assert "this machine has none" in refused(
            capsys, *MAKE[:-4], "--prompt", PROMPT, "--device", "cuda"
        )
        assert "noise_device cuda" in refused(capsys, *MAKE, "--noise_device", "cuda")


def test_generate_replay_and_never_overwrite(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MAKE, "--save_file", "one.mp4", "--contact_sheet"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"step 4/4, low-noise expert, sigma \S+, took", said)
    assert sorted(p.name for p in in_tmp.iterdir()) == ["one.mp4", "one_sheet.png"]
    frames, fps = read_frames(Path("one.mp4"))
    assert (frames.shape, fps) == ((5, 64, 64, 3), 8)
    assert "exists" in refused(capsys, *MAKE, "--save_file", "one.mp4")
    assert main(["replay", "one.mp4", "--save_file", "two.mp4"]) == 0
    assert np.array_equal(read_frames(Path("two.mp4"))[0], frames)
    assert read_recipe(Path("two.mp4")) == read_recipe(Path("one.mp4"))


@pytest.mark.parametrize(
    "name",
    [
        "one.gif",
        "one",
        *(pytest.param(f"one.{kind}", marks=pytest.mark.slow) for kind in ("webm", "mkv", "apng")),
    ],
)
def test_every_kind_of_file_is_made_and_replayed(in_tmp: Path, name: str) -> None:
    assert main([*MAKE, "--save_file", name, "--contact_sheet"]) == 0
    frames, _ = read_frames(Path(name))
    assert frames.shape == (5, 64, 64, 3)
    assert main(["replay", name]) == 0
    again = name.replace("one", "one_replay")
    assert np.array_equal(read_frames(Path(again))[0], frames)
    assert read_recipe(Path(again)) == read_recipe(Path(name))
    assert {path.name for path in in_tmp.iterdir()} == {name, again, "one_sheet.png"}


def test_a_default_name_is_safe_and_tells_the_prompt(in_tmp: Path) -> None:
    assert main([*BASE, "--prompt", "红色的圆 / a:b*c? red circle on blue", "--seed", "1"]) == 0
    (file,) = in_tmp.iterdir()
    assert re.fullmatch(
        r"nano_64x64_红色的圆-a-b-c-red-circle-on-blue_seed1_[0-9-]+\.mp4", file.name
    )


def test_one_frame_is_a_picture(in_tmp: Path) -> None:
    assert main([*BASE[:-4], "--frame_num", "1", "--sample_steps", "2", "--prompt", PROMPT]) == 0
    (file,) = in_tmp.iterdir()
    assert file.suffix == ".png"


def test_flags_reach_the_recipe(in_tmp: Path) -> None:
    extra = (
        "--negative_prompt '' --cfg_high 2 --sample_guide_scale 5 --boundary 0.9 --fps 12"
        " --sample_solver dpm++ --sample_shift 3 --size 48*64"
    )
    assert (
        main(
            [*MAKE, *shlex.split(extra), "--save_file", "x.mp4", "--dtype", "bfloat16", "--t5_cpu"]
        )
        == 0
    )
    recipe = read_recipe(Path("x.mp4"))
    wanted = {
        "cfg_high": 2.0,
        "cfg_low": 5.0,
        "boundary": 0.9,
        "fps": 12.0,
        "sample_solver": "dpm++",
        "sample_shift": 3.0,
        "size": [48, 64],
    }
    assert {key: recipe["request"][key] for key in wanted} == wanted
    assert recipe["request"]["negative_prompt"] == ""
    assert recipe["runtime"]["dtype"] == "bfloat16"


@pytest.mark.slow
def test_ctrl_c_keeps_the_run_and_resume_gives_the_same_video(in_tmp: Path) -> None:
    slow = [
        *BASE[:-4],
        "--frame_num",
        "33",
        "--sample_steps",
        "120",  # so that the signal comes before the last step
        "--prompt",
        PROMPT,
        "--seed",
        "3",
    ]
    at_once = "import runpy, sys; from wanflow import screen; screen.EVERY = 0.0; del sys.argv[0]"
    at_once += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    script = [sys.executable, "-c", at_once, str(ROOT / "generate.py")]
    command = [*script, *slow[1:], "--save_file", "cut.mp4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("denoising: step"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(180) == 130, rest
    assert "Traceback" not in rest
    assert [p.name for p in in_tmp.iterdir()] == ["cut.latent.safetensors"]
    assert "go on with: wanflow generate --resume cut.latent.safetensors" in rest
    assert (
        main(
            [
                "generate",
                "--resume",
                "cut.latent.safetensors",
                "--save_file",
                "cut.mp4",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert main([*slow, "--save_file", "whole.mp4"]) == 0
    assert np.array_equal(read_frames(Path("cut.mp4"))[0], read_frames(Path("whole.mp4"))[0])
    assert not list(in_tmp.glob("*.safetensors"))


def test_when_writing_fails_the_latent_is_kept_and_decode_finishes(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow import video

    real = video.save_frames

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "save_frames", full)
    assert main([*MAKE, "--save_file", "a.mp4"]) == 1
    said = capsys.readouterr().err
    assert "No space left" in said
    assert "wanflow decode a.latent.safetensors" in said
    monkeypatch.setattr(video, "save_frames", real)
    assert main(["decode", "a.latent.safetensors"]) == 0
    assert main([*MAKE, "--save_file", "b.mp4"]) == 0
    assert np.array_equal(read_frames(Path("a.mp4"))[0], read_frames(Path("b.mp4"))[0])


def test_a_file_that_appears_meanwhile_is_not_replaced(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_appear(monkeypatch, "a.mp4")
    assert main([*MAKE, "--save_file", "a.mp4"]) == 2
    said = capsys.readouterr().err
    assert "exists" in said and "wanflow decode a.latent.safetensors" in said
    assert Path("a.mp4").read_bytes() == b"mine"


def test_decode_refuses_a_run_that_is_not_finished(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import wanflow

    wanflow.load("nano", device="cpu").begin(wanflow.Request(PROMPT)).save(
        Path("begun.latent.safetensors")
    )
    assert "--resume" in refused(capsys, "decode", "begun.latent.safetensors")


def test_other_weights_are_not_taken_for_the_same(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    assert main([*MAKE, "--save_file", "one.mp4"]) == 0
    shutil.copytree(NANO_FOLDER, "other")
    file = Path("other/high_noise_model/diffusion_pytorch_model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said = refused(capsys, "replay", "one.mp4", "--ckpt_dir", "other", "--save_file", "two.mp4")
    assert "other weights" in said
    assert (
        main(["replay", "one.mp4", "--ckpt_dir", "other", "--save_file", "two.mp4", "--force"]) == 0
    )


def test_an_unknown_word_is_told_and_a_known_one_is_not(
    in_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert (
        main(
            [
                *BASE,
                "--prompt",
                "a dragon breathes fire on a blue background",
                "--save_file",
                "d.mp4",
            ]
        )
        == 0
    )
    assert "does not know dragon, breathes, fire" in caplog.text
    caplog.clear()
    assert main([*MAKE, "--save_file", "k.mp4"]) == 0
    assert "does not know" not in caplog.text


@pytest.mark.slow
def test_prompt_extension_asks_the_server_and_falls_back(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    asked: list[dict[str, object]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps(
                {
                    "choices": [
                        {"message": {"content": " a large red star spins on a black background "}}
                    ]
                }
            ).encode()
            self.send_response(200 if len(asked) == 1 else 500)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DASH_API_URL", f"http://127.0.0.1:{server.server_port}/v1")
    extend = [
        "--use_prompt_extend",
        "--prompt_extend_method",
        "dashscope",
        "--prompt_extend_target_lang",
        "en",
    ]
    try:
        assert main([*MAKE, *extend, "--save_file", "a.mp4"]) == 0
        assert (
            read_recipe(Path("a.mp4"))["request"]["prompt"]
            == "a large red star spins on a black background"
        )
        assert asked[0]["model"] == "qwen-plus"
        assert main([*MAKE, *extend, "--save_file", "b.mp4"]) == 0
        assert read_recipe(Path("b.mp4"))["request"]["prompt"] == PROMPT
        assert "not extended" in caplog.text
    finally:
        server.shutdown()


def test_a_small_machine_is_refused_the_full_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full-size folder of sparse files: complete, readable, and not started here."""
    maker = Path(__file__).parents[1] / "helpers" / "sparse_checkpoint.py"
    subprocess.run(
        [sys.executable, str(maker), str(tmp_path / "w")],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (tmp_path / "w/google/umt5-xxl").mkdir(parents=True)
    (tmp_path / "w/google/umt5-xxl/tokenizer.json").write_bytes(
        (NANO_FOLDER / "google/umt5-xxl/tokenizer.json").read_bytes()
    )
    began = time.process_time()
    said = refused(
        capsys,
        "generate",
        "--ckpt_dir",
        str(tmp_path / "w"),
        "--prompt",
        "a",
        "--save_file",
        str(tmp_path / "x.mp4"),
        "--device",
        "cpu",
    )
    assert time.process_time() - began < 60
    for words in ("80 GB", "64 GB of RAM", "150 GB", "here:", "do:", "--force"):
        assert words in said


def test_a_text_is_no_file_of_weights(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refused(capsys, "inspect", str(ROOT / "README.md")).splitlines()
    assert "README.md" in line and ".safetensors" in line and "wanflow download" in line


def test_a_plan_for_the_processes_that_would_be_started(capsys: pytest.CaptureFixture[str]) -> None:
    """It starts none."""
    assert main(["plan", "--ckpt_dir", "nano", "--gpus", "cpu,cpu,cpu", "--json"]) == 0
    runtime = json.loads(capsys.readouterr().out)["runtime"]
    assert (runtime["cfg_parallel"], runtime["ring_size"], runtime["ulysses_size"]) == (False, 1, 3)


# Outputs: checked and claimed before the first step


def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a run begins its steps."""
    from wanflow.api import Pipeline

    def never(*_: object) -> None:
        raise AssertionError("the run began")

    monkeypatch.setattr(Pipeline, "resume", never)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.png", "a PNG holds one frame, and the run has 5"),
        ("x" * 240 + ".mp4", "too long"),
        ("x" * 230 + ".mp4", "too long"),  # the video's name would fit, its state's does not
        ("dangling.mp4", "exists"),
        ("/proc/a.mp4", "cannot write /proc/a.mp4"),
        ("~nosuchuser/a.mp4", "not a usable path"),
        ("\udcff.mp4", "no UTF-8 name"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_first_step(
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    words: str,
) -> None:
    no_steps(monkeypatch)
    Path("dangling.mp4").symlink_to("nowhere")
    assert words in refused(capsys, *MAKE, "--save_file", name)
    assert [path.name for path in in_tmp.iterdir()] == ["dangling.mp4"]


def test_a_contact_sheet_that_exists_is_refused_or_replaced(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = Path("a_sheet.png")
    sheet.write_text("mine")
    asked = [*MAKE, "--save_file", "a.mp4", "--contact_sheet"]
    with pytest.MonkeyPatch.context() as patch:
        no_steps(patch)
        assert "a_sheet.png exists" in refused(capsys, *asked)
    assert sheet.read_text() == "mine"
    assert main([*asked, "--overwrite"]) == 0
    assert read_frames(sheet)[0].shape[0] == 1


def test_a_sheet_that_appears_meanwhile_is_kept_and_so_is_the_video(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_appear(monkeypatch, "a_sheet.png")
    assert main([*MAKE, "--save_file", "a.mp4", "--contact_sheet", "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert "saved a.mp4" in said and "a_sheet.png exists" in said
    assert Path("a_sheet.png").read_bytes() == b"mine"
    assert sorted(path.name for path in in_tmp.iterdir()) == ["a.mp4", "a_sheet.png"]


def test_a_name_that_another_run_is_making_is_refused(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow.outputs import Claims

    no_steps(monkeypatch)
    for name in ("a.mp4", "a.latent.safetensors"):
        with Claims() as others:
            others.take(Path(name))
            said = refused(capsys, *MAKE, "--save_file", "a.mp4")
            assert f"{name} is being made by another run" in said
    assert not list(in_tmp.iterdir())


def test_runs_of_one_second_get_names_of_their_own(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime

    from wanflow.cli import running
    from wanflow.outputs import Claims

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Stopped:
            return cls(2026, 11, 23, 21, 45, 7)

    monkeypatch.setattr(running, "datetime", Stopped)
    stem = "nano_64x64_a-red-circle-moves-left-on-a-blue-background_seed7_20261123-214507"
    with Claims() as others:
        others.take(Path(f"{stem}-2.mp4"))
        assert main(MAKE) == main(MAKE) == 0
    assert sorted(path.name for path in in_tmp.iterdir()) == [f"{stem}-3.mp4", f"{stem}.mp4"]


def test_a_full_disk_while_denoising_costs_no_run(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow import files, keeping

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(keeping, "SAVE_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert main([*MAKE, "--save_file", "a.mp4"]) == 1
    said = capsys.readouterr().err
    assert said.count("is not saved for now") == 1  # one warning for all steps
    assert "the state of the run could not be saved" in said  # nor at the end
    assert "state of the run is not saved for now: the disk is full" in said
    assert "wanflow: the disk is full or failing" in said and "while writing a.mp4" in said
    assert not list(in_tmp.iterdir())


def test_a_disk_that_has_room_again_keeps_the_state(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow.media import VideoWriter
    from wanflow.pipeline import Run

    save, tries = Run.save, []

    def later(self: Run, path: Path) -> None:
        tries.append(self.state.index)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, path)

    def broken(self: VideoWriter) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Run, "save", later)
    monkeypatch.setattr(VideoWriter, "_finish", broken)
    assert main([*MAKE, "--save_file", "a.mp4"]) == 1
    assert tries == [4, 4]
    assert "wanflow decode a.latent.safetensors" in capsys.readouterr().err
    assert [path.name for path in in_tmp.iterdir()] == ["a.latent.safetensors"]


@pytest.mark.parametrize(
    ("fault", "json"), [(BrokenPipeError, False), (OSError, True), (ValueError, False)]
)
def test_messages_that_nobody_takes_end_no_run(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Exception], json: bool
) -> None:
    """A reader that went away, a disk or a terminal that is gone, a stream that was closed."""
    from wanflow.cli import open_streams

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise fault(5, "gone")

    monkeypatch.setattr(sys, "stderr", Gone())
    open_streams()
    assert main([*MAKE, "--save_file", "a.mp4", *(["--json"] if json else [])]) == 0
    assert [path.name for path in in_tmp.iterdir()] == ["a.mp4"]


def test_an_error_in_the_middle_saves_the_run_and_says_how_to_go_on(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as weights on a disk that fails, which are read again for each step."""
    from wanflow import pipeline

    def broken(x: object, step: int, facts: object) -> None:
        if step == 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "check_step", broken)
        assert main([*MAKE, "--save_file", "a.mp4"]) == 1
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "go on with: " in line)
    assert "stopped at step 3 of 4" in line and "Input/output error" in said
    assert main(shlex.split(line.split("go on with: wanflow ")[1])) == 0
    assert [path.name for path in in_tmp.iterdir()] == ["a.mp4"]


@pytest.mark.slow
def test_a_reader_that_goes_away_stops_nothing(in_tmp: Path) -> None:
    """`generate 2>&1 | head -1`: the run goes on to its end."""
    words = shlex.join([sys.executable, "-m", "wanflow", *MAKE, "--save_file", "a.mp4"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words} 2>&1 | head -1"], check=False)
    assert done.returncode == 0 and [path.name for path in in_tmp.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**48, dtype=torch.uint8), lambda: np.empty(2**50, np.uint8)],
    ids=["torch", "numpy"],
)
def test_ram_that_runs_out_gets_words(
    allocate: Callable[[], object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wanflow.cli.doctor.doctor", lambda args: allocate())
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert "out of memory" in error and "Traceback" not in error
