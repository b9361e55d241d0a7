"""Every command over the family: tasks, sizes, pictures, names, and what is refused in words."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from helpers.common import PROMPT

from wanflow.cli import main


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Run a command line that is refused with exit code 2, and return its one line."""
    try:
        code = main(shlex.split(line))
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    assert (code, said.out) == (2, ""), said.err
    (text,) = said.err.splitlines()
    assert "Traceback" not in text
    return text


NANO = f"generate --ckpt_dir nano --prompt '{PROMPT}' "


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (NANO + "--task i2v-A14B --image x.png", ["i2v-A14B", "nano", "t2v-A14B"]),
        (NANO + "--task ti2v-5B", ["ti2v-5B", "nano", "t2v-A14B"]),
        (NANO + "--task i2v-A14B", ["--image"]),
        (NANO + "--task t2v-A14B --image x.png", ["I2V-A14B", "TI2V-5B"]),
        (NANO + "--task ti2v-5B --last_image x.png", ["last_image", "I2V-A14B"]),
        (NANO + "--task ti2v-5B --size 1280*720", ["--size 1280*704"]),
        (NANO + "--task animate-14B", ["animate-14B", "i2v-A14B", "ti2v-5B"]),
    ],
)
def test_a_task_is_checked(
    line: str, words: list[str], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (64, 48), "red").save("x.png")
    text = refused(capsys, line)
    assert [word for word in words if word not in text] == []


def test_the_task_of_the_weights_is_accepted(in_tmp: Path) -> None:
    line = NANO + "--task t2v-A14B --frame_num 5 --sample_steps 2 --save_file a.mp4"
    assert main(shlex.split(line)) == 0 and Path("a.mp4").exists()
