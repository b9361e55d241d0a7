"""Run `wanflow generate` for several videos: one load of the model, video by video."""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from wanflow import out_of_memory
from wanflow.cli.flags import given_parts, refuse_other_task, runtime_from
from wanflow.cli.generate import (
    from_rank0,
    join,
    open_weights,
    refuse_no_weights,
    refuse_unsupported,
    settled,
)
from wanflow.cli.keeping import again
from wanflow.cli.running import run_and_save, world_size
from wanflow.cli.videos import Queue, Turn
from wanflow.config import RequestError
from wanflow.outputs import Claims
from wanflow.runtime import Runtime
from wanflow.sanity import LatentError, OutputError

if TYPE_CHECKING:
    from wanflow.api import Pipeline
    from wanflow.parallel.ranks import DistInfo
    from wanflow.screen import Screen


def generate(args: argparse.Namespace) -> None:
    """Make the videos that a command line asks for and that its folder lacks.

    Raises:
        RequestError: for anything that is refused before a weight is read.
        OutputError: at the end, where a video failed.
    """
    runtime = runtime_from(args)
    refuse_unsupported(args, runtime)
    refuse_no_weights(args)
    from wanflow.assemble import assemble

    info = join(args) if world_size() > 1 else None
    screen = args.output.screen(info is not None and info.rank > 0)
    queue = None if info is not None and info.rank > 0 else Queue(args)
    checkpoint = open_weights(args.ckpt_dir, given_parts(args))
    refuse_other_task(args, checkpoint)
    if info is not None:
        runtime = replace(runtime, device=str(info.device))

    def decide() -> Runtime | None:
        assert queue is not None
        queue.take(checkpoint, screen)
        largest = queue.largest()
        if largest is None:
            return None
        return settled(args, runtime, largest, checkpoint, screen, info)

    complete = from_rank0(info, decide)
    if complete is not None:
        pipe = assemble(checkpoint, complete, screen.loading, info)
        _make_all(args, pipe, queue, screen, info)
    if queue is not None:
        queue.conclude(screen)


def _make_all(
    args: argparse.Namespace,
    pipe: Pipeline,
    queue: Queue | None,
    screen: Screen,
    info: DistInfo | None,
) -> None:
    """Make what is left, video by video; every rank gets each from rank 0."""
    while True:
        # A failure is answered by words: a traceback would keep tensors alive.
        words, turn = None, None
        try:
            turn = from_rank0(info, queue.next_turn if queue is not None else lambda: None)
        except RequestError as error:  # on every rank
            words = str(error)
        if words is None and turn is None:
            return
        if turn is not None:
            words = _make(args, pipe, turn, queue, screen, info)
        if words is not None:
            gc.collect()
            if queue is not None:
                queue.fail(words)
                args.output.alert(f"{queue.turn.name} failed: {words}")


def _make(
    args: argparse.Namespace,
    pipe: Pipeline,
    turn: Turn,
    queue: Queue | None,
    screen: Screen,
    info: DistInfo | None,
) -> str | None:
    """Make a video; return why it failed, where the next one can be made all the same."""
    entry = queue.entry if queue is not None else {}
    output = replace(args.output, document=entry, path=None, began=time.monotonic())
    args.watchdog.on_abort = None
    try:
        with Claims() as claims:
            one = argparse.Namespace(**{**vars(args), "claims": claims, "output": output})
            if turn.texts:
                pipe.parts.remember(turn.texts)
            run = turn.run or pipe.begin(turn.request)
            screen.forget()
            if queue is not None:
                many = queue.many
                many.begin(turn.number, run.state.index / run.request.sample_steps)
                screen.among = many.text
                screen.say(f"{many.text(many.share)}: {turn.name}")
            run_and_save(pipe, run, turn.target, one, screen, lambda run, file: again(args))
    except Exception as error:
        words = _fault(error)
        if words is None or args.watchdog.ending:
            raise
        if info is not None and not isinstance(error, LatentError):
            if queue is not None:  # the others wait in a collective: all end
                queue.fail(words)
            raise
        args.watchdog.save()  # the next try goes on there
        screen.close()
        return words
    finally:
        args.watchdog.on_abort = args.watchdog.on_abort or args.claims.close
    args.watchdog.on_abort = args.claims.close
    if queue is not None:
        queue.complete()
    return None


def _fault(error: Exception) -> str | None:
    """Return what is wrong with a video by its own fault; None: the next would fail, too."""
    if isinstance(error, RequestError | OutputError):
        return str(error)
    return out_of_memory.words(error) if out_of_memory.is_out_of_memory(error) else None
