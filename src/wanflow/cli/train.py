"""`wanflow train`: the miniature from nothing, and the measurement of what a model understands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wanflow.cli.flags import Parser
from wanflow.config import RequestError


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command and its flags."""
    train = commands.add_parser("train", help="train the miniature, or measure what it understands", allow_abbrev=False)
    train.add_argument("--nano", action="store_true", help="train nano from nothing; a killed run goes on where it stopped")
    train.add_argument("--evaluate", metavar="MODEL", help="measure prompt adherence of nano or a folder; last line is JSON")
    train.add_argument("--prompts", type=int, default=200, help="how many prompts to measure (200)")
    train.add_argument("--experts", choices=("both", "swapped", "high", "low"), default="both", help="which expert does whose steps")
    train.add_argument("--seen", action="store_true", help="measure on combinations that training saw")
    train.add_argument("--wording", action="store_true", help="measure with free wordings instead of the plain form")
    train.add_argument("--work_dir", type=Path, default=Path("build/nano"), help="where training keeps its state")
    train.add_argument("--scale", type=float, default=1.0, help="share of the full number of steps, for a try-out")
    train.add_argument("--stage", choices=("text", "vae", "cache", "high", "low", "export"), help="run one stage only")
    train.add_argument("--out", type=Path, help="where to write the model (default: WORK_DIR/model)")


def train(args: argparse.Namespace) -> None:
    from wanflow.train import nano

    if args.evaluate:
        print(nano.evaluate(args.evaluate, args.prompts, args.experts, args.seen, args.wording, lambda line: print(line, file=sys.stderr)))
    elif args.nano:
        nano.train(args.work_dir, args.out or args.work_dir / "model", args.scale, args.stage, lambda line: print(line, flush=True))
    else:
        raise RequestError("train needs --nano (train the miniature) or --evaluate MODEL (measure one)")
