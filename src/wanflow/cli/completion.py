"""Run `wanflow completion`: print a script that completes commands, flags and values in a shell."""

from __future__ import annotations

import argparse
from typing import Any

from wanflow.cli.parser import Parser, file_path

SHELLS = ("bash", "zsh", "fish")
FOLDERS = (
    "ckpt_dir",
    "local_dir",
    "data",
    "out",
    "out_dir",
    "work_dir",
    "text_cache",
    "machine_cache",
)
# Texts that are files or folders, or other names.
PATHS = ("path", "source", "lora", "evaluate", "image", "last_image")


def completion_flags(p: Parser) -> None:
    """Add the command's arguments."""
    p.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def completion(args: argparse.Namespace) -> None:
    """Print the script of a shell."""
    import shtab

    from wanflow.cli import build_parser

    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            _complete_files(action, shtab)
    script = shtab.complete(parser, args.shell)
    args.output.document["script"] = script
    if not args.json:
        print(script, end="")


def _complete_files(action: Any, shtab: Any) -> None:
    """Let a flag for a path be completed with files or folders."""
    if action.dest in FOLDERS:
        action.complete = shtab.DIRECTORY
    elif action.type is file_path or action.dest in PATHS:
        action.complete = shtab.FILE
