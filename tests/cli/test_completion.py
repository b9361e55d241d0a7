"""A shell completes commands, flags, values and files by the script that wanflow prints."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from wanflow.cli import COMMANDS, command_parser, main

COMPLETE = r"""
source "$0"
[[ "$(complete -p wanflow)" == *"-F _shtab_wanflow wanflow" ]] || exit 1
COMP_WORDS=(wanflow "$@"); COMP_CWORD=$#; COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}
_shtab_wanflow wanflow "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "wanflow"
    with pytest.MonkeyPatch.context() as patch, file.open("w") as out:
        patch.setattr("sys.stdout", out)
        assert main(["completion", "bash"]) == 0
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], set(COMMANDS)),
        (["gen"], {"generate"}),
        (["generate", "--pre"], {"--preset", "--prefetch", "--preview"}),
        (["generate", "--sample_solver", ""], {"unipc", "dpm++", "euler"}),
        (["generate", "--ckpt_dir", "nano", "--quantize", "f"], {"fp8"}),
        (["generate", "--save_file", "cl"], {"clip.mp4", "clips"}),
        (["generate", "--ckpt_dir", "cl"], {"clips"}),
        (["generate", "--lora", "cl"], {"clip.mp4", "clips"}),
        (["replay", "cl"], {"clip.mp4", "clips"}),
        (["generate", "--last_image", "cl"], {"clip.mp4", "clips"}),
        (["convert", "nano", "x", "--to", "gguf-q4"], {"gguf-q4_0", "gguf-q4_1"}),
        (["train", "--data", "cl"], {"clips"}),
        (["completion", "z"], {"zsh"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_completes(words: list[str], expected: set[str], script: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clip.mp4").touch()
    line = ["bash", "--norc", "-c", COMPLETE, str(script), *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_command_and_flag(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    dashes = "" if shell == "fish" else "--"  # fish writes `-l prompt`
    for name in COMMANDS:
        assert name in shown
        for action in command_parser(name)._actions:
            if action.help != "==SUPPRESS==":
                assert all(f"{dashes}{flag[2:]}" in shown for flag in action.option_strings)


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fihs"]) == 2
    assert "did you mean fish?" in capsys.readouterr().err
