#!/usr/bin/env python3
"""What strangers hand to wanflow: inputs of every kind, made from a seed, in a process with limits.

A seed names one input for good. Whatever is done with it may succeed, or end in a refusal that a
terminal shows in one short line; nothing else, not a crash, more than `SECONDS`, or more than
`MEMORY` bytes above what the process held at its start. `helpers/fuzz.py` does the same for
damaged containers.

To attach a kind of input:

1. Write `def KIND(folder: Path) -> Attempt` in a module of `helpers`. It is called once in a
   process and makes what all seeds share (good files, a server) in `folder`, which is empty and
   the current folder.
2. Return `attempt(rng)`. It makes one input by the generator, hands it to wanflow the way a user or
   another program does, and returns. Whatever differs between two seeds comes from `rng`.
   A RequestError is judged as a refusal. A command is run by `command(...)`, which judges what
   it prints. Anything else that is not right: raise `Misbehaviour`.
3. Add a line to `STRANGERS`. `make test` tries `FEW` seeds of each kind, `make test-all` `MANY`,
   `make fuzz COUNT=20000` as many as named.

    python strangers.py KIND [FIRST [COUNT]]      # what comes of each seed
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import sys
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":  # a worker, which is started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.fuzz import LONGEST, Misbehaviour, Worker, answer, judge_text, worker
from wanflow.config import RequestError

Attempt = Callable[[Random], object]

SECONDS, MEMORY = 10.0, 700 << 20  # with 250 MB of torch and of ours: below 1 GB in all
FEW, MANY = 30, 300

# kind: the function that makes its attempts, as module:function
STRANGERS = {
    "recipe": "recipe_mutations:recipe",
    "saved run": "recipe_mutations:saved_run",
    "hub": "hub_mutations:hub",
    "chat": "hub_mutations:chat",
    "line": "line_mutations:line",
    "picture": "picture_mutations:picture",
}

# What a command may end with: done, failed (a disk, a server), refused, interrupted.
CODES = (0, 1, 2, 130)


def command(argv: Sequence[str]) -> tuple[int, str, str]:
    """Run `wanflow ...` in this process; return its exit code, standard output and error.

    An exception that no command should let through is raised as it is.
    """
    from wanflow.cli import main

    logging.getLogger().handlers.clear()  # they hold the standard error of the call before
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(argv))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    if code not in CODES:
        raise Misbehaviour(f"exit code {code}: {texts[1]:.600}")
    for line in "\n".join(texts).split("\n"):
        judge_text(line)
    if code == 2:
        judge_refusal(texts[1] or texts[0])  # `wanflow` alone shows its commands
    return code, texts[0], texts[1]


def judge_refusal(words: str) -> None:
    """A refusal is neither empty nor a page, and shows no traceback."""
    if not words.strip() or len(words) > LONGEST or "Traceback" in words:
        raise Misbehaviour(f"a refusal of {len(words):,} characters: {words!r:.600}")


def refused_because_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a failed allocation."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause).lower():
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def try_one(name: str, seed: int, attempt: Attempt) -> dict[str, Any]:
    """What comes of a seed; `fault` where it is what nobody should see."""
    result: dict[str, Any] = {"seed": seed, "refused": 0}
    try:
        try:
            done = attempt(Random(f"{name} {seed}"))
            result["refused"] = int(isinstance(done, tuple) and done[:1] == (2,))
        except RequestError as error:
            for line in str(error).split("\n"):
                judge_text(line)
            judge_refusal(str(error))
            if refused_because_of_memory(error):
                raise Misbehaviour(f"it asked for too much memory: {error!r:.300}") from error
            result |= {"refused": 1, "told": str(error)}
    except BaseException:  # a panic of a library in Rust is no Exception
        told = traceback.format_exc(limit=-6).encode("ascii", "backslashreplace").decode()
        result["fault"] = told if len(told) < 4000 else f"{told[:2000]} ... {told[-2000:]}"
    return result


def serve(root: Path) -> None:
    """Answer seeds, see `helpers.fuzz.answer`; a kind is made ready when it is first asked for."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print stays out of the answers
    faulthandler.enable()
    home = root / "home"
    home.mkdir()
    os.environ.update({"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")})
    ready: dict[str, Attempt] = {}

    def prepare(name: str) -> None:
        folder = root / name.replace(" ", "_")
        if name not in ready:
            folder.mkdir()
            os.chdir(folder)
            module, _, function = STRANGERS[name].partition(":")
            ready[name] = getattr(import_module(f"helpers.{module}"), function)(folder)
        os.chdir(folder)

    answer(answers, lambda name, seed: try_one(name, seed, ready[name]), MEMORY, prepare)


@contextlib.contextmanager
def process() -> Any:
    """The process in which inputs are tried."""
    with worker(Path(__file__)) as one:
        yield one


def faults_of(one: Worker, name: str, seeds: Sequence[int], enough: int = 3) -> tuple[int, list]:
    """Try seeds; return how many were refused, and the first faults."""
    refused, faults = 0, list[str]()
    for seed in seeds:
        result = one.try_one(name, seed, SECONDS)
        refused += result.get("refused", 0)
        if "fault" in result:
            faults.append(f"{name}, seed {seed}: {result['fault']}")
            if len(faults) == enough:
                break
    return refused, faults


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("kind", nargs="?", choices=[*STRANGERS, "all"], default="all")
    parser.add_argument("first", nargs="?", type=int, default=0)
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("--serve", type=Path)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    seeds = range(args.first, args.first + args.count)
    with process() as one:
        for name in STRANGERS if args.kind == "all" else [args.kind]:
            start, highest = time.perf_counter(), [0.0, 0]
            refused = found = 0
            for seed in seeds:
                result = one.try_one(name, seed, SECONDS)
                refused += result.get("refused", 0)
                highest = [
                    max(highest[0], result.get("seconds", 0)),
                    max(highest[1], result.get("peak", 0)),
                ]
                if args.count == 1:
                    print(result.get("fault") or result)
                if "fault" in result:
                    found += 1
                    print(f"--- {name} {seed}\n{result['fault']}", flush=True)
            print(
                f"{name}: {len(seeds):,} inputs, {refused:,} refused, {found} faults,"
                f" {time.perf_counter() - start:.0f} s, the longest {highest[0]:.1f} s, at most"
                f" {highest[1] / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
