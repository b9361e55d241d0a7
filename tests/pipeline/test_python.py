"""wanflow from Python: what `load` and `generate` accept, refuse and show; threads and forks."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import typing
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from helpers.common import PROMPT
from safetensors.torch import save_file

import wanflow
from wanflow import options
from wanflow.api import Pipeline
from wanflow.config import RequestError, Solver
from wanflow.models.umt5 import UMT5Encoder
from wanflow.request import Request
from wanflow.runtime import Quantization, Runtime

FEW: dict[str, Any] = {"frame_num": 1, "sample_steps": 2}
OTHER = "a green square on a black background"


def seeds_of(videos: list[Any]) -> list[int]:
    return [video.recipe["request"]["seed"] for video in videos]


# --- what is accepted ---


def test_a_request_and_keywords_give_the_same_video(nano: Pipeline) -> None:
    request = wanflow.Request(PROMPT, seed=3, **FEW)
    expected = nano.generate(PROMPT, seed=3, **FEW)
    assert np.array_equal(nano.generate(request).frames, expected.frames)
    other = nano.generate(request, seed=4)
    assert other.recipe["request"] == expected.recipe["request"] | {"seed": 4}


def test_lists_of_prompts_and_seeds(nano: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    forward = UMT5Encoder.forward

    def counted(self: UMT5Encoder, *args: torch.Tensor) -> torch.Tensor:
        encoded.append(1)
        return forward(self, *args)

    monkeypatch.setattr(UMT5Encoder, "forward", counted)
    many = nano.generate(PROMPT, seed=range(1, 4), **FEW)
    assert seeds_of(many) == [1, 2, 3]
    assert len(encoded) == 2, "the prompt and the negative prompt, each once"
    pairs = nano.generate([PROMPT, OTHER], seed=[2, np.int64(9)], **FEW)
    assert seeds_of(pairs) == [2, 9]
    assert [video.recipe["request"]["prompt"] for video in pairs] == [PROMPT, OTHER]
    assert np.array_equal(pairs[0].frames, many[1].frames)
    assert seeds_of(nano.generate((PROMPT, OTHER), seed=5, **FEW)) == [5, 5]
    assert len(set(seeds_of(nano.generate([PROMPT, PROMPT], **FEW)))) == 2, "each draws its own"
    assert len(nano.generate([wanflow.Request(PROMPT, seed=1, **FEW)])) == 1


def test_a_list_that_is_cancelled_keeps_what_was_made(nano: Pipeline) -> None:
    seen: list[int] = []

    def third(progress: wanflow.Progress) -> bool:
        seen.append(progress.step)
        return len(seen) < 3

    with pytest.raises(wanflow.Cancelled) as stopped:
        nano.generate(PROMPT, seed=[1, 2, 3], on_step=third, **FEW)
    assert seeds_of(stopped.value.videos) == [1]
    assert stopped.value.run.request.seed == 2 and stopped.value.run.state.index == 1


def test_numbers_of_numpy_and_names_of_torch(nano: Pipeline) -> None:
    expected = nano.begin(Request(PROMPT, size=(64, 64), fps=8.0, seed=7, **FEW))
    same = Request(
        PROMPT,
        size=[np.int64(64), 64],
        frame_num=np.int32(1),
        sample_steps=np.int64(2),
        fps=np.float32(8),
        seed=np.uint8(7),
    )
    assert nano.begin(same).recipe == expected.recipe
    assert nano.begin(same).recipe.to_json() == expected.recipe.to_json()
    for value in Request(PROMPT, sample_shift=np.float64(2.5)).__dict__.values():
        assert type(value).__module__ == "builtins"
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.bfloat16, text_cache=Path("cache"))
    assert runtime == Runtime(device="cpu", dtype="bfloat16", text_cache="cache")


def test_a_lora_is_a_text_a_path_or_a_list_of_either() -> None:
    for given in ("a@0.5", ["a@0.5"], ("a@0.5",)):
        assert Request(PROMPT, lora=given).lora == ("a@0.5",)
    assert Request(PROMPT, lora=Path("a")).lora == Request(PROMPT, lora=[Path("a")]).lora == ("a",)


def test_a_seed_is_drawn_where_none_is_given(nano: Pipeline) -> None:
    drawn = {nano.begin(Request(PROMPT, seed=None, **FEW)).request.seed for _ in range(3)}
    assert len(drawn) == 3 and all(0 <= seed < 2**32 for seed in drawn)


# --- what is refused ---

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (None, {}, "prompt must be text"),
    (5, {}, "prompt must be text"),
    (b"a circle", {}, "prompt must be text"),
    (Path("a"), {}, "prompt must be text"),
    ("", {}, "prompt is empty"),
    ([], {}, "prompt is a list of 0"),
    ([PROMPT, None], {}, "prompt must be text"),
    ([PROMPT, PROMPT], {"seed": [1, 2, 3]}, "2 prompts and 3 seeds"),
    (PROMPT, {"seed": []}, "seed is a list of 0"),
    (PROMPT, {"seed": True}, "seed must be a whole number"),
    (PROMPT, {"seed": 1.5}, "seed must be a whole number"),
    (PROMPT, {"seed": [1, "2"]}, "seed must be a whole number"),
    (PROMPT, {"size": (64.5, 64)}, "is not WIDTH"),
    (PROMPT, {"size": 64}, "size must be text or two whole numbers"),
    (PROMPT, {"frame_num": True}, "frame_num must be a whole number"),
    (PROMPT, {"frame_num": "5"}, "frame_num must be a whole number"),
    (PROMPT, {"lora": 5}, "lora must be a list of texts"),
    (PROMPT, {"lora": [5]}, "lora must be a list of texts"),
    (PROMPT, {"sample_solver": []}, "sample_solver must be one of"),
    (PROMPT, {"on_step": 5}, "on_step must be a function"),
    (PROMPT, {"preset": 5}, "preset 5 is none of"),
    (PROMPT, {"frame_nmu": 5}, "generate does not know frame_nmu; did you mean frame_num?"),
    (PROMPT, {"num_inference_steps": 5}, "did you mean sample_steps?"),
    (PROMPT, {"xyzzy": 5}, "does not know xyzzy; it knows boundary"),
]


@pytest.mark.parametrize(("prompt", "wrong", "words"), REFUSED)
def test_what_no_video_can_be_made_of_is_refused_in_words(
    nano: Pipeline, prompt: Any, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        nano.generate(prompt, **FEW | wrong)
    assert "\n" not in str(refused.value) and "--" not in str(refused.value)


def test_runs_and_requests_are_not_mixed_up(nano: Pipeline) -> None:
    for call, words in (
        (nano.begin, "begin takes a wanflow.Request"),
        (nano.resume, "resume takes a wanflow.Run"),
        (nano.finish, "finish takes a wanflow.Run"),
        (lambda value: list(nano.frames(value)), "frames takes a wanflow.Run"),
    ):
        with pytest.raises(RequestError, match=words):
            call("a red circle")


def test_a_list_is_checked_before_its_first_video(nano: Pipeline) -> None:
    steps: list[wanflow.Progress] = []
    with pytest.raises(RequestError, match="prompt is empty"):
        nano.generate([PROMPT, " "], on_step=steps.append, **FEW)
    assert not steps


@pytest.mark.parametrize(
    ("model", "wrong", "words"),
    [
        (5, {}, "model must be the name"),
        ("nano", {"high": 5}, "high must be the name"),
        ("nano", {"report": 5}, "report must be a function"),
        ("nano", {"plan_for": "large"}, "plan_for must be a wanflow.Request"),
        ("nano", {"device": 5}, "device must be text"),
        ("nano", {"dtype": torch.int8}, "dtype 'int8' is none of"),
        ("nano", {"resident_blocks": True}, "resident_blocks must be a whole number"),
        ("nano", {"devise": "cpu"}, "load does not know devise; did you mean device?"),
        ("nano", {"torch_dtype": torch.float16}, "did you mean dtype?"),
        ("~nosuchuser/a", {}, "not a usable path"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_words(
    model: Any, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        wanflow.load(model, **wrong)


def test_refusals_speak_of_fields(nano: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="frames: vae_tile 256"):
        wanflow.load("nano", vae_tile=16)
    with pytest.raises(RequestError, match="device auto takes"):
        wanflow.load("nano", device="mps" if torch.cuda.is_available() else "cuda")
    with pytest.raises(RequestError, match=r"`wanflow download --local_dir .*`"):
        wanflow.load(tmp_path / "missing")
    video = nano.generate(PROMPT, seed=1, **FEW)
    video.save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="exists; choose another name or pass overwrite"):
        video.save(tmp_path / "a.png")


def test_a_pipeline_is_not_copied(nano: Pipeline) -> None:
    for make in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(RequestError, match="not copied or pickled"):
            make(nano)


# --- what is shown ---


def test_advice_is_a_warning_that_points_at_the_caller(nano: Pipeline) -> None:
    with pytest.warns(wanflow.RequestWarning, match="does not know zebra") as found:
        nano.generate("a zebra runs", seed=1, **FEW)
    assert {warning.filename for warning in found} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nano.generate(PROMPT, seed=1, **FEW)


def test_values_fit_a_line(nano: Pipeline) -> None:
    told: list[wanflow.Progress] = []
    nano.generate(PROMPT, seed=1, on_step=told.append, **FEW)
    shown = [repr(nano), repr(told[0].run), repr(told[0])]
    assert shown[0] == "<Pipeline: nano on cpu>"
    assert shown[1] == "<Run: step 1 of 2, 1 frame of 64*64, seed 1>"
    assert all("\n" not in text and len(text) < 300 for text in shown)


class Terminal(typing.NamedTuple):
    texts: list[str]

    def write(self, text: str) -> int:
        self.texts.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_bars_are_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    pipe = wanflow.load("nano", device="cpu")
    for shows, asked in ((True, {}), (False, {"progress": False})):
        terminal = Terminal([])
        monkeypatch.setattr(sys, "stderr", terminal)
        pipe.generate(PROMPT, seed=1, **FEW, **asked)
        text = "".join(terminal.texts)
        assert ("step 2/2" in text and "part 1/1" in text) == shows, text
        assert bool(text) == shows
    quiet = Terminal([])
    monkeypatch.setattr(quiet.__class__, "isatty", lambda _: False)
    monkeypatch.setattr(sys, "stderr", quiet)
    pipe.generate(PROMPT, seed=1, **FEW)
    assert not quiet.texts


@pytest.mark.slow
def test_the_guide_runs(in_tmp: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "guides" / "python.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) > 4
    with warnings.catch_warnings():
        exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "guide"})
    made = {path.name for path in in_tmp.iterdir()}
    assert made == {"out.mp4", "out.webm", "exact.mkv", "wide.mp4", "half.latent.safetensors"}


def test_a_notebook_shows_the_video(nano: Pipeline) -> None:
    shown = nano.generate(PROMPT, seed=1, frame_num=5, sample_steps=1)._repr_html_()
    data = base64.b64decode(re.search('src="data:video/mp4;base64,([^"]+)"', shown)[1])
    assert data[4:8] == b"ftyp"


# --- threads and processes ---


@pytest.fixture
def loras(tmp_path: Path, nano: Pipeline) -> dict[str, str | None]:
    found: dict[str, str | None] = {"plain": None}
    out, inner = nano.parts.expert("high").blocks[0].ffn[0].weight.shape
    for number, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(number)
        layer = "diffusion_model.blocks.{}.ffn.0.lora_{}.weight"
        save_file(
            {
                layer.format(block, side): torch.randn(*shape, generator=generator) * 0.3
                for block in range(6)
                for side, shape in (("A", (4, inner)), ("B", (out, 4)))
            },
            tmp_path / f"{name}.safetensors",
        )
        found[name] = f"{tmp_path / name}.safetensors"
    return found


def test_threads_take_turns(loras: dict[str, str | None]) -> None:
    pipe = wanflow.load("nano", device="cpu")
    asked: dict[str, Any] = {**FEW, "seed": 1}
    alone = {name: pipe.generate(PROMPT, lora=lora, **asked).frames for name, lora in loras.items()}
    assert not np.array_equal(alone["a"], alone["b"])
    together: dict[tuple[str, int], Any] = {}

    def work(name: str) -> None:
        for number in range(2):
            run = pipe.resume(pipe.begin(Request(PROMPT, lora=loras[name], **asked)))
            together[name, number] = pipe.finish(run).frames

    threads = [threading.Thread(target=work, args=(name,)) for name in loras]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 6
    for (name, _), frames in together.items():
        assert np.array_equal(frames, alone[name]), name


def test_on_step_begins_no_other_run(nano: Pipeline) -> None:
    def again(progress: wanflow.Progress) -> None:
        nano.generate(PROMPT, **FEW)

    with pytest.raises(RequestError, match="return from it before"):
        nano.generate(PROMPT, on_step=again, **FEW)
    assert nano.generate(PROMPT, seed=1, **FEW).frames.size, "the pipeline is free again"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_to_load_and_does_not_hang(tmp_path: Path) -> None:
    script = f"""
    import os, signal, torch, wanflow
    asked = dict(frame_num=1, sample_steps=1, seed=1)
    pipe = wanflow.load("nano", device="cpu")
    here = pipe.generate({PROMPT!r}, **asked)
    torch.set_num_threads(2)
    torch.randn(700, 700) @ torch.randn(700, 700)  # starts the threads that a child lacks
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            pipe.generate({PROMPT!r}, **asked)
        except wanflow.RequestError as error:
            assert "call wanflow.load in the child" in str(error)
            own = wanflow.load("nano", device="cpu").generate({PROMPT!r}, **asked)
            os._exit(int(own.frames.tobytes() != here.frames.tobytes()))
        os._exit(2)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, signal.Signals(-done.returncode) if done.returncode < 0 else done


# --- types ---

# Keywords that take more than their field holds.
WIDER = {"lora", "device", "dtype", "text_cache", "machine_cache", "calibration"}


@pytest.mark.parametrize(
    ("keywords", "cls", "more"),
    [
        (options.RequestOptions, Request, {"preset"}),
        (options.LoadOptions, Runtime, {"high", "low", "dit", "t5", "vae", "tokenizer"}),
    ],
)
def test_keywords_have_the_types_of_the_fields(keywords: type, cls: type, more: set[str]) -> None:
    names = {**vars(options), "torch": torch, "Solver": Solver, "Quantization": Quantization}
    found, hints = get_type_hints(keywords, None, names), get_type_hints(cls)
    own = {field.name for field in fields(cls)} - {"prompt", "seed"}
    pictures = {"image", "last_image"} & own
    assert {found.get(name) for name in pictures} <= {options.AnyPicture | None}
    assert set(found) == own | more
    for name in (
        own - pictures - (WIDER if cls is Runtime or keywords is options.RequestOptions else set())
    ):
        assert found[name] == hints[name], name
    for name in WIDER & own - {"lora"}:
        assert set(get_args(hints[name]) or [hints[name]]) < set(get_args(found[name])), name


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(wanflow.__file__).parent / "py.typed").exists()


@pytest.mark.slow
def test_a_typed_script_passes_a_strict_checker(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import torch
        import wanflow

        pipe: wanflow.Pipeline = wanflow.load("nano", dtype=torch.float32, resident_blocks=2)
        video: wanflow.Video = pipe.generate("a", seed=7, size=(64, 64), lora="a.safetensors")
        video.save("a.webm", codec="vp9", crf=20)
        many: list[wanflow.Video] = pipe.generate(["a", "b"], seed=[1, 2])
        more: list[wanflow.Video] = pipe.generate("a", seed=range(3))
        again: wanflow.Video = pipe.generate(wanflow.Request("a", seed=None))
        """)
    )
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import wanflow\n"
        "wanflow.load('nano', devise='cpu')\n"
        "wanflow.load('nano').generate('a', frame_num='5')\n"
        "wanflow.load('nano').generate('a').save('a.mp4', codek='h264')\n"
    )
    check = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull]
    env = os.environ | {"MYPYPATH": str(Path(wanflow.__file__).parents[1])}
    good = subprocess.run([*check, str(script)], capture_output=True, text=True, env=env)
    assert good.returncode == 0, good.stdout
    bad = subprocess.run([*check, str(wrong)], capture_output=True, text=True, env=env).stdout
    assert all(word in bad for word in ("devise", "frame_num", "codek")), bad
