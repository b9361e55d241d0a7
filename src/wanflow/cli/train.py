"""`wanflow train`: a LoRA or a whole model from a folder of clips, the miniature from nothing, and
the measurement of a model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.flags import Parser
from wanflow.config import RequestError
from wanflow.geometry import parse_size

if TYPE_CHECKING:
    from wanflow.checkpoint.checkpoint import Checkpoint
    from wanflow.presets import Expert
    from wanflow.train.finetune import FineTune


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command and its flags."""
    train = commands.add_parser(
        "train",
        help="fine-tune on your clips, train the miniature, or measure a model",
        allow_abbrev=False,
    )
    tune = train.add_argument_group(
        "fine-tuning", "a folder of clips with captions becomes LoRAs, or a new model"
    )
    tune.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="clips, and clip.txt beside each clip.mp4 (or metadata.jsonl, metadata.csv)",
    )
    tune.add_argument("--ckpt_dir", help="the model to start from: a folder, or nano")
    tune.add_argument(
        "--out",
        type=Path,
        help="the folder to write: two LoRA files, or the model (miniature: WORK_DIR/model)",
    )
    tune.add_argument("--method", choices=("lora", "full"), default="lora")
    tune.add_argument(
        "--train_experts",
        choices=("both", "high", "low"),
        default="both",
        help="each on its own part of sigma",
    )
    tune.add_argument("--rank", type=int, default=16)
    tune.add_argument("--alpha", type=float, help="(the rank)")
    tune.add_argument(
        "--targets",
        default="self_attn,cross_attn,ffn",
        help="which layers of every block get a LoRA",
    )
    tune.add_argument(
        "--steps",
        type=int,
        help="updates for each expert (300 for a miniature, 2000 for the full model)",
    )
    tune.add_argument("--batch", type=int, help="clips for each update (16 for a miniature, 1)")
    tune.add_argument(
        "--grad_accum", type=int, default=1, help="in how many parts a batch goes through the model"
    )
    tune.add_argument(
        "--learning_rate", type=float, help="(LoRA: 1e-3 for a miniature, 1e-4; full: a tenth)"
    )
    tune.add_argument(
        "--caption_dropout",
        type=float,
        default=0.1,
        help="share of captions left empty, for guidance",
    )
    tune.add_argument(
        "--train_shift", type=float, default=5.0, help="crowds the training noise levels upwards"
    )
    tune.add_argument("--size", help="WIDTH*HEIGHT that clips are brought to (the model's own)")
    tune.add_argument("--frame_num", type=int, help="frames of each clip, 4n+1 (the model's own)")
    tune.add_argument(
        "--fps", type=float, help="frames per second that clips are brought to (the model's own)"
    )
    tune.add_argument(
        "--activation_checkpointing",
        action="store_true",
        help="compute blocks twice instead of keeping what they computed",
    )
    tune.add_argument(
        "--fsdp", action="store_true", help="shard the model over the processes of torchrun"
    )
    tune.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    tune.add_argument("--device", default="auto")
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument(
        "--save_every",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how often the state is saved (60)",
    )
    tune.add_argument(
        "--force", action="store_true", help="start although the memory does not suffice"
    )
    train.add_argument(
        "--work_dir",
        type=Path,
        help="where training keeps its state (build/train, for the miniature build/nano)",
    )
    mini = train.add_argument_group("the miniature")
    mini.add_argument(
        "--nano",
        action="store_true",
        help="train nano from nothing; a killed run goes on where it stopped",
    )
    mini.add_argument(
        "--scale", type=float, default=1.0, help="share of the full number of steps, for a try-out"
    )
    mini.add_argument(
        "--stage",
        choices=("text", "vae", "cache", "high", "low", "export"),
        help="run one stage only",
    )
    ask = train.add_argument_group("measuring")
    ask.add_argument(
        "--evaluate",
        metavar="MODEL",
        help="measure prompt adherence of nano or a folder; last line is JSON",
    )
    ask.add_argument("--prompts", type=int, default=200, help="how many prompts to measure (200)")
    ask.add_argument(
        "--experts",
        choices=("both", "swapped", "high", "low"),
        default="both",
        help="which expert does whose steps",
    )
    ask.add_argument(
        "--seen", action="store_true", help="measure on combinations that training saw"
    )
    ask.add_argument(
        "--wording",
        action="store_true",
        help="measure with free wordings instead of the plain form",
    )


def train(args: argparse.Namespace) -> None:
    if args.data is not None:
        return _finetune(args)
    from wanflow.train import nano

    if args.evaluate:
        print(
            nano.evaluate(
                args.evaluate,
                args.prompts,
                args.experts,
                args.seen,
                args.wording,
                lambda line: print(line, file=sys.stderr),
            )
        )
    elif args.nano:
        work = args.work_dir or Path("build/nano")
        nano.train(
            work,
            args.out or work / "model",
            args.scale,
            args.stage,
            lambda line: print(line, flush=True),
        )
    else:
        raise RequestError(
            "train needs --data DIR (fine-tune on clips), --nano (train the miniature) or"
            " --evaluate MODEL (measure one)"
        )


def _finetune(args: argparse.Namespace) -> None:
    from wanflow.assemble import resolve
    from wanflow.parallel.ranks import rank_and_world_size
    from wanflow.plan import this_machine
    from wanflow.train.finetune import finetune
    from wanflow.train.memory import refuse

    if args.ckpt_dir is None or args.out is None:
        raise RequestError(
            "fine-tuning needs --ckpt_dir (the model to start from, or nano) and --out (the folder"
            " to write)"
        )
    checkpoint = resolve(args.ckpt_dir)
    settings = _settings(args, checkpoint)
    if not args.force:
        refuse(checkpoint, settings, this_machine(checkpoint.folder), rank_and_world_size()[1])
    speaks = rank_and_world_size()[0] == 0
    finetune(
        checkpoint,
        settings,
        lambda line: print(line, file=sys.stderr, flush=True) if speaks else None,
    )


def _settings(args: argparse.Namespace, checkpoint: Checkpoint) -> FineTune:
    """The flags, and where they are silent what suits the model."""
    import torch

    from wanflow.checkpoint.load import expert_bytes
    from wanflow.request import Request
    from wanflow.runtime import choose_device, dtype_of_name, is_small
    from wanflow.train.clips import Form
    from wanflow.train.finetune import FineTune

    preset = checkpoint.spec
    small = is_small(expert_bytes(checkpoint, torch.float32))
    size = parse_size(args.size) if args.size else preset.size
    asked = Request("any", size=size, frame_num=args.frame_num, fps=args.fps, seed=0).complete(
        preset
    )  # checks them
    rate = args.learning_rate or (1e-3 if small else 1e-4) / (1 if args.method == "lora" else 10)
    experts: dict[str, tuple[Expert, ...]] = {
        "both": ("high", "low"),
        "high": ("high",),
        "low": ("low",),
    }
    return FineTune(
        data=args.data,
        out=args.out,
        work=args.work_dir or Path("build/train"),
        form=Form(asked.size, asked.frame_num, asked.fps),
        method=args.method,
        experts=experts[args.train_experts],
        rank=args.rank,
        alpha=args.alpha or float(args.rank),
        targets=tuple(part.strip() for part in args.targets.split(",") if part.strip()),
        steps=args.steps or (300 if small else 2000),
        batch=args.batch or (16 if small else 1),
        accumulate=args.grad_accum,
        learning_rate=rate,
        dropout=args.caption_dropout,
        shift=args.train_shift,
        checkpointing=args.activation_checkpointing,
        dtype=dtype_of_name(args.dtype),
        device=str(choose_device(args.device)),
        fsdp=args.fsdp,
        seed=args.seed,
        save_seconds=args.save_every,
    )
