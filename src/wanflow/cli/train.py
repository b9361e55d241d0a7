"""Run `wanflow train`: fine-tune on clips, train nano, or measure a model."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wanflow.cli.flags import config_flag
from wanflow.cli.keeping import launcher
from wanflow.cli.parser import Parser, file_path
from wanflow.config import RequestError
from wanflow.geometry import parse_size

if TYPE_CHECKING:
    from wanflow.checkpoint.checkpoint import Checkpoint
    from wanflow.presets import Expert, ModelSpec
    from wanflow.train.stopping import Stop
    from wanflow.train.tuning import FineTune

MOST_PROMPTS = 1_000_000
T = TypeVar("T")


def train_flags(p: Parser) -> None:
    """Add the command's flags."""
    main = p.add_argument_group("most used", "Clips with captions become LoRAs, or a new model.")
    main.add_argument(
        "--data",
        type=file_path,
        metavar="DIR",
        help="clips, and clip.txt next to each clip.mp4 (or metadata.jsonl, metadata.csv)",
    )
    main.add_argument("--ckpt_dir", metavar="DIR", help="the model to start from, or nano")
    main.add_argument(
        "--out", type=file_path, metavar="DIR", help="folder to write: LoRA files, or the model"
    )
    main.add_argument("--method", choices=("lora", "full"), default="lora", help="what is trained")
    main.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="updates of each expert (default: 300 for a small model, else 2000)",
    )
    _tuning_flags(p.add_argument_group("fine-tuning"))
    _running_flags(p.add_argument_group("run"))
    _nano_flags(p)


def _tuning_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--train_experts",
        choices=("both", "high", "low"),
        default="both",
        help="each on its own range of sigma; a model with one network takes no choice",
    )
    add("--rank", type=int, default=16, metavar="N", help="of the LoRA")
    add("--alpha", type=float, metavar="A", help="of the LoRA (default: the rank)")
    add(
        "--targets",
        default="self_attn,cross_attn,ffn",
        metavar="LIST",
        help="layers of every block that get a LoRA",
    )
    add(
        "--batch",
        type=int,
        metavar="N",
        help="clips for each update (default: 16 for a small model, else 1)",
    )
    add("--grad_accum", type=int, default=1, metavar="N", help="micro-batches of a batch")
    add(
        "--learning_rate",
        type=float,
        metavar="RATE",
        help="default: 1e-3 for a small model, else 1e-4; a tenth for full",
    )
    add(
        "--caption_dropout",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of captions left empty, for guidance",
    )
    add(
        "--train_shift",
        type=float,
        default=5.0,
        metavar="SHIFT",
        help="shift of the noise levels; larger trains more on high noise",
    )
    add("--size", metavar="WIDTH*HEIGHT", help="resize clips to this (default: the model's)")
    add("--frame_num", type=int, metavar="N", help="frames of a clip, 4n+1 (default: the model's)")
    add("--fps", type=float, metavar="N", help="resample clips to this (default: the model's)")


def _running_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--activation_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass, to save memory",
    )
    add("--fsdp", action="store_true", help="shard the model over the ranks of torchrun")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=int, default=0, metavar="N", help="of noise, order and LoRA weights")
    add(
        "--save_every",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="seconds between two saved states",
    )
    config_flag(group)
    add("--overwrite", action="store_true", help="replace what --out holds of these files")
    add("--force", action="store_true", help="start although memory does not suffice")
    add(
        "--work_dir",
        type=file_path,
        metavar="DIR",
        help="folder of encoded clips and states (default: OUT_training; build/nano for --nano,"
        " build/nano-i2v with --i2v)",
    )


def _nano_flags(p: Parser) -> None:
    mini = p.add_argument_group("nano")
    mini.add_argument(
        "--nano", action="store_true", help="train nano from scratch; run it again to resume"
    )
    mini.add_argument(
        "--i2v", action="store_true", help="with --nano: train nano-i2v from nano's experts"
    )
    mini.add_argument(
        "--scale", type=float, default=1.0, metavar="SHARE", help="share of the steps, for a test"
    )
    mini.add_argument(
        "--stage",
        choices=("text", "vae", "cache", "high", "low", "export"),
        help="run one stage only",
    )
    ask = p.add_argument_group("evaluation")
    ask.add_argument(
        "--evaluate", metavar="MODEL", help="measure prompt adherence; the last line is JSON"
    )
    ask.add_argument("--prompts", type=int, default=200, metavar="N", help="prompts to measure")
    ask.add_argument(
        "--experts",
        choices=("both", "swapped", "high", "low"),
        default="both",
        help="the expert of each step",
    )
    ask.add_argument("--seen", action="store_true", help="use combinations from training")
    ask.add_argument("--wording", action="store_true", help="use free wordings of the prompts")
    ask.add_argument(
        "--ends",
        choices=("first", "last", "both"),
        default="first",
        help="the pictures that a model of pictures is given",
    )
    ask.add_argument(
        "--hide_motion",
        action="store_true",
        help="give first pictures that say nothing of the motion",
    )


def train(args: argparse.Namespace) -> None:
    """Train or measure, whichever the flags ask for."""
    from wanflow.train.stopping import stopping

    if args.evaluate and args.data is None:
        return _evaluate(args)
    with stopping() as stop:
        try:
            (_train_nano if args.data is None else _finetune)(args, stop)
        except KeyboardInterrupt:
            if args.output.rank == 0:
                command = shlex.join([*launcher(args), *args.argv])
                args.output.document["resume"] = command
                args.output.alert(f"go on with: {command}")
            raise


def _evaluate(args: argparse.Namespace) -> None:
    from wanflow.train import nano

    if not 1 <= args.prompts <= MOST_PROMPTS:
        raise RequestError(f"--prompts must be from 1 to {MOST_PROMPTS:,} (got {args.prompts})")
    with args.output.screen() as screen:
        how = args.prompts, args.experts, args.seen, args.wording
        report = nano.evaluate(args.evaluate, *how, screen, args.ends, args.hide_motion)
        args.output.page([("", report)], **json.loads(report))


def _train_nano(args: argparse.Namespace, stop: Stop) -> None:
    from wanflow.train import i2v, nano

    if not 0 < args.scale <= 100:
        raise RequestError(f"--scale must be above 0 and at most 100 (got {args.scale:g})")
    work = args.work_dir or Path("build/nano-i2v" if args.i2v else "build/nano")
    out = args.out or work / "model"
    # The model in the work folder is the training's own.
    overwrite = args.overwrite or args.out is None
    with args.output.screen() as screen:
        train = i2v.train if args.i2v else nano.train
        train(work, out, args.scale, args.stage, screen, overwrite, stop)
        if args.stage in (None, "export"):
            args.output.result(out, screen)


def _finetune(args: argparse.Namespace, stop: Stop) -> None:
    from wanflow import out_of_memory
    from wanflow.opening import resolve
    from wanflow.parallel.ranks import rank_and_world_size
    from wanflow.plan.start import placed
    from wanflow.runtime import Runtime
    from wanflow.train.finetune import check_outputs, finetune
    from wanflow.train.memory import less, refuse

    if args.ckpt_dir is None or args.out is None:
        raise RequestError(
            "fine-tuning needs --ckpt_dir (the model to start from, or nano) and --out (the folder"
            " to write)"
        )
    checkpoint = resolve(args.ckpt_dir)
    settings = _settings(args, checkpoint)
    check_outputs(checkpoint, settings)
    if not args.force:
        count = rank_and_world_size()[1]
        cards = range(count) if count > 1 else ()
        _, machine = placed(Runtime(device=settings.device), checkpoint.folder, cards)
        refuse(checkpoint, settings, machine, count)
    follower = rank_and_world_size()[0] > 0
    with args.output.screen(follower) as screen:
        try:
            finetune(checkpoint, settings, screen, stop)
        except Exception as error:
            if out_of_memory.is_out_of_memory(error):
                ways = less(settings) if settings.fsdp else [*less(settings), "--fsdp"]
                error.add_note(f"in training: {out_of_memory.listed(ways)}")
            raise
        if not follower:
            args.output.result(args.out, screen, method=args.method, steps=settings.steps)


def _settings(args: argparse.Namespace, checkpoint: Checkpoint) -> FineTune:
    """Return the settings: the flags, and defaults for the size of the model."""
    import torch

    from wanflow.checkpoint.load import expert_bytes
    from wanflow.choices import choose_device, dtype_of_name, is_small
    from wanflow.parallel.ranks import rank_and_world_size
    from wanflow.request import Request
    from wanflow.train.clips import Form
    from wanflow.train.tuning import FineTune

    preset = checkpoint.spec
    small = is_small(expert_bytes(checkpoint, torch.float32))
    size = parse_size(args.size) if args.size else preset.size
    asked = Request("any", size=size, frame_num=args.frame_num, fps=args.fps, seed=0).complete(
        preset
    )  # checks them
    rate = (1e-3 if small else 1e-4) / (1 if args.method == "lora" else 10)
    return FineTune(
        data=args.data,
        out=args.out,
        work=args.work_dir or _work_dir(args.out),
        form=Form(asked.size, asked.frame_num, asked.fps),
        method=args.method,
        experts=_experts(preset, args.train_experts),
        rank=args.rank,
        alpha=_given(args.alpha, float(args.rank)),
        targets=tuple(part.strip() for part in args.targets.split(",") if part.strip()),
        steps=_given(args.steps, 300 if small else 2000),
        batch=_given(args.batch, 16 if small else 1),
        accumulate=args.grad_accum,
        learning_rate=_given(args.learning_rate, rate),
        dropout=args.caption_dropout,
        shift=args.train_shift,
        checkpointing=args.activation_checkpointing,
        dtype=dtype_of_name(args.dtype),
        device=str(choose_device(args.device, alone=rank_and_world_size()[1] == 1)),
        fsdp=args.fsdp,
        seed=args.seed,
        save_seconds=args.save_every,
        overwrite=args.overwrite,
    )


def _experts(spec: ModelSpec, asked: str) -> tuple[Expert, ...]:
    """Return the experts to train: all of the model's, or the one that is asked for."""
    if asked == "both":
        return spec.expert_names
    if asked not in spec.expert_names:
        raise RequestError(
            f"--train_experts {asked}: {spec.name} has one network in place of two experts; leave"
            " the flag out"
        )
    return (asked,)


def _work_dir(out: Path) -> Path:
    """Return a folder next to the output; within it where that is `.`, `..` or `/`."""
    named = out.name not in ("", "..")
    return out.with_name(f"{out.name}_training") if named else out / "training"


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
