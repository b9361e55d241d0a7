"""Run `wanflow generate`, `replay` and `decode`: decide, open, run and save, in one path."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wanflow.choices import choose_device, choose_dtype, has_bfloat16, is_small
from wanflow.cli import flags
from wanflow.cli.checks import check_state, machine_lines
from wanflow.cli.flags import (
    CKPT_DIR,
    OTHER_TASKS,
    again_flags,
    asks_for_several,
    given_parts,
    list_flags,
    model_of_task,
    refuse_other_task,
    request_from,
    runtime_from,
)
from wanflow.cli.keeping import continuing, refuse_another, state_of
from wanflow.cli.parser import Parser, file_path, settings_from
from wanflow.cli.running import check_target_name, run_and_save, world_size
from wanflow.cli.trust import is_embedded, unread, with_trusted_paths, with_trusted_pictures
from wanflow.config import RequestError
from wanflow.geometry import parse_size
from wanflow.keeping import STATE_SUFFIX
from wanflow.presets import EMBEDDED
from wanflow.request import PICTURES, Picture, Request
from wanflow.runtime import Runtime, runtime_of
from wanflow.settings import settings_of
from wanflow.untrusted import printable

if TYPE_CHECKING:
    from wanflow.checkpoint.checkpoint import Checkpoint
    from wanflow.checkpoint.parts import Part
    from wanflow.parallel.ranks import DistInfo
    from wanflow.pipeline import Run
    from wanflow.recipe import ModelRecord, Recipe
    from wanflow.screen import Screen

logger = logging.getLogger("wanflow")
T = TypeVar("T")

__all__ = ["asks_for_several", "decode", "generate", "generate_flags", "replay"]


@dataclass(frozen=True)
class Job:
    """What to make, how, and from which weights.

    target: the file to write; None names it after the prompt.
    recipe: of the earlier run that is made again or continued. run: its saved state, to continue.
    """

    request: Request
    runtime: Runtime
    model: str | None
    parts: dict[Part, Path]
    target: Path | None
    recipe: Recipe | None = None
    run: Run | None = None


def generate_flags(p: Parser) -> None:
    """Add the flags of `wanflow generate`."""
    flags.generate_flags(p)
    list_flags(p)


def replay_flags(p: Parser) -> None:
    """Add the flags of `wanflow replay`."""
    p.add_argument("video", type=file_path, metavar="VIDEO", help="a video that wanflow made")
    for flag, which in (("image", "it begins"), ("last_image", "it ends")):
        text = f"the picture that {which} with, where it lies elsewhere by now"
        p.add_argument(f"--{flag}", type=file_path, metavar="FILE", help=text)
    again_flags(p)


def decode_flags(p: Parser) -> None:
    """Add the flags of `wanflow decode`."""
    p.add_argument("latent", type=file_path, metavar="LATENT", help=f"a file *{STATE_SUFFIX}")
    again_flags(p)


# Commands


def generate(args: argparse.Namespace) -> None:
    """Make a video from a prompt, or continue a saved run."""
    runtime = runtime_from(args)
    refuse_unsupported(args, runtime)
    if args.resume:
        check_state(args.resume)
        return _carry_out(args, lambda: _saved_job(args, args.resume))
    refuse_no_weights(args)
    if not args.prompt:
        raise RequestError("--prompt is missing: say what the video shows")
    _carry_out(args, lambda: _new_job(args, runtime))


def replay(args: argparse.Namespace) -> None:
    """Make a video again from the recipe in it."""
    _refuse_split(args, runtime_from(args))
    _carry_out(args, lambda: _replay_job(args))


def decode(args: argparse.Namespace) -> None:
    """Decode the finished latent of a saved run."""
    _refuse_split(args, runtime_from(args))
    _carry_out(args, lambda: _saved_job(args, args.latent))


def _new_job(args: argparse.Namespace, runtime: Runtime) -> Job:
    from wanflow.front import with_pictures

    request = with_pictures(request_from(args))
    return Job(request, runtime, args.ckpt_dir, given_parts(args), args.save_file)


def _saved_job(args: argparse.Namespace, file: Path) -> Job:
    from wanflow.pipeline import Run

    run = Run.load(file)
    command = continuing(args, run, file, args.save_file)
    steps = f"{file} is at step {run.state.index} of {run.request.sample_steps}"
    if args.command == "decode" and not run.finished:
        raise RequestError(f"{steps}; finish it with: {command}")
    if args.command == "generate":
        if run.finished:
            raise RequestError(f"{steps}: its latent is finished; decode it with: {command}")
        _refuse_changes(args, run.recipe)
    target = file.with_name(file.name.removesuffix(STATE_SUFFIX) + ".mp4")
    recipe = with_trusted_paths(args, run.recipe, file, args.ckpt_dir is None)
    job = _recorded_job(args, recipe, target)
    # Its noise is drawn already, so a machine without that device can go on.
    runtime = replace(job.runtime, noise_device="cpu")
    run = replace(run, recipe=recipe)
    return replace(job, request=unread(job.request), run=run, runtime=runtime)


def _replay_job(args: argparse.Namespace) -> Job:
    from wanflow.clipfiles import read_recipe
    from wanflow.front import with_pictures
    from wanflow.recipe import Recipe

    recipe = Recipe.from_json(read_recipe(args.video), args.video)
    recipe = with_trusted_paths(args, recipe, args.video, args.ckpt_dir is None)
    recipe = with_trusted_pictures(args, recipe, args.video)
    target = args.video.with_name(f"{args.video.stem}_replay{args.video.suffix}")
    job = _recorded_job(args, recipe, target)
    return replace(job, request=with_pictures(job.request))


def _recorded_job(args: argparse.Namespace, recipe: Recipe, target: Path) -> Job:
    """Return the job of a recipe: same weights and fixed settings; flags place it."""
    placed, made, given = runtime_from(args), runtime_of(recipe), settings_from(Runtime, args)
    others = [
        f"--{one.flags[0]}"
        for name, one in settings_of(Runtime).items()
        if name in given and name in recipe.runtime and not one.fixed
        if str(given[name]).partition(":")[0] != str(recipe.runtime[name])
    ]
    if others:
        logger.warning(
            "%s: not what the recipe records; the result may differ by rounding", ", ".join(others)
        )
    free = {
        name: getattr(placed, name)
        for name, one in settings_of(Runtime).items()
        if not one.fixed and (name in given or not (one.recorded or name == "cfg_batch"))
    }
    if world_size() > 1 and "vae_tile" not in given:
        free["vae_tile"] = None  # several ranks decode in strips
    model, parts = args.ckpt_dir, given_parts(args)
    if model is None:
        model = recipe.model.name if is_embedded(recipe.model) else recipe.model.folder
        recorded: dict[Any, str] = recipe.model.parts
        parts = parts or {part: Path(path) for part, path in recorded.items()}
    request = Request(**vars(recipe.request), exact_size=True)
    return Job(request, replace(made, **free), model, parts, args.save_file or target, recipe)


def _refuse_changes(args: argparse.Namespace, recipe: Recipe) -> None:
    """Raise RequestError for flags that would change the result of a saved run."""
    changes = []
    for cls, made in ((Request, recipe.request), (Runtime, runtime_of(recipe))):
        for name, value in settings_from(cls, args).items():
            one, decided = settings_of(cls)[name], getattr(made, name)
            if (cls is Request or one.fixed) and not _is_same(name, value, decided):
                flags = "/".join(f"--{flag}" for flag in one.flags)
                changes.append(f"{flags} {printable(value, 40)} (it has {printable(decided, 40)})")
    asked_for = ("preset", "sample_guide_scale", "use_prompt_extend", "recipe")
    changes += [f"--{flag}" for flag in asked_for if getattr(args, flag)]
    if changes:
        raise RequestError(
            f"--resume continues a saved run, whose result these would change:"
            f" {', '.join(changes)}; leave them out"
        )


def _is_same(name: str, asked: Any, decided: Any) -> bool:
    """Return whether a flag's value is what a recipe has; of a picture, by its hash."""
    if name == "size":
        return bool(parse_size(asked) == decided)
    if name in PICTURES and decided is not None:
        from wanflow.pictures import open_picture

        return open_picture(asked, name).sha256 == decided.sha256
    return bool(asked == decided)


def refuse_no_weights(args: argparse.Namespace) -> None:
    """Raise RequestError where nothing names the weights."""
    if args.ckpt_dir is None and not given_parts(args):
        raise RequestError(
            "--ckpt_dir is missing: name the folder of the weights, or nano, the miniature inside"
            f" wanflow; {CKPT_DIR} or a --config file can name it for every command"
        )


def refuse_unsupported(args: argparse.Namespace, runtime: Runtime) -> None:
    """Raise RequestError for what no weights and no machine can change."""
    model_of_task(args)
    _refuse_split(args, runtime)
    unused = [f"--{flag}" for flag in OTHER_TASKS if getattr(args, flag) is not None]
    if unused:
        logger.warning("%s: used by other tasks only", ", ".join(unused))
    if args.preview is not None:
        from wanflow.cli.previewing import refuse_preview

        refuse_preview(args.preview)


def _refuse_split(args: argparse.Namespace, runtime: Runtime) -> None:
    """Raise RequestError for a layout of several processes where there is one."""
    split = (2 if runtime.cfg_parallel else 1) * (runtime.ring_size or 1)
    split *= runtime.ulysses_size or 1
    if world_size() == 1 and (split > 1 or runtime.dit_fsdp):
        count = max(2, split)
        what = "--dit_fsdp" if split == 1 else f"a layout of {count} processes"
        raise RequestError(
            f"{what} needs several processes, and this is one: start them with torchrun"
            f" --nproc_per_node={count} generate.py ..., or with wanflow generate --gpus"
            f" {','.join(map(str, range(count))) if count <= 16 else '0,1,...'} ...",
            *machine_lines(args.ckpt_dir),
        )


# The path of every command


def _carry_out(args: argparse.Namespace, read: Callable[[], Job]) -> None:
    """Join the ranks, open the weights, decide what is open, then run and save.

    Args:
        args: of the command.
        read: returns the job; rank 0 calls it for all.
    """
    from wanflow.assemble import assemble, model_record

    info = join(args) if world_size() > 1 else None
    follower = info is not None and info.rank > 0
    screen = args.output.screen(follower)  # only rank 0 shows progress
    job = from_rank0(info, read)
    if job.target is not None and not follower:
        check_target_name(job.target, args.overwrite)
        args.claims.take(job.target)
        refuse_another(args, state_of(job.target), job.run)
    checkpoint = open_weights(job.model, job.parts)
    refuse_other_task(args, checkpoint)
    if info is not None:
        job = replace(job, runtime=replace(job.runtime, device=str(info.device)))
    if job.recipe is not None:
        given = settings_from(Runtime, args)
        job = replace(job, runtime=_possible_here(job.runtime, checkpoint, given))
    request, runtime = from_rank0(info, lambda: _decide(args, job, checkpoint, screen, info))
    pipe = assemble(checkpoint, runtime, screen.loading, info)
    if job.recipe is not None:
        _same_weights(job.recipe, model_record(checkpoint), args.force)
    run = job.run or pipe.begin(request)
    if job.recipe is not None and not args.force:
        _same_loras(job.recipe, run.recipe)
    run_and_save(pipe, run, job.target, args, screen)


def join(args: argparse.Namespace) -> DistInfo:
    """Join the ranks of torchrun or `--gpus`."""
    from wanflow.parallel.ranks import join_group
    from wanflow.parallel.watchdog import GROUP_MARGIN_S

    device = choose_device(args.device, alone=False)
    info = join_group(device, args.timeout + GROUP_MARGIN_S)
    if info.rank > 0:
        logger.setLevel(logging.ERROR)
    return info


def from_rank0(info: DistInfo | None, make: Callable[[], T]) -> T:
    """Return what `make` returns on rank 0."""
    if info is None:
        return make()
    from wanflow.parallel.ranks import broadcast_from_rank0

    return broadcast_from_rank0(info, make)


def open_weights(model: str | None, parts: dict[Part, Path]) -> Checkpoint:
    """Open the files of a model; a refusal also says what this machine can run."""
    from wanflow.opening import resolve

    try:
        return resolve(model, parts)
    except RequestError as error:
        missing = model not in (None, *EMBEDDED) and not Path(str(model)).exists()
        raise RequestError(*error.args, *(machine_lines(model) if missing else ())) from None


def _decide(
    args: argparse.Namespace,
    job: Job,
    checkpoint: Checkpoint,
    screen: Screen,
    info: DistInfo | None,
) -> tuple[Request, Runtime]:
    """Return the request and a runtime that leaves nothing open; rank 0 decides for all."""
    request = job.request
    if job.recipe is None:
        request = extended(args, checked(request, checkpoint))
        for note in notes(args, [request], checkpoint):
            logger.warning(note)
    decoding = job.run is not None and job.run.finished
    return request, settled(args, job.runtime, request, checkpoint, screen, info, decoding)


def settled(
    args: argparse.Namespace,
    runtime: Runtime,
    request: Request,
    checkpoint: Checkpoint,
    screen: Screen,
    info: DistInfo | None,
    decoding: bool = False,
) -> Runtime:
    """Return a runtime that leaves nothing open, for a request; show the reasons of the plan."""
    from wanflow.opening import settle

    how = args.force, info, screen.stage, decoding
    runtime, reasons = settle(checkpoint, runtime, request, *how)
    screen.close()
    for reason in reasons:
        screen.say(f"plan: {reason}")
    return runtime


def checked(request: Request, checkpoint: Checkpoint) -> Request:
    """Return a new request with its LoRAs found; RequestError where the model refuses it."""
    if request.lora:
        from wanflow.lora.find import with_found_loras

        request = with_found_loras(request)
    request.refuse_pictures(checkpoint.spec)
    request.complete(checkpoint.spec)
    return request


def notes(
    args: argparse.Namespace, requests: Iterable[Request], checkpoint: Checkpoint
) -> list[str]:
    """Return what to know about new requests, each note once."""
    from wanflow.advice import advice

    found, distilled = dict.fromkeys(checkpoint.notes), True
    for request in requests:
        found |= dict.fromkeys(advice(request.complete(checkpoint.spec), checkpoint))
        distilled = distilled and bool(request.lora)
    if args.preset and not distilled:
        found[
            f"--preset {args.preset} expects weights with a distilled LoRA, and no --lora is given:"
            " so few steps blur without one"
        ] = None
    return list(found)


def _possible_here(runtime: Runtime, checkpoint: Checkpoint, given: Container[str]) -> Runtime:
    """Return a recipe's runtime, with another device or kernel where this machine lacks its own.

    What is given by a flag is refused instead.
    """
    import torch

    from wanflow.checkpoint.load import expert_bytes
    from wanflow.transforms.attention import choose_kernel

    rounding = "the result may differ by rounding"
    try:
        device = choose_device(runtime.device)
    except RequestError as error:
        if "device" in given:
            raise
        logger.warning("%s; going on with another device, %s", error, rounding)
        kernel = runtime.attention if "attention" in given else "auto"
        device, runtime = choose_device("auto"), replace(runtime, attention=kernel)
    runtime, shape = replace(runtime, device=str(device)), checkpoint.spec.dit
    float32_bytes = expert_bytes(checkpoint, torch.float32)
    bfloat16 = has_bfloat16(device)
    dtype = choose_dtype(runtime.dtype, device.type == "cpu", float32_bytes, bfloat16)
    small = is_small(float32_bytes * dtype.itemsize // 4)
    try:
        choose_kernel(runtime.attention, device, dtype, shape.dim // shape.num_heads, small)
    except RequestError as error:
        if "attention" in given:
            raise
        logger.warning("%s; going on with another kernel, %s", error, rounding)
        runtime = replace(runtime, attention="auto")
    if runtime.compile == "on" and "compile" not in given:
        from wanflow.transforms.compile import missing_here

        if lacking := missing_here(device):
            logger.warning("this machine lacks %s; going on uncompiled, %s", lacking, rounding)
            runtime = replace(runtime, compile="off")
    return runtime


def _same_weights(made: Recipe, here: ModelRecord, force: bool) -> None:
    from wanflow.assemble import versions

    then, now = made.model.fingerprint, here.fingerprint
    if then != now and not force:
        raise RequestError(
            f"the recipe was made with other weights ({made.model.name} {then}, here"
            f" {here.name} {now}); point --ckpt_dir at those, or accept these with --force"
        )
    if made.versions != versions():
        logger.warning(
            "made with %s; here %s: the result may differ by rounding", made.versions, versions()
        )


def _same_loras(made: Recipe, here: Recipe) -> None:
    for path, fingerprint in made.loras.items():
        if here.loras.get(path, fingerprint) != fingerprint:
            raise RequestError(
                f"the recipe was made with another LoRA at {path}; restore that file, or accept"
                " this one with --force"
            )


def extended(args: argparse.Namespace, request: Request) -> Request:
    """Return a request whose prompt a server has extended, where that is asked for."""
    if not args.use_prompt_extend:
        return request
    from wanflow.extend import extend

    if args.prompt_extend_method == "local_qwen":
        raise RequestError(
            "--prompt_extend_method local_qwen needs a second large model, which wanflow does not"
            " load; serve it at an OpenAI-compatible address, and use --prompt_extend_method"
            " dashscope with DASH_API_URL"
        )
    prompt = extend(
        request.prompt,
        args.prompt_extend_target_lang,
        args.prompt_extend_model,
        os.environ.get("DASH_API_URL"),
        os.environ.get("DASH_API_KEY"),
        pictures=[one for one in (request.image, request.last_image) if isinstance(one, Picture)],
    )
    return replace(request, prompt=prompt)
