"""What every command's flags are made of."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wanflow.config import SOLVERS, RequestError
from wanflow.presets import SETTINGS
from wanflow.runtime import QUANTIZATIONS

if TYPE_CHECKING:
    from wanflow.checkpoint.source import Part

# Flags of the official script that belong to its other tasks: accepted, and said to be unused.
OTHER_TASKS = (
    "image",
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
TASKS = ("t2v-A14B", "i2v-A14B", "ti2v-5B", "animate-14B", "s2v-14B")
STATE_SUFFIX = ".latent.safetensors"


class Parser(argparse.ArgumentParser):
    """What it refuses is a RequestError like any other: of several processes one says it."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} ({self.prog} --help lists what there is)")


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return found


def yes_or_no(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "y", "t"):
        return True
    if text.lower() in ("false", "no", "0", "n", "f"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parallel(text: str) -> dict[str, int]:
    """`auto` -> {}; `cfg2xulysses4` -> {"cfg": 2, "ring": 1, "ulysses": 4}."""
    if text == "auto":
        return {}
    found = [
        re.fullmatch(r"(cfg|ring|ulysses)([1-9]\d{0,3})", part) for part in text.lower().split("x")
    ]
    sizes = {part[1]: int(part[2]) for part in found if part}
    if len(sizes) != len(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither auto nor a layout such as cfg2xulysses4 (of cfg, ring and"
            " ulysses)"
        )
    return {"cfg": 1, "ring": 1, "ulysses": 1, **sizes}


def layout(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a Runtime that say how processes share the work, as far as flags set them.

    Raises:
        RequestError: where one thing is said twice.
    """
    single = {
        "cfg_parallel": args.cfg_parallel,
        "ring_size": args.ring_size,
        "ulysses_size": None if args.ulysses_size == 1 else args.ulysses_size,
    }
    if args.parallel:
        twice = [f"--{name}" for name, value in single.items() if value is not None]
        if twice:
            raise RequestError(f"--parallel says all of the layout; leave out {', '.join(twice)}")
        cfg = args.parallel["cfg"]
        if cfg > 2:
            raise RequestError(f"--parallel cfg{cfg}: guidance has two branches, so it is 1 or 2")
        single = {
            "cfg_parallel": cfg == 2,
            "ring_size": args.parallel["ring"],
            "ulysses_size": args.parallel["ulysses"],
        }
    return {**single, "dit_fsdp": args.dit_fsdp or None}


def text_cache(named: str | None) -> str | None:
    """The folder of encoded prompts: the one that is named, the user's cache, or none."""
    if named is not None:
        return None if named == "none" else named
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return str(Path(base or "~/.cache").expanduser() / "wanflow" / "text")


def given_parts(args: argparse.Namespace) -> dict[Part, Path]:
    """The parts that were named by hand."""
    files: dict[Part, Path | None] = {
        "high": args.high,
        "low": args.low,
        "t5": args.t5,
        "vae": args.vae,
        "tokenizer": args.tokenizer,
    }
    return {part: file for part, file in files.items() if file is not None}


def generate_flags(p: argparse.ArgumentParser) -> None:
    official = p.add_argument_group(
        "official flags", "names, defaults and meaning of the official generate.py"
    )
    official.add_argument("--task", choices=TASKS, default="t2v-A14B")
    official.add_argument("--size", help="WIDTH*HEIGHT, any multiples of 16 (1280*720)")
    official.add_argument("--frame_num", type=int, help="frames, 4n+1 (81)")
    official.add_argument("--ckpt_dir", help="folder of the weights, or nano")
    official.add_argument(
        "--offload_model",
        type=yes_or_no,
        help="keep only the expert at work in memory (settled by the plan)",
    )
    official.add_argument(
        "--ulysses_size",
        type=int,
        default=1,
        help="processes that share the attention heads; 1 leaves it to the plan",
    )
    official.add_argument(
        "--t5_fsdp",
        action="store_true",
        help="accepted: the text encoder passes through one process block by block anyway",
    )
    official.add_argument("--t5_cpu", action="store_true", help="run the text encoder on the CPU")
    official.add_argument(
        "--dit_fsdp", action="store_true", help="each process keeps a share of the experts' weights"
    )
    official.add_argument("--save_file", type=Path, help="where to write the video")
    official.add_argument("--prompt")
    official.add_argument("--use_prompt_extend", action="store_true")
    official.add_argument(
        "--prompt_extend_method", choices=("dashscope", "local_qwen"), default="local_qwen"
    )
    official.add_argument("--prompt_extend_model")
    official.add_argument("--prompt_extend_target_lang", choices=("zh", "en"), default="zh")
    official.add_argument("--base_seed", "--seed", type=int, default=-1, help="below 0: draw one")
    official.add_argument("--sample_solver", choices=SOLVERS, help="(unipc)")
    official.add_argument("--sample_steps", type=int, help="(40)")
    official.add_argument("--sample_shift", type=float, help="(12)")
    official.add_argument(
        "--sample_guide_scale",
        type=float,
        help="guidance of both experts; --cfg_high and --cfg_low set them apart",
    )
    official.add_argument(
        "--convert_model_dtype",
        action="store_true",
        help="accepted: weights are held in bfloat16 anyway",
    )
    for flag in OTHER_TASKS:
        official.add_argument(f"--{flag}", nargs="?", const="", help=argparse.SUPPRESS)
    part_flags(p)
    ours = p.add_argument_group("wanflow's own")
    ours.add_argument(
        "--lora",
        action="extend",
        nargs="+",
        metavar="FILE[@STRENGTH]",
        help=(
            "LoRA files (or a folder with a pair): FILE, FILE@0.8, FILE@high=1,low=0.6,"
            " FILE@1,steps=3-8"
        ),
    )
    ours.add_argument(
        "--lora_mode",
        choices=("live", "fused"),
        help="beside the weights, or added to them while they are read (live)",
    )
    ours.add_argument(
        "--preset",
        choices=SETTINGS,
        help="settings for distilled LoRAs; what you set yourself stays",
    )
    ours.add_argument(
        "--cfg_start",
        type=float,
        help="guidance of the first --cfg_start_steps steps, before cfg_high and cfg_low hold",
    )
    ours.add_argument("--cfg_start_steps", type=int, help="(0)")
    ours.add_argument(
        "--negative_prompt", help='what to steer away from (default: the model\'s own; "" for none)'
    )
    ours.add_argument("--cfg_high", type=float, help="guidance of the high-noise expert (4)")
    ours.add_argument("--cfg_low", type=float, help="guidance of the low-noise expert (3)")
    ours.add_argument(
        "--boundary",
        type=float,
        help="share of the 1000 timesteps from which the high-noise expert works (0.875)",
    )
    ours.add_argument("--fps", type=float, help="frames per second of the file (16)")
    ours.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    ours.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32")
    ours.add_argument(
        "--noise_device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda draws the noise as the official code does",
    )
    ours.add_argument(
        "--cfg_batch",
        type=yes_or_no,
        help="both guidance branches in one batch (true for small videos)",
    )
    ours.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help=f"continue a run saved as FILE (*{STATE_SUFFIX})",
    )
    ours.add_argument(
        "--force", action="store_true", help="start although the machine is too small"
    )
    _memory_flags(p)
    _parallel_flags(p)
    run_flags(p, save_file=False)


def _memory_flags(p: argparse.ArgumentParser) -> None:
    memory = p.add_argument_group(
        "memory and precision",
        "what is left out, the plan settles for the machine at hand (`wanflow plan` shows it)",
    )
    memory.add_argument(
        "--resident_blocks",
        type=int,
        metavar="N",
        help="blocks of an expert that stay on the device; the others are streamed",
    )
    memory.add_argument("--stream_from", choices=("ram", "disk"), help="where streamed blocks wait")
    memory.add_argument(
        "--prefetch",
        type=yes_or_no,
        help="read the next expert into RAM while the current one works",
    )
    memory.add_argument(
        "--chunk_tokens", type=int, metavar="N", help="tokens at a time outside attention; 0: all"
    )
    memory.add_argument(
        "--vae_tile",
        type=int,
        metavar="PIXELS",
        help="decode in tiles of this side; 0: whole frames",
    )
    memory.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="round weights while they are read (default: keep them as they are)",
    )
    memory.add_argument(
        "--quantize_layers",
        choices=("ffn", "all"),
        default="ffn",
        help="of the feed-forward only, or of attention too (ffn)",
    )
    memory.add_argument(
        "--attention",
        default="auto",
        metavar="KERNEL",
        help="auto, or a name that `wanflow doctor` lists",
    )
    memory.add_argument(
        "--text_cache",
        metavar="DIR",
        help="where encoded prompts are kept (the user's cache); none: nowhere",
    )


def _parallel_flags(p: argparse.ArgumentParser) -> None:
    several = p.add_argument_group(
        "several processes", "under torchrun; what is left out, the plan settles"
    )
    several.add_argument(
        "--cfg_parallel",
        type=yes_or_no,
        help="one half of the processes for each branch of guidance",
    )
    several.add_argument(
        "--ring_size", type=int, metavar="N", help="processes among which keys and values go round"
    )
    several.add_argument(
        "--parallel",
        type=parallel,
        default=None,
        metavar="LAYOUT",
        help="auto, or all at once, as in cfg2xring2xulysses4",
    )


def part_flags(p: argparse.ArgumentParser) -> None:
    parts = p.add_argument_group(
        "single files", "of any format, in place of what --ckpt_dir holds, or instead of it"
    )
    parts.add_argument("--high", type=Path, metavar="FILE", help="the high-noise expert")
    parts.add_argument("--low", type=Path, metavar="FILE", help="the low-noise expert")
    parts.add_argument("--t5", type=Path, metavar="FILE", help="the text encoder")
    parts.add_argument("--vae", type=Path, metavar="FILE", help="the VAE")
    parts.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json, spiece.model, or a T5 file that embeds it",
    )


def run_flags(p: argparse.ArgumentParser, save_file: bool = True) -> None:
    if save_file:
        p.add_argument("--save_file", type=Path, help="where to write the video")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    p.add_argument(
        "--contact_sheet",
        action="store_true",
        help="also write a PNG of the frames beside the video",
    )
    p.add_argument(
        "--gpus",
        metavar="0,1,...",
        help="one process on each of these GPUs; cpu,cpu: two processes on the CPU",
    )
    p.add_argument(
        "--timeout",
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="the run ends when one process keeps others waiting so long (600)",
    )
