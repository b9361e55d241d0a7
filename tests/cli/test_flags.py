"""Flags are made from settings, help fits a terminal, and typos get a suggestion."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wanflow.cli import COMMANDS, build_parser, command_parser, main
from wanflow.cli.parser import settings_from
from wanflow.config import RequestError
from wanflow.presets import T2V_A14B
from wanflow.request import CompleteRequest, Request
from wanflow.runtime import Runtime
from wanflow.schema import json_schema
from wanflow.settings import Setting, settings_of

ROOT = Path(__file__).parents[2]
# What belongs to the command and not to a video: files, weights, processes, official spellings.
OWN = {
    *("-h", "--help", "--help-all", "--json", "--quiet", "--verbose"),
    *("--ckpt_dir", "--high", "--low", "--dit", "--t5", "--vae", "--tokenizer"),
    *("--save_file", "--overwrite", "--contact_sheet", "--preview", "--resume", "--force"),
    *("--config", "--recipe", "--lora_dir", "--trust_paths"),
    *("--prompt_file", "--seeds", "--num_videos", "--grid", "--out_dir"),
    *("--gpus", "--timeout", "--parallel", "--preset", "--sample_guide_scale"),
    *("--task", "--t5_fsdp", "--convert_model_dtype", "--use_prompt_extend"),
    *("--prompt_extend_method", "--prompt_extend_model", "--prompt_extend_target_lang"),
    *("--audio", "--enable_tts", "--tts_prompt_audio", "--tts_prompt_text"),
    *("--tts_text", "--pose_video", "--start_from_ref", "--infer_frames", "--num_clip"),
    *("--src_root_path", "--refert_num", "--replace_flag", "--use_relighting_lora"),
}
SETTINGS = [
    (cls, one) for cls in (Request, Runtime) for one in settings_of(cls).values() if one.flags
]


def test_no_flag_of_generate_exists_that_no_field_made() -> None:
    flags = set(command_parser("generate")._option_string_actions)
    made = {f"--{flag}" for _, one in SETTINGS for flag in one.flags}
    assert flags == made | OWN and not made & OWN


def some(one: Setting) -> tuple[str, Any]:
    """A word for a flag, and the value of its field, which is not the default."""
    if one.switch:
        return "", True
    if one.choices:
        choice = next(c for c in reversed(one.choices) if c != one.default)
        return choice, choice
    if one.kind is bool:
        return "true", not one.negated
    if one.kind is tuple:
        return "a b", ("a", "b")
    number = 3 if one.range is None or one.range[1] > 3 else 1
    return str(number), one.kind(number)


@pytest.mark.parametrize(("cls", "one"), SETTINGS, ids=lambda value: getattr(value, "name", ""))
def test_a_flag_sets_its_field(cls: type, one: Setting) -> None:
    parser = command_parser("generate")
    word, value = some(one)
    assert settings_from(cls, parser.parse_args([])) == {}
    for flag in one.flags:
        found = settings_from(cls, parser.parse_args([f"--{flag}", *word.split()]))
        assert found == {one.name: value} and type(found[one.name]) is type(value)
    one.check(value)


@pytest.mark.parametrize(("cls", "one"), SETTINGS, ids=lambda value: getattr(value, "name", ""))
def test_a_value_of_another_type_or_outside_the_range_is_refused(cls: type, one: Setting) -> None:
    wrong: list[Any] = [object()]
    if one.range is not None:
        wrong += [one.range[0] - 1, float("nan"), True, "3"]
        wrong += [] if one.range[1] == math.inf else [one.range[1] * 2]
    wrong += ["another"] if one.choices else []
    for value in wrong:
        with pytest.raises(RequestError, match=one.name):
            one.check(value)
        with pytest.raises(RequestError):
            if cls is Runtime:
                Runtime(**{one.name: value})
            else:
                Request(**{"prompt": "a", one.name: value}).complete(T2V_A14B)


def test_every_value_of_a_complete_request_is_declared_by_the_request() -> None:
    assert {*settings_of(Request)} - {"lora_from", "exact_size"} == set(
        CompleteRequest.__dataclass_fields__
    )
    assert {*settings_of(Runtime)} == set(Runtime.__dataclass_fields__)
    with pytest.raises(RequestError, match="frame_num"):
        CompleteRequest(**{**vars(Request("a").complete(T2V_A14B)), "frame_num": None})


def test_the_schema_says_what_the_checks_say() -> None:
    schema = json_schema(Request)
    assert schema["required"] == ["prompt"] and not schema["additionalProperties"]
    assert schema["properties"]["sample_solver"]["enum"] == ["unipc", "dpm++", "euler", None]
    steps = schema["properties"]["sample_steps"]
    assert (steps["type"], steps["minimum"], steps["maximum"]) == (["integer", "null"], 1, 1000)
    assert json_schema(Runtime)["properties"]["lora"]["default"] == "live"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_grouped_and_fits_80_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser(name)
    for text in (parser.format_help(), parser.format_all()):
        assert COMMANDS[name].example in text
        assert max(map(len, text.splitlines())) <= 80
    first, *_ = parser.flag_groups()
    if COMMANDS[name].brief:
        assert len(first._group_actions) in (4, 5, 6)
        assert len(parser.format_help().splitlines()) < 50
    with pytest.raises(SystemExit) as end:
        main([name, "--help-all"])
    assert end.value.code == 0 and capsys.readouterr().out == parser.format_all()
    for action in parser._actions:
        assert action.help, action.dest
        assert any(flag in parser.format_help() for flag in action.option_strings or "-") or (
            action.help == "==SUPPRESS=="
        )


@pytest.mark.parametrize(
    ("argv", "code"), [([], 2), (["--help"], 0), (["--help-all"], 0), (["help"], 0)]
)
def test_wanflow_alone_shows_every_command_with_an_example(
    argv: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == code
    shown = capsys.readouterr().out
    assert all(name in shown and one.example in shown for name, one in COMMANDS.items())
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ("genrate", "generate"),
        ("donwload", "download"),
        ("generate --promt x", "--prompt"),
        ("generate --ckpt-dir nano", "--ckpt_dir"),
        ("generate --CKPT_DIR nano", "--ckpt_dir"),
        ("generate --sample_solver unpic", "unipc"),
        ("generate --quantize FP8", "fp8"),
        ("generate --preset lightening4", "lightning4"),
        ("generate --dtype float23 --ckpt_dir nano --prompt a", "float32"),
        ("generate --attention spda --ckpt_dir nano --prompt a", "sdpa"),
        ("generate --ckpt_dir Nano --prompt a", "nano, the miniature inside wanflow"),
        ("replay x --overwrit", "--overwrite"),
        ("convert nano x --to gguf-q80", "gguf-q8_0"),
        ("generate --sample-steps=4", "--sample_steps"),
        ("plan --numgpus 2", "--num_gpus"),
        ("inspect x --chek", "--check"),
    ],
)
def test_a_typo_gets_a_suggestion_in_one_line(
    argv: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"did you mean {meant}?" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("generate --frame_num x", "--frame_num must be a whole number (got 'x')"),
        ("generate --fps fast", "--fps must be a number (got 'fast')"),
        ("generate --prefetch perhaps", "--prefetch must be true or false (got 'perhaps')"),
        ("generate --sample_solver heun", "--sample_solver must be one of"),
        ("generate --seed", "--base_seed: expected one argument"),
        ("convert nano x --to fp9", "--to must be one of"),
        ("convert nano", "required: DST, --to"),
    ],
)
def test_an_invalid_value_is_named_with_what_was_expected(
    argv: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and "--help" in line


OFFICIAL = (
    *("task", "size", "frame_num", "ckpt_dir", "offload_model", "ulysses_size", "t5_fsdp"),
    *("t5_cpu", "dit_fsdp", "save_file", "prompt", "use_prompt_extend", "prompt_extend_method"),
    *("prompt_extend_model", "prompt_extend_target_lang", "base_seed", "image", "sample_solver"),
    *("sample_steps", "sample_shift", "sample_guide_scale", "convert_model_dtype"),
    *("src_root_path", "refert_num", "replace_flag", "use_relighting_lora", "num_clip", "audio"),
    *("enable_tts", "tts_prompt_audio", "tts_prompt_text", "tts_text", "pose_video"),
    *("start_from_ref", "infer_frames"),
)


def test_the_beginning_of_an_official_flag_means_what_it_means_there() -> None:
    """Or it is refused, where one of our flags begins so too; it never becomes another flag."""
    parser, taken = command_parser("generate"), 0
    for flag in OFFICIAL:
        for end in range(1, len(flag)):
            beginning = flag[:end]
            if beginning == "dit":
                continue  # the transformer's file: a flag of its own
            if [name for name in OFFICIAL if name.startswith(beginning)] != [flag]:
                continue  # ambiguous there
            meant = [
                name for name in parser._option_string_actions if name.startswith(f"--{beginning}")
            ]
            assert f"--{flag}" in meant
            if len(meant) > 1 and f"--{beginning}" not in meant:
                with pytest.raises(RequestError, match=f"--{flag}"):
                    parser._parse_optional(f"--{beginning}")
                continue
            if f"--{beginning}" in meant:  # a flag of ours, which needs a value there
                with pytest.raises(RequestError, match=f"--{beginning}: expected one argument"):
                    parser.parse_args([f"--{beginning}", "--prompt", "x"])
                continue
            found = parser._parse_optional(f"--{beginning}")
            action = (found[0] if isinstance(found, list) else found)[0]
            assert f"--{flag}" in action.option_strings, beginning
            taken += 1
    assert taken > 50


def test_the_beginning_of_a_flag_stands_for_it_on_generate_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = command_parser("generate").parse_args(["--sample_st", "4", "--offl=true"])
    assert (args.sample_steps, args.offload_model) == (4, True)
    assert main(["generate", "--sample_s", "4"]) == 2
    assert "--sample_s may mean --sample_solver, --sample_steps, --sample_sh" in (
        capsys.readouterr().err
    )
    assert main(["replay", "x", "--overwr"]) == 2
    assert "did you mean --overwrite?" in capsys.readouterr().err


def test_two_dashes_are_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    """argparse drops them, and makes an empty list of what is left."""
    assert command_parser("generate").parse_args(["--prompt=--"]).prompt == "--"
    assert main(["train", "--nano", "--rank=--"]) == 2
    assert "--rank must be" in capsys.readouterr().err


def test_what_resembles_nothing_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--xyzzy"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_one_parser_of_all_commands_and_one_of_each_agree() -> None:
    args = build_parser().parse_args(["generate", "--seed", "3"])
    assert vars(args) == vars(command_parser("generate").parse_args(["--seed", "3"]))


NANO = "generate --ckpt_dir nano --prompt a "
# What is wrong with each is known without torch.
WITHOUT_TORCH = [
    *("", "genrate", "generate --promt a", "generate", "generate --ckpt_dir nano"),
    *("generate --ckpt_dir Nano --prompt a", "generate --ckpt_dir /nowhere --prompt a"),
    *(NANO + "--size 33*33", NANO + "--size 7", NANO + "--frame_num 6", NANO + "--frame_num x"),
    *(NANO + "--sample_steps 0", NANO + "--seed 99999999999999999999", NANO + "--fps nan"),
    *(NANO + "--sample_solver unpic", NANO + "--dtype int3", NANO + "--device tpu"),
    *(NANO + "--attention x", NANO + "--lora /nowhere", NANO + "--lora a@high=x"),
    *(NANO + "--high /nowhere", NANO + "--task s2v-14B", NANO + "--task x"),
    *(NANO + "--task i2v-A14B", NANO + "--task ti2v-5B --size 1280*720"),
    *(NANO + "--ulysses_size 4", NANO + "--dit_fsdp", NANO + "--parallel tensor4"),
    *(NANO + "--gpus 0,x", NANO + "--gpus 0,0", NANO + "--timeout -1"),
    *(NANO + "--save_file a.avi", NANO + "--save_file there.mp4", NANO + "--save_file ."),
    *(NANO + "--config /nowhere", NANO + "--config there.mp4", NANO + "--config /dev/zero"),
    *(NANO + "--recipe /nowhere", NANO + "--recipe there.json"),
    *("generate --resume /nowhere", "replay /nowhere", "replay .", "decode /nowhere"),
    *("inspect /nowhere", "convert /nowhere x --to fp8", "convert nano x --to fp9"),
    "convert nano there.mp4 --to fp8",
    *("train", "train --data /nowhere --ckpt_dir nano --out x", "train --evaluate /nowhere"),
    *("plan --size 33*33", "plan --gpu potato", "doctor --x", "download --variant x"),
    *("completion tcsh", "--help", "--version", "generate --help", "plan --help-all"),
]


def test_help_and_refusals_import_no_torch(tmp_path: Path) -> None:
    (tmp_path / "there.mp4").write_text("x")
    (tmp_path / "there.json").write_text("{")
    code = f"""
import contextlib, io, sys
from wanflow.cli import main
for line in {WITHOUT_TORCH}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(line.split())
        except SystemExit as end:
            code = end.code
    assert code == (0 if "--help" in line or "--version" in line else 2), (line, code)
    assert "Traceback" not in err.getvalue(), line
    assert "torch" not in sys.modules, line
    assert "wanflow.train.nano" not in sys.modules, line
"""
    environment = {k: v for k, v in os.environ.items() if k != "WANFLOW_CKPT_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr


def test_a_refusal_is_quick() -> None:
    """By time on the processor: when this was written 0.1 s, and 0.01 s for Python alone."""

    def seconds(*argv: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, *argv], capture_output=True)
        after = os.times()
        return (
            after.children_user
            + after.children_system
            - (before.children_user + before.children_system)
        )

    line = ["-m", "wanflow", *NANO.split(), "--size", "33*33"]
    assert min(seconds(*line) for _ in range(3)) < 30 * max(
        0.01, min(seconds("-c", "pass") for _ in range(3))
    )


def test_the_reference_page_is_up_to_date() -> None:
    committed = ROOT / "docs/reference/cli.md"
    page = runpy.run_path(str(committed.with_name("make_cli.py")))["page"]
    assert committed.read_text(encoding="utf-8") == page(), "run `make reference`"
