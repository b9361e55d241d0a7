"""Command lines of strangers: made by the parsers' own flags, and carried out up to the weights."""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch

from helpers.mutations import HUGE, NAMES, NUMBERS, text
from helpers.recipe_mutations import GOOD, PATHS, PROMPTS
from helpers.strangers import Attempt, command
from wanflow.checkpoint.checkpoint import open_checkpoint
from wanflow.cli import COMMANDS, command_parser
from wanflow.config import RequestError
from wanflow.media import recipe_tags, save_picture
from wanflow.pipeline import Run
from wanflow.presets import NANO_FOLDER
from wanflow.recipe import Recipe
from wanflow.sampling.solvers import SolverState

FLAGS = ["--sample_steps", "2", "--frame_num", "5", "--device", "cpu"]
# A line of each command that is right, in whose place a mutated one comes.
LINES: tuple[tuple[str, ...], ...] = (
    ("generate", "--ckpt_dir", "nano", "--prompt", "a red circle", *FLAGS),
    ("generate", "--ckpt_dir", "nano", "--prompt", "a red circle", "--save_file", "new/x.mp4"),
    ("generate", "--ckpt_dir", "nano", "--config", "good.toml", "--prompt", "a"),
    ("generate", "--ckpt_dir", "nano", "--recipe", "good.png", "--seed", "3"),
    ("generate", "--resume", "good.latent.safetensors"),
    ("replay", "good.png", "--save_file", "y.png"),
    ("decode", "good.latent.safetensors", "--ckpt_dir", "nano"),
    ("plan", "--ckpt_dir", "nano", "--size", "64*64"),
    ("plan", "--gpu", "rtx4090", "--ram", "64", "--size", "832*480"),
    ("inspect", "good.png"),
    ("inspect", "empty"),
    ("convert", "nano", "new_folder", "--to", "bf16", "--max_shard_size", "1GB"),
    ("train", "--data", "clips", "--ckpt_dir", "nano", "--out", "lora", "--steps", "2"),
    ("train", "--evaluate", "nano", "--prompts", "2"),
    ("train", "--nano", "--scale", "0.01", "--work_dir", "work"),
    ("download", "--variant", "official", "--local_dir", "down", "--dry_run"),
    ("download", "--repo", "a/b", "--endpoint", "http://127.0.0.1:9", "--dry_run"),
    ("serve", "--ckpt_dir", "nano", "--port", "0", "--data_dir", "data"),
    ("worker", "--ckpt_dir", "nano", "--data_dir", "data", "--gpus", "0,1"),
    ("generate", "--ckpt_dir", "nano", "--prompt_file", "good.txt", "--seeds", "1,2", *FLAGS),
    ("generate", "--ckpt_dir", "nano", "--prompt", "a", "--grid", "cfg_high=1,2", *FLAGS),
    ("doctor", "--ckpt_dir", "."),
    ("completion", "bash"),
    ("--help",),
    (),
)
NUMERIC = (
    *("", "-", "--", "nan", "NaN", "-inf", "inf", "Infinity", "1e999", "-1", "0", "1e400", "0x10"),
    *("1_000", "٣", "²", "1.5", "1e-320", " 7 ", "7\n", "+5", "9" * 4299, HUGE, str(10**20)),
    *map(str, NUMBERS),
)
FILES = (
    *("good.png", "good.latent.safetensors", "good.toml", "good.json", "good.txt", "pipe", "empty"),
    *("link", "loop", "/dev/null", "/dev/full", "/proc/self/fd/0", "clips", "new.mp4", "new.png"),
    *("é" * 130 + ".mp4", "x/" * 2000, "nano", "Nano", "a/b", "~", "~root/x", "~/x.mp4"),
)
TEXTS = (
    *("a\x01b", os.fsdecode(b"\xff\xfe\x80"), "\x1b]0;t\x07", "\u202ex\r\n"),
    *("%(prog)s", "{}", "@file", "--", "-x", "=", "a=b", "x" * 100_000, " ", "'", '"', "\\", "*"),
    *("0,1", "cpu,cpu", "cpu," * 5000, "0," * 100, "cfg2xulysses4", "cfg9xring9", "auto", "cuda:9"),
    *(
        "http://[::1",
        "http://:abc",
        "ftp://x",
        "https://\uff41.b",
        "http://x\ny",
        "http://u:p@h:1e9",
    ),
    *(
        "10GB",
        "1e9GB",
        "9" * 400 + "GB",
        "0",
        "-5GB",
        "12gb",
        "rtx3060",
        "1280*720",
        "16x16",
        "0*0",
    ),
    *("99999999999*16", "-16*16", "16*16*16", "٣٢*16", "64*64 ", "true", "none", "main"),
)
ENVIRONMENT = {
    "COLUMNS": ("0", "-1", "junk", "1", HUGE, "99999999"),
    "LINES": ("junk", "0"),
    "TERM": ("dumb", "", "junk\x1b"),
    "NO_COLOR": ("", "1"),
    "LANG": ("C", "junk"),
    "HOME": (None, "", "/nowhere", "relative", "\x1b[2J"),
    "XDG_CACHE_HOME": (None, "", "pipe", "/proc/x", "\x01"),
    "WANFLOW_CKPT_DIR": ("nano", "", "/nowhere", "pipe", "\x1b[2J", "x" * 5000, "~nosuchuser"),
    "HF_HOME": ("pipe", "/proc/x"),
    "DASH_API_KEY": ("", "k", "k\nx", "ключ"),
    "DASH_API_URL": ("", "junk", "http://[::1", "file:///etc/passwd"),
    "OMP_NUM_THREADS": ("0", "junk", "-1", HUGE),
    "CUDA_VISIBLE_DEVICES": ("", "junk", "-1"),
}


class Stopped(RequestError):
    """Everything was well up to here, where weights would be loaded."""


def stop(*_: object, **__: object) -> None:
    raise Stopped("the weights would be loaded now")


# What takes weights, other processes, a network or minutes.
STOPS = (
    *("wanflow.assemble.assemble", "wanflow.parallel.agent.run_ranks", "wanflow.extend.extend"),
    *("wanflow.plan.solve.solve", "wanflow.doctor.report.examine", "wanflow.train.nano.train"),
    *("wanflow.train.i2v.train", "wanflow.serve.supervise.Supervisor.run"),
    "wanflow.cli.worker._listen",
    *("wanflow.train.nano.evaluate", "wanflow.train.finetune.finetune"),
    *("wanflow.train.memory.refuse", "wanflow.convert.convert.convert"),
    "wanflow.download.hubs.HuggingFace._tree",
)


NANO = open_checkpoint(NANO_FOLDER)


def opened_once(folder: Path, given: Any = None, *more: Any) -> Any:
    """nano, which most lines open, without reading its headers again."""
    known = folder == NANO_FOLDER and not given and not more
    return NANO if known else open_checkpoint(folder, given, *more)


def of_action(rng: Random, action: argparse.Action) -> str:
    """A value for a flag: at, beyond or next to what it takes, or of any kind."""
    kind = getattr(action.type, "__name__", "str")
    choices = [str(choice) for choice in action.choices or ()]
    known = [
        *choices,
        *(choice.upper() for choice in choices),
        *(choice[:-1] for choice in choices),
    ]
    if kind in ("int", "float"):
        known += NUMERIC
    elif kind in ("file_path", "Path"):
        known += [*FILES, *PATHS]
    elif "prompt" in action.dest:
        known += PROMPTS
    sort = rng.choice((known or TEXTS, known or TEXTS, TEXTS, FILES, NAMES, NUMERIC, PATHS))
    return rng.choice(list(sort))


def added(rng: Random, words: list[str], actions: list[argparse.Action]) -> list[str]:
    """The words with a flag of the command more, in one of its spellings."""
    action = rng.choice(actions)
    if not action.option_strings:
        return [*words, of_action(rng, action)]
    flag = rng.choice(action.option_strings)
    if rng.random() < 0.1:
        flag = rng.choice(
            (flag[:-1], flag[: rng.randrange(2, 9)], flag.replace("_", "-"), flag * 2)
        )
    value = of_action(rng, action)
    several = [of_action(rng, action) for _ in range(rng.choice((0, 1, 1, 3)))]
    forms: list[list[str]] = [[flag, value], [flag, value], [f"{flag}={value}"]]
    if action.nargs == 0:
        forms = [[flag], [flag], [f"{flag}={value}"]]
    elif action.nargs == "+":
        forms = [[flag, *several], [flag, value]]
    return [*words, *rng.choice(forms)]


def mutated(rng: Random, words: list[str], actions: list[argparse.Action]) -> list[str]:
    """The words with one change."""
    way = rng.random()
    at = rng.randrange(len(words)) if words else 0
    at = max(at, 1) if len(words) > 1 and rng.random() < 0.9 else at  # not always the command
    if way < 0.7 or not words:
        return added(rng, words, actions) if actions else [rng.choice((*NAMES, *TEXTS))]
    if way < 0.8:
        return [*words[:at], *words[at + 1 :]]
    if way < 0.95:
        odd = rng.choice((*TEXTS, *NAMES, *FILES, text(rng, words[at])))
        return [*words[:at], odd, *words[at + 1 :]]
    if way < 0.98:
        return [
            *words[:at],
            rng.choice((words[at] * 2, words[at][::-1], words[at].upper())),
            *words[at:],
        ]
    return words * rng.choice((2, 50))


def usable(word: str) -> str:
    """The word as a system can hand it over: no null character, surrogates only for bytes."""
    word = word.replace("\0", "")
    try:
        os.fsencode(word)
    except UnicodeEncodeError:
        return word.encode("utf-8", "replace").decode()
    return word


@contextmanager
def surroundings(rng: Random) -> Iterator[None]:
    """A changed environment for one call, and no way to weights."""
    with mock.patch.dict(os.environ):
        for name in rng.sample(list(ENVIRONMENT), rng.choice((0, 0, 1, 2))):
            value = rng.choice(ENVIRONMENT[name])
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        for name in STOPS:
            mock.patch(name, stop).start()
        mock.patch("wanflow.opening.open_checkpoint", opened_once).start()
        try:
            yield
        finally:
            mock.patch.stopall()


def make_files(folder: Path) -> None:
    """Write good files of each kind, and things that are no files."""
    recipe = Recipe.from_json(GOOD, "good")
    frame = np.zeros((64, 64, 3), np.uint8)
    save_picture(folder / "good.png", frame, recipe_tags(recipe.to_json(), "a"), True)
    (folder / "good.json").write_text(json.dumps(GOOD))
    (folder / "good.toml").write_text("sample_steps = 2\n[generate]\nframe_num = 5\n")
    (folder / "good.txt").write_text("words")
    x = torch.zeros(1, 16, 1, 8, 8)
    Run(recipe, SolverState(1, x, (x.clone(),), x.clone())).save(folder / "good.latent.safetensors")
    (folder / "clips").mkdir()
    (folder / "empty").touch()
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")


def line(folder: Path) -> Attempt:
    """A command line, in a changed environment."""
    good = folder / "good"
    good.mkdir()
    make_files(good)
    flags = {name: command_parser(name)._actions for name in COMMANDS}
    for name in STOPS:  # what they import takes seconds, and none of those of an attempt
        pkgutil.resolve_name(name)

    def attempt(rng: Random) -> object:
        place = folder / "here"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place, symlinks=True, copy_function=_copy)
        os.chdir(place)
        words = list(rng.choice(LINES))
        actions = flags.get(words[0] if words else "", [])
        for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
            words = mutated(rng, words, actions)
        with surroundings(rng):
            return command([*map(usable, words)])

    return attempt


def _copy(source: str, target: str) -> None:
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copy2(source, target)
