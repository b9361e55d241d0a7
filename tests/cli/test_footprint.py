"""What a command imports: a run of nano loads only what it uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.common import PROMPT

MODULES = 73  # ours; 8 of them are packages
RUN = """
import sys
from wanflow.cli import main
main(sys.argv[1:])
print(*(name for name in sys.modules if name.partition(".")[0] == "wanflow"))
"""
# Packages and files that a short run does not use.
ABSENT = (
    "convert",
    "doctor",
    "download",
    "extend",
    "inspect",
    "train",
    "cli.convert",
    "cli.doctor",
    "cli.download",
    "cli.inspect",
    "cli.plan",
    "cli.train",
    "checkpoint.block_scales",
    "checkpoint.scales",
    "checkpoint.gguf",
    "loaders.prompt_cache",
    "loaders.streamed",
    "loaders.text_encoder",
    "lora",
    "parallel",
    "plan",
    "transforms.block_streaming",
    "transforms.blocks",
    "transforms.ggml",
    "transforms.lora",
    "transforms.packed",
    "transforms.quant",
    "transforms.vae_tiling",
)


def test_a_run_of_nano_imports_only_what_it_uses(tmp_path: Path) -> None:
    arguments = ["generate", "--ckpt_dir", "nano", "--device", "cpu", "--prompt", PROMPT]
    arguments += ["--sample_steps", "2", "--frame_num", "5", "--save_file", str(tmp_path / "a.mp4")]
    run = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "WORLD_SIZE"},
    )
    loaded = sorted(name for name in run.stdout.split() if name.startswith("wanflow"))
    unused = [
        name for name in loaded for absent in ABSENT if f"{name}.".startswith(f"wanflow.{absent}.")
    ]
    assert not unused, unused
    assert len(loaded) <= MODULES, loaded
