"""`wanflow generate`, `replay` and `decode`: a video is made, made again, or finished."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import signal
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.flags import (
    OTHER_TASKS,
    STATE_SUFFIX,
    Parser,
    generate_flags,
    given_parts,
    layout,
    part_flags,
    run_flags,
    text_cache,
)
from wanflow.config import RequestError
from wanflow.request import CompleteRequest, Request, with_settings
from wanflow.runtime import Runtime

if TYPE_CHECKING:
    from wanflow.checkpoint.checkpoint import Checkpoint
    from wanflow.checkpoint.source import Part
    from wanflow.parallel.ranks import DistInfo
    from wanflow.pipeline import Pipeline, Progress, Run
    from wanflow.plan import Plan
    from wanflow.recipe import ModelRecord, Recipe
    from wanflow.screen import Screen

logger = logging.getLogger("wanflow")

# What a resumed run has settled already.
SETTLED = (
    "prompt",
    "negative_prompt",
    "size",
    "frame_num",
    "sample_solver",
    "sample_steps",
    "sample_shift",
    "sample_guide_scale",
    "cfg_high",
    "cfg_low",
    "boundary",
    "fps",
    "cfg_batch",
    "lora",
    "lora_mode",
    "preset",
    "cfg_start",
    "cfg_start_steps",
)
SAVE_SECONDS = 5.0  # at most so much work is lost to a crash, beside the step under way


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """The three commands and their flags."""
    generate_flags(
        commands.add_parser("generate", help="a prompt becomes a video", allow_abbrev=False)
    )
    again = commands.add_parser(
        "replay", help="make a video again from the recipe inside it", allow_abbrev=False
    )
    again.add_argument("video", type=Path)
    finish = commands.add_parser(
        "decode",
        help="finish a run whose denoising is done, from its saved latent",
        allow_abbrev=False,
    )
    finish.add_argument("latent", type=Path)
    for command in (again, finish):
        command.add_argument(
            "--ckpt_dir", help="the weights, where they are not where the recipe says"
        )
        part_flags(command)
        command.add_argument(
            "--force", action="store_true", help="go on although weights or machine differ"
        )
        run_flags(command)


# --- generate, replay, decode
# ---------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> None:
    from wanflow.assemble import assemble
    from wanflow.parallel.ranks import broadcast_from_rank0

    _refuse_at_once(args)
    if args.resume:
        return _resume(args)
    if args.ckpt_dir is None and not given_parts(args):
        raise RequestError(
            "--ckpt_dir is missing: the folder of the weights, or nano for the miniature that ships"
            " with wanflow"
        )
    if not args.prompt:
        raise RequestError("--prompt is missing: say what the video should show")
    request, runtime = _request(args), _runtime(args)
    ranks, screen = _join(args, args.device)
    if args.save_file is not None and ranks.rank == 0:
        _check_target(args.save_file, args.overwrite)
    checkpoint = _open(args.ckpt_dir, given_parts(args))
    request, runtime = broadcast_from_rank0(
        ranks, lambda: _decide(args, request, _here(runtime, ranks), checkpoint, screen, ranks.size)
    )
    pipe = assemble(checkpoint, runtime, screen.loading, ranks)
    run = pipe.begin(request)
    _make(pipe, run, args.save_file or _default_target(args.task, run), args, screen)


def _decide(
    args: argparse.Namespace,
    request: Request,
    runtime: Runtime,
    checkpoint: Checkpoint,
    screen: Screen,
    processes: int,
) -> tuple[Request, Runtime]:
    """What to make and how, with nothing left open in how. One of several processes decides for
    all.
    """
    from wanflow.lora.stack import find_loras
    from wanflow.plan import advice

    find_loras(request.loras())  # and a LoRA that is missing
    request.complete(
        checkpoint.spec
    )  # refuse a bad request before a server is asked to extend its prompt
    request = _extended(args, request)
    for note in (*checkpoint.notes, *advice(request.complete(checkpoint.spec), checkpoint)):
        logger.warning(note)
    if args.preset and not request.lora:
        logger.warning(
            "--preset %s is for weights with a distilled LoRA, and no --lora is given: so few steps"
            " blur without one",
            args.preset,
        )
    plan = _plan(checkpoint, runtime, request, args.force, processes)
    for reason in plan.reasons if plan.need or processes > 1 else ():
        screen.say(f"plan: {reason}")
    return request, plan.runtime


def _plan(
    checkpoint: Checkpoint,
    runtime: Runtime,
    request: Request | CompleteRequest,
    force: bool,
    processes: int,
) -> Plan:
    from wanflow.parallel.ranks import per_machine
    from wanflow.plan import make_plan, plan_or_raise

    return (make_plan if force else plan_or_raise)(
        checkpoint, runtime, request, processes, per_machine()
    )


def _join(args: argparse.Namespace, device: str) -> tuple[DistInfo, Screen]:
    """Join the processes that torchrun or `--gpus` started; alone where there are none. The first
    one shows what goes on.
    """
    from wanflow.parallel import ranks as mesh
    from wanflow.parallel.watchdog import LATER
    from wanflow.runtime import choose_device
    from wanflow.screen import Screen

    alone = mesh.rank_and_world_size()[1] == 1
    ranks = mesh.join_group(choose_device("cpu" if alone else device), args.timeout + LATER)
    if ranks.rank > 0:
        logger.setLevel(logging.ERROR)
    return ranks, Screen(quiet=ranks.rank > 0)


def _here(runtime: Runtime, ranks: DistInfo) -> Runtime:
    """The same for this process: of several, each has a device of its own."""
    return replace(runtime, device=str(ranks.device)) if ranks.size > 1 else runtime


def _resume(args: argparse.Namespace) -> None:
    from wanflow.parallel.ranks import broadcast_from_rank0
    from wanflow.pipeline import Run

    settled = [f"--{flag}" for flag in SETTLED if getattr(args, flag) is not None]
    if settled:
        raise RequestError(
            f"--resume continues a saved run, in which {', '.join(settled)} is settled; leave"
            " it out"
        )
    ranks, screen = _join(args, args.device)
    run = broadcast_from_rank0(ranks, lambda: Run.load(args.resume))
    target = args.save_file or _beside(args.resume)
    if ranks.rank == 0:
        _check_target(target, args.overwrite)
    pipe = _reopen(run.recipe, args, screen, ranks, _runtime(args))
    _make(pipe, run, target, args, screen)


def replay(args: argparse.Namespace) -> None:
    from wanflow.media import read_recipe
    from wanflow.parallel.ranks import broadcast_from_rank0
    from wanflow.recipe import Recipe

    ranks, screen = _join(args, "auto")
    recipe = broadcast_from_rank0(
        ranks, lambda: Recipe.from_json(read_recipe(args.video), args.video)
    )
    target = args.save_file or args.video.with_name(f"{args.video.stem}_replay{args.video.suffix}")
    if ranks.rank == 0:
        _check_target(target, args.overwrite)
    pipe = _reopen(recipe, args, screen, ranks)
    run = pipe.begin(Request(**asdict(recipe.request)))
    odd = [
        path
        for path, print_ in recipe.loras.items()
        if run.recipe.loras.get(path, print_) != print_
    ]
    if odd and not args.force:
        raise RequestError(
            f"the recipe was made with another LoRA than {odd[0]} is now; put that one back, or"
            " take this with --force"
        )
    _make(pipe, run, target, args, screen)


def decode(args: argparse.Namespace) -> None:
    from wanflow.parallel.ranks import broadcast_from_rank0
    from wanflow.pipeline import Run

    ranks, screen = _join(args, "auto")
    run = broadcast_from_rank0(ranks, lambda: Run.load(args.latent))
    if not run.finished:
        raise RequestError(
            f"{args.latent} stands at step {run.state.index} of {run.request.sample_steps}; finish"
            " it with: wanflow generate --resume"
        )
    target = args.save_file or _beside(args.latent)
    if ranks.rank == 0:
        _check_target(target, args.overwrite)
    _make(_reopen(run.recipe, args, screen, ranks, finished=True), run, target, args, screen)


def _beside(state_file: Path) -> Path:
    """The video that a saved run belongs to."""
    return state_file.with_name(state_file.name.removesuffix(STATE_SUFFIX) + ".mp4")


def _reopen(
    recipe: Recipe,
    args: argparse.Namespace,
    screen: Screen,
    ranks: DistInfo,
    asked: Runtime | None = None,
    finished: bool = False,
) -> Pipeline:
    """The pipeline that made a recipe, on this machine: same weights, dtype and choices, and its
    device where there is one.

    On how many processes it was made does not matter; how these ones share the work is `asked`'s
    matter, and the plan's.
    """
    from wanflow.assemble import assemble
    from wanflow.parallel.ranks import broadcast_from_rank0

    asked = asked or Runtime()
    made = recipe.settings()
    runtime = replace(
        made,
        device=made.device if asked.device == "auto" else asked.device,
        vae_tile=None if ranks.size > 1 else made.vae_tile,  # several decode in strips
        text_cache=text_cache(None),
        cfg_parallel=asked.cfg_parallel,
        ring_size=asked.ring_size,
        ulysses_size=asked.ulysses_size,
        dit_fsdp=asked.dit_fsdp,
    )
    model = args.ckpt_dir or _model_of(recipe.model)
    given = given_parts(args)
    if not given and not args.ckpt_dir:
        given = {part: Path(path) for part, path in recipe.model.parts.items()}
    runtime = _possible_here(_here(runtime, ranks), checkpoint := _open(model, given))
    # A latent that is finished can be decoded where a denoising step would not run.
    runtime = broadcast_from_rank0(
        ranks,
        lambda: (
            _plan(checkpoint, runtime, recipe.request, args.force or finished, ranks.size).runtime
        ),
    )
    pipe = assemble(checkpoint, runtime, screen.loading, ranks)
    _same_weights(recipe, pipe.parts.recipe(recipe.request, ()), args.force)
    return pipe


def _possible_here(runtime: Runtime, checkpoint: Checkpoint) -> Runtime:
    """A recipe's choices, but for those that this machine cannot follow: the result may then differ
    by rounding, which is said.
    """
    import torch

    from wanflow.checkpoint.load import expert_bytes
    from wanflow.runtime import choose_device, choose_dtype
    from wanflow.transforms.attention import choose_kernel

    try:
        choose_device(runtime.device)
    except RequestError as error:
        logger.warning("%s; going on with another device, the result may differ by rounding", error)
        runtime = replace(runtime, device="auto", attention="auto")
    device, shape = choose_device(runtime.device), checkpoint.spec.dit
    try:
        choose_kernel(
            runtime.attention,
            device,
            choose_dtype(
                runtime.dtype, device.type == "cpu", expert_bytes(checkpoint, torch.float32)
            ),
            shape.dim // shape.num_heads,
        )
    except RequestError as error:
        logger.warning("%s; going on with another kernel, the result may differ by rounding", error)
        runtime = replace(runtime, attention="auto")
    return runtime


def _make(pipe: Pipeline, run: Run, target: Path, args: argparse.Namespace, screen: Screen) -> None:
    """Denoise, decode and write, keeping the run's state on disk until the video is safely there;
    the first of several writes.
    """
    from wanflow.pipeline import save_frames
    from wanflow.sanity import OutputError

    args.watch.progress = lambda: sum(pipe.team.traffic.calls.values())
    if pipe.team.ranks.rank > 0:
        pipe.take_loras(run)
        run = pipe.resume(run)
        for _ in pipe.frames(run):
            pass
        return
    if run.request.frame_num == 1 and args.save_file is None:
        target = target.with_suffix(".png")
    _check_target(target, args.overwrite)
    state_file = target.with_name(target.stem + STATE_SUFFIX)
    pipe.take_loras(run)
    screen.begin(run, pipe.parts.preset, target)
    keeper = StateKeeper(run, state_file)

    def keep() -> None:
        """Write down where the run stands, whatever ends it."""
        if keeper.run.state.index == 0:
            return
        keeper.run.save(state_file)
        where = f"step {keeper.run.state.index} of {run.request.sample_steps}"
        names = f"--resume {shlex.quote(str(state_file))} --save_file {shlex.quote(str(target))}"
        screen.say(f"stopped at {where}; go on with: wanflow generate {names}")

    args.watch.last_will = keep
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with screen.denoising(run) as on_step:
            run = pipe.resume(run, lambda told: keeper(told) and on_step(told))
        run.save(state_file)
        save_frames(
            target,
            pipe.frames(run, screen.decoding()),
            run.request.fps,
            run.recipe.to_json(),
            args.overwrite,
        )
    except (OSError, OutputError):
        args.watch.last_will = None
        if run.finished and state_file.exists():
            screen.say(
                f"the finished latent is kept in {state_file}; finish it with: wanflow decode"
                f" {shlex.quote(str(state_file))}"
            )
        raise
    args.watch.last_will = None
    for file in {state_file, getattr(args, "resume", None) or state_file}:
        file.unlink(missing_ok=True)
    screen.say(f"saved {target}")
    if args.contact_sheet:
        from wanflow.media import contact_sheet, read_frames

        sheet = target.with_name(target.stem + "_sheet.png")
        contact_sheet(read_frames(target)[0], sheet)
        screen.say(f"frames {sheet}")


class StateKeeper:
    """Remembers where a run stands and writes it down every few seconds."""

    def __init__(self, run: Run, file: Path) -> None:
        self.run, self.file, self.saved = run, file, time.monotonic()

    def __call__(self, told: Progress) -> bool:
        self.run = told.run
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.run.save(self.file)
            self.saved = time.monotonic()
        return True


def _request(args: argparse.Namespace) -> Request:
    both = args.sample_guide_scale
    request = Request(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        size=args.size,
        frame_num=args.frame_num,
        sample_solver=args.sample_solver,
        sample_steps=args.sample_steps,
        sample_shift=args.sample_shift,
        cfg_high=both if args.cfg_high is None else args.cfg_high,
        cfg_low=both if args.cfg_low is None else args.cfg_low,
        boundary=args.boundary,
        fps=args.fps,
        seed=args.base_seed,
        lora=None if args.lora is None else tuple(args.lora),
        cfg_start=args.cfg_start,
        cfg_start_steps=args.cfg_start_steps,
    )
    return with_settings(request, args.preset) if args.preset else request


def _runtime(args: argparse.Namespace) -> Runtime:
    keep = None if args.offload_model is None else not args.offload_model
    return Runtime(
        args.device,
        args.dtype,
        args.t5_cpu or None,
        keep,
        args.cfg_batch,
        args.noise_device,
        args.lora_mode or "live",
        args.prefetch,
        args.resident_blocks,
        args.stream_from,
        args.chunk_tokens,
        args.vae_tile,
        args.quantize or "",
        args.quantize_layers,
        args.attention,
        text_cache(args.text_cache),
        **layout(args),
    )


def _extended(args: argparse.Namespace, request: Request) -> Request:
    if not args.use_prompt_extend:
        return request
    from wanflow.extend import extend

    if args.prompt_extend_method == "local_qwen":
        raise RequestError(
            "--prompt_extend_method local_qwen would load a second large model, which wanflow does"
            " not do; serve it behind an OpenAI-compatible address and use --prompt_extend_method"
            " dashscope with DASH_API_URL set to it"
        )
    url, key = os.environ.get("DASH_API_URL"), os.environ.get("DASH_API_KEY")
    return replace(
        request,
        prompt=extend(
            request.prompt, args.prompt_extend_target_lang, args.prompt_extend_model, url, key
        ),
    )


def _refuse_at_once(args: argparse.Namespace) -> None:
    """RequestError for what this command cannot do, before anything is looked at."""
    if args.task != "t2v-A14B":
        raise RequestError(f"--task {args.task} is another model; wanflow runs t2v-A14B")
    processes, wanted = int(os.environ.get("WORLD_SIZE", "1")), layout(args)
    sizes = [
        2 if wanted["cfg_parallel"] else 1,
        wanted["ring_size"] or 1,
        wanted["ulysses_size"] or 1,
    ]
    if processes == 1 and (math.prod(sizes) > 1 or args.dit_fsdp):
        count = max(2, math.prod(sizes))
        said = "--dit_fsdp" if math.prod(sizes) == 1 else f"a layout of {count} processes"
        raise RequestError(
            f"{said} needs several processes, and there is one: start them with torchrun"
            f" --nproc_per_node={count} generate.py ..., or with wanflow generate --gpus"
            f" {','.join(str(number) for number in range(count))} ...",
            *_what_is_missing(args.ckpt_dir),
        )
    unused = [f"--{flag}" for flag in OTHER_TASKS if getattr(args, flag) is not None]
    if unused:
        logger.warning("%s: not used by t2v-A14B", ", ".join(unused))


def _what_is_missing(folder: str | None) -> list[str]:
    """Lines on weights and machine, for a refusal that comes before either is looked at."""
    if folder is None or folder == "nano":
        return []
    from wanflow.plan import WHERE_ELSE, enough_for_full_size, needed_words, this_machine

    lines = [] if Path(folder).is_dir() else [f"  weights: there is no folder {folder}"]
    machine = this_machine(Path(folder))
    if not enough_for_full_size(machine):
        lines += [f"  {needed_words()}", f"  here: {machine.words()}", f"  do: {WHERE_ELSE}"]
    return lines


def _open(model: str | Path | None, given: dict[Part, Path]) -> Checkpoint:
    from wanflow.assemble import resolve

    try:
        return resolve(model, given)
    except RequestError as error:
        there = model is None or Path(model).exists() or str(model) == "nano"
        raise RequestError(*error.args, *([] if there else _what_is_missing(str(model)))) from None


def _model_of(model: ModelRecord) -> str:
    return "nano" if model.name == "nano" and not Path(model.folder).is_dir() else model.folder


def _same_weights(made: Recipe, here: Recipe, force: bool) -> None:
    then, now = made.model.fingerprint, here.model.fingerprint
    if then != now and not force:
        raise RequestError(
            f"the recipe was made with other weights ({made.model.name} {then}, here"
            f" {here.model.name} {now}); point --ckpt_dir at those, or take these with --force"
        )
    if made.versions != here.versions:
        logger.warning(
            "made with %s; here %s: the result may differ by rounding", made.versions, here.versions
        )


def _check_target(path: Path, overwrite: bool) -> None:
    from wanflow.media import check_target

    if path.suffix.lower() not in (".mp4", ".png"):
        raise RequestError(f"{path}: name an .mp4 (or a .png for one frame)")
    check_target(path, overwrite)


def _default_target(task: str, run: Run) -> Path:
    from wanflow.media import safe_name

    name = run.recipe.model.name
    return Path(
        safe_name(
            task if name != "nano" else name, run.request.size, run.request.prompt, datetime.now()
        )
    )
