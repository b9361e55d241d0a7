"""Define the flags that several commands share, and read what they say."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.cli.parser import Parser, add_settings, file_path, number, settings_from, short
from wanflow.config import RequestError
from wanflow.presets import EMBEDDED, FAMILY, SETTINGS, ModelSpec
from wanflow.request import SCALE, VIDEOS, Request, with_settings
from wanflow.runtime import Runtime
from wanflow.untrusted import printable, user_path

if TYPE_CHECKING:
    from wanflow.checkpoint.checkpoint import Checkpoint
    from wanflow.checkpoint.parts import Part

# Flags of the official script that belong to its other tasks: accepted, and reported as unused.
OTHER_TASKS = (
    "audio",
    "enable_tts",
    "tts_prompt_audio",
    "tts_prompt_text",
    "tts_text",
    "pose_video",
    "start_from_ref",
    "infer_frames",
    "num_clip",
    "src_root_path",
    "refert_num",
    "replace_flag",
    "use_relighting_lora",
)
CKPT_DIR = "WANFLOW_CKPT_DIR"  # the environment variable that --ckpt_dir defaults to
# What containers set in place of flags, which win.
ENVIRONMENT = {
    "ckpt_dir": CKPT_DIR,
    "db": "WANFLOW_DB",
    "data_dir": "WANFLOW_DATA_DIR",
    "token": "WANFLOW_TOKEN",
    "host": "WANFLOW_HOST",
    "port": "WANFLOW_PORT",
    "gpus": "WANFLOW_GPUS",
}
RUN = {spec.task: spec for spec in FAMILY}
TASKS = (*RUN, "animate-14B", "s2v-14B")  # of the official script
PARTS: dict[Part, str] = {
    "high": "the high-noise expert",
    "low": "the low-noise expert",
    "dit": "the transformer of a model that has one, such as TI2V-5B",
    "t5": "the text encoder",
    "vae": "the VAE",
    "tokenizer": "tokenizer.json, spiece.model, or a T5 file that embeds it",
}
LIST = ("prompt_file", "seeds", "num_videos", "grid")  # flags that ask for several videos
# The groups that settings name, in the order of --help-all: title and description.
GROUPS = {
    "main": ("most used", None),
    "picture": ("picture", None),
    "video": ("video", None),
    "sampling": ("sampling", None),
    "LoRA": ("LoRA", None),
    "memory": ("memory and precision", "Unset options are chosen for your machine (wanflow plan)."),
    "parallel": ("several GPUs", "Under torchrun, or with --gpus; the plan chooses the rest."),
    "run": ("run", None),
    "parts": ("single files", "Of any format; in place of what --ckpt_dir holds, or without it."),
    "prompt": ("prompt extension", "A server rewrites a short prompt into a detailed one."),
    "compatible": ("accepted for compatibility", None),
}


def parallel(text: str) -> dict[str, int]:
    """Read a layout: `auto` -> {}; `cfg2xulysses4` -> {"cfg": 2, "ring": 1, "ulysses": 4}."""
    if text == "auto":
        return {}
    found = [
        re.fullmatch(r"(cfg|ring|ulysses)([1-9]\d{0,3})", part) for part in text.lower().split("x")
    ]
    sizes = {part[1]: int(part[2]) for part in found if part}
    if len(sizes) != len(found):
        raise argparse.ArgumentTypeError(
            f"must be auto, or cfg, ring and ulysses as in cfg2xulysses4 (got {short(repr(text))})"
        )
    return {"cfg": 1, "ring": 1, "ulysses": 1, **sizes}


def generate_flags(p: Parser) -> None:
    """Add every flag of `wanflow generate`."""
    groups = {name: p.add_argument_group(*texts) for name, texts in GROUPS.items()}
    groups["main"].add_argument(
        "--ckpt_dir",
        metavar="DIR",
        help=f"folder of the weights, or nano, the miniature (default: {CKPT_DIR})",
    )
    groups["main"].add_argument(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=f"{', '.join(RUN)}; checked against the weights, which decide without it",
    )
    add_settings(Request, groups)
    target_flag(groups["main"])
    add_settings(Runtime, groups)
    groups["sampling"].add_argument(
        "--sample_guide_scale",
        type=number(float, *SCALE["range"]),
        metavar="SCALE",
        help="guidance of both experts; --cfg_high and --cfg_low override it",
    )
    groups["LoRA"].add_argument(
        "--preset", choices=SETTINGS, help="values for distilled LoRAs; your own flags override it"
    )
    groups["parallel"].add_argument(
        "--parallel", type=parallel, metavar="LAYOUT", help="auto, or cfg2xring2xulysses4"
    )
    groups["run"].add_argument(
        "--resume",
        type=file_path,
        metavar="FILE",
        help="continue a run saved as *.latent.safetensors",
    )
    groups["run"].add_argument(
        "--recipe",
        type=file_path,
        metavar="FILE",
        help="start from a recipe: JSON, or a video or picture; flags override it",
    )
    config_flag(groups["run"])
    run_flags(groups["run"], groups["parallel"])
    groups["run"].add_argument(
        "--preview",
        type=file_path,
        nargs="?",
        const="auto",
        metavar="FILE",
        help="draw the run as its steps go: .png, .webp; alone, or auto: beside the video",
    )
    groups["run"].add_argument(
        "--force", action="store_true", help="start although the machine is too small"
    )
    part_flags(groups["parts"])
    _extension_flags(groups["prompt"])
    _compatible_flags(groups["compatible"])


def again_flags(p: Parser) -> None:
    """Add the flags of a command that makes the video of a recipe."""
    names = ("run", "memory", "parallel")
    groups = {name: p.add_argument_group(*GROUPS[name]) for name in names}
    run = groups["run"]
    target_flag(run)
    run.add_argument("--ckpt_dir", metavar="DIR", help="the weights, in place of the recipe's")
    run.add_argument("--force", action="store_true", help="accept other weights or a small machine")
    run_flags(run, groups["parallel"])
    add_settings(Runtime, groups, fixed=False)
    part_flags(p.add_argument_group("single files", "In place of those that the recipe names."))


def target_flag(group: argparse._ActionsContainer) -> None:
    """Add the flag that names the video."""
    group.add_argument(
        "--save_file",
        type=file_path,
        metavar="FILE",
        help="the video to write: .mp4, .webm, .mkv, .gif, .apng, .png",
    )


def config_flag(group: argparse._ActionsContainer) -> None:
    """Add `--config`."""
    group.add_argument(
        "--config",
        type=file_path,
        metavar="FILE",
        help="a TOML file of flags, as in size = '832*480'; flags override it",
    )


def trust_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that say which of the files that a recipe names are read."""
    group.add_argument(
        "--lora_dir",
        type=file_path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="folders of LoRAs that a recipe or a saved run may read",
    )
    group.add_argument(
        "--trust_paths",
        action="store_true",
        help="read every file that a recipe or a saved run names",
    )


def run_flags(run: argparse._ActionsContainer, several: argparse._ActionsContainer) -> None:
    """Add the flags of every command that makes a video."""
    trust_flags(run)
    run.add_argument("--overwrite", action="store_true", help="replace an existing file")
    run.add_argument(
        "--contact_sheet", action="store_true", help="also write a PNG that shows the frames"
    )
    several.add_argument(
        "--gpus", metavar="0,1,...", help="one rank on each of these GPUs; cpu,cpu: two on the CPU"
    )
    several.add_argument(
        "--timeout",
        type=number(float, 0.1, 1e6),
        default=600.0,
        metavar="SECONDS",
        help="abort if a rank is late to a collective by SECONDS",
    )


def part_flags(group: argparse._ActionsContainer) -> None:
    """Add a flag for each part of a model."""
    for part, text in PARTS.items():
        group.add_argument(f"--{part}", type=file_path, metavar="FILE", help=text)


def _extension_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--use_prompt_extend", action="store_true", help="extend the prompt")
    group.add_argument(
        "--prompt_extend_method",
        choices=("dashscope", "local_qwen"),
        default="local_qwen",
        help="dashscope: any OpenAI-compatible server, DASH_API_URL",
    )
    group.add_argument("--prompt_extend_model", metavar="NAME", help="the server's model")
    group.add_argument(
        "--prompt_extend_target_lang", choices=("zh", "en"), default="zh", help="its language"
    )


def _compatible_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--t5_fsdp", action="store_true", help="no effect: rank 0 streams the text encoder"
    )
    group.add_argument(
        "--convert_model_dtype", action="store_true", help="no effect: weights are in bfloat16"
    )
    for flag in OTHER_TASKS:
        group.add_argument(f"--{flag}", nargs="?", const="", help=argparse.SUPPRESS)


# Several videos


def list_flags(p: Parser) -> None:
    """Add the flags that ask for several videos by one load of the model."""
    add = p.add_argument_group(
        "several videos", "One load of the model; the same command goes on after a stop."
    ).add_argument
    add(
        "--prompt_file",
        type=file_path,
        metavar="FILE",
        help="a prompt a line with options behind it (.txt), objects (.jsonl) or columns (.csv)",
    )
    add("--seeds", type=_seeds, metavar="1,2,3", help="a video for each seed; 1-4 is a range")
    add(
        "--num_videos",
        type=number(int, 1, VIDEOS),
        metavar="N",
        help="so many videos of each prompt, with seeds from --base_seed on, or drawn",
    )
    add(
        "--grid",
        type=_axis,
        nargs="+",
        action="extend",
        metavar="NAME=1,2",
        help="a video for each combination of settings, and a labelled sheet of them all",
    )
    add(
        "--out_dir",
        type=file_path,
        metavar="DIR",
        help="the folder of several videos and of their queue",
    )


def asks_for_several(args: argparse.Namespace) -> bool:
    """Return whether a command line asks for a list of videos."""
    return any(getattr(args, flag, None) is not None for flag in LIST)


def _seeds(text: str) -> list[int]:
    from wanflow.cli.prompts import seeds

    return seeds(text)


def _axis(text: str) -> tuple[str, list[Any]]:
    from wanflow.cli.prompts import axis

    return axis(text)


# What the flags say


def request_from(args: argparse.Namespace) -> Request:
    """Return the request of `generate_flags`; the prompt may be missing."""
    both = args.sample_guide_scale
    scales = {} if both is None else {"cfg_high": both, "cfg_low": both}
    request = Request(**{"prompt": "", **scales, **settings_from(Request, args)})
    return with_settings(request, args.preset) if args.preset else request


def model_of_task(args: argparse.Namespace) -> ModelSpec | None:
    """Return the model that `--task` names, if it is given.

    Raises:
        RequestError: for a task that wanflow does not run.
    """
    task = getattr(args, "task", None)
    if task is not None and task not in RUN:
        raise RequestError(f"--task {task} is another model; wanflow runs {', '.join(RUN)}")
    return None if task is None else RUN[task]


def refuse_other_task(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raise RequestError where `--task` names a model of other inputs than the weights are for."""
    asked, found = model_of_task(args), checkpoint.spec
    if asked is None or asked.conditioning == found.conditioning:
        return
    (fits,) = (spec for spec in FAMILY if spec.conditioning == found.conditioning)
    folder = printable(args.ckpt_dir or checkpoint.folder)
    raise RequestError(
        f"--task {asked.task} runs {asked.name}, and {folder} holds {found.name}, a model for"
        f" {fits.task}; name another --ckpt_dir, or --task {fits.task}"
    )


def runtime_from(args: argparse.Namespace) -> Runtime:
    """Return the runtime of `generate_flags`.

    Raises:
        RequestError: where flags contradict each other, or a value is out of range.
    """
    values = settings_from(Runtime, args)
    if getattr(args, "parallel", None):
        twice = [
            f"--{name}" for name in ("cfg_parallel", "ring_size", "ulysses_size") if name in values
        ]
        if twice:
            raise RequestError(f"--parallel sets the complete layout; leave out {', '.join(twice)}")
        if args.parallel["cfg"] > 2:
            raise RequestError(
                f"--parallel: cfg must be 1 or 2, a rank per guidance branch"
                f" (got {args.parallel['cfg']})"
            )
        values |= {
            "cfg_parallel": args.parallel["cfg"] == 2,
            "ring_size": args.parallel["ring"],
            "ulysses_size": args.parallel["ulysses"],
        }
    caches = {
        "text_cache": cache_folder(args.text_cache, "text"),
        "machine_cache": cache_folder(args.machine_cache, "machine"),
    }
    return Runtime(**{**values, **caches})


def cache_folder(named: str | None, what: str) -> str | None:
    """Return the folder that was named, that of the user's cache, or none."""
    if named is not None:
        return None if named == "none" else named
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    try:
        return str(user_path(base or "~/.cache") / "wanflow" / what)
    except RequestError:  # a user without a home
        return None


def given_parts(args: argparse.Namespace) -> dict[Part, Path]:
    """Return the files that were named for single parts."""
    files: dict[Part, Path | None] = {part: getattr(args, part) for part in PARTS}
    return {part: file for part, file in files.items() if file is not None}


def model_path(text: str) -> Path:
    """Return the folder or file of a path, of nano, or of a cached repository."""
    if text in EMBEDDED:
        return EMBEDDED[text]
    path = user_path(text)
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        from wanflow.download.fetch import cached

        return cached(text) or path
    return path


def take_environment(args: argparse.Namespace) -> None:
    """Set those flags of a command that are left open and that the environment gives.

    Raises:
        RequestError: for a port that is none.
    """
    for name, variable in ENVIRONMENT.items():
        if getattr(args, name, "") is None and os.environ.get(variable):
            value: Any = os.environ[variable]
            if name == "port":
                try:
                    value = number(int, 0, 65535)(value)
                except argparse.ArgumentTypeError as error:
                    raise RequestError(f"{variable} {error}") from None
            setattr(args, name, file_path(value) if name == "data_dir" else value)
