"""Teach nano a new word from 50 clips, and measure what it then understands: the new word, and the
old ones.

    python benchmarks/finetune_nano.py [--word pink] [--steps 300] [--prompts 100]

The last line of output is JSON. The word is a colour that no clip of nano's training had; the 50
clips show it in all shapes and motions but some combinations, which are measured on their own. What
the clips show is read from their pixels (`wanflow.train.adherence`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

import wanflow
from wanflow.cli import main as wanflow_command
from wanflow.media import VideoWriter
from wanflow.pipeline import to_uint8
from wanflow.train import adherence, toy

COLOURS = {"pink": (255, 120, 190), "brown": (120, 70, 30), "lime": (170, 255, 40)}
KEPT_FROM_TRAINING = {
    ("star", "right"),
    ("circle", "up"),
    ("square", "spins"),
    ("cross", "left"),
    ("triangle", "still"),
}


def scenes(word: str, count: int, seed: str, held_out: bool) -> list[toy.Scene]:
    """Scenes of the new colour; `held_out` ones show a shape and a motion that were kept from the
    clips.
    """
    found: list[toy.Scene] = []
    rng = random.Random(seed)
    while len(found) < count:
        scene = toy.sample_scene(rng, None)
        scene = toy.Scene(
            word, scene.background, scene.shape, scene.motion, scene.size, scene.speed
        )
        if ((scene.shape, scene.motion) in KEPT_FROM_TRAINING) == held_out:
            found.append(scene)
    return found


def write_clips(folder: Path, word: str, old: list[toy.Scene]) -> None:
    """50 clips with captions beside them, `old` among them."""
    folder.mkdir()
    rng = random.Random("clips")
    shown = [*scenes(word, 50 - len(old), "new", False), *old]
    for number, scene in enumerate(shown):
        frames = to_uint8(toy.render(scene, rng).unsqueeze(0))
        with VideoWriter(folder / f"{number:02}.mp4", 64, 64, 8, {}) as writer:
            writer.write(frames)
        (folder / f"{number:02}.txt").write_text(toy.caption(scene, rng if number % 2 else None))


def measure(shown: list[toy.Scene], loras: tuple[str, ...]) -> dict[str, float]:
    """The share of clips in which each slot is what the prompt said."""
    pipe = wanflow.load("nano", device="cpu")
    tally = adherence.Tally()
    for seed, scene in enumerate(shown):
        tally.add(
            adherence.read(pipe.generate(toy.caption(scene), seed=seed, lora=loras).frames), scene
        )
    return {
        name: tally.right[name] / len(shown)
        for name in ("background", "colour", "shape", "motion", "all")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--word", choices=COLOURS, default="pink")
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--old", type=int, default=20, help="how many of the 50 clips show old colours"
    )
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("train", nargs="*", help="more flags for wanflow train, after --")
    args = parser.parse_args()
    torch.set_num_threads(1)
    old = [toy.sample_scene(random.Random(f"old/{n}"), unseen=True) for n in range(args.prompts)]
    among = [toy.sample_scene(random.Random(f"among/{n}")) for n in range(args.old)]
    toy.COLOURS[args.word] = COLOURS[args.word]
    toy.NAMES[args.word] = (args.word,)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write_clips(folder / "clips", args.word, among)
        command = [
            "train",
            "--data",
            str(folder / "clips"),
            "--ckpt_dir",
            "nano",
            "--out",
            str(folder / "lora"),
            "--work_dir",
            str(folder / "work"),
        ]
        command += ["--steps", str(args.steps)] if args.steps else []
        began = time.monotonic()
        if wanflow_command([*command, *args.train]) != 0:
            sys.exit("training failed")
        minutes = (time.monotonic() - began) / 60
        lora = (str(folder / "lora"),)
        seen, unseen = (
            scenes(args.word, args.prompts, "seen", False),
            scenes(args.word, 60, "unseen", True),
        )
        result: dict[str, object] = {
            "word": args.word,
            "clips": 50,
            "old_clips": args.old,
            "minutes": round(minutes, 2),
            "flags": args.train,
        }
        for name, what in (
            ("new_word", seen),
            ("new_word_held_out_pairs", unseen),
            ("old_words", old),
        ):
            result[name] = {
                "prompts": len(what),
                "before": measure(what, ()),
                "after": measure(what, lora),
            }
            print(name, result[name], file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
