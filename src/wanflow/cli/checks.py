"""Refuse what no weights and no machine can make right, before torch is imported."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from wanflow.cli.flags import (
    LIST,
    asks_for_several,
    given_parts,
    model_of_task,
    request_from,
    runtime_from,
)
from wanflow.cli.parser import did_you_mean, settings_from
from wanflow.cli.running import check_target_name
from wanflow.config import RequestError
from wanflow.geometry import COMMON, geometry_of, parse_size
from wanflow.presets import EMBEDDED, FAMILY, ModelSpec
from wanflow.request import PICTURES, Request
from wanflow.runtime import DTYPES, Runtime
from wanflow.untrusted import check_regular, picture_path, printable, user_path

# Names of attention kernels; the kernels themselves need torch.
KERNELS = (
    "auto",
    "sdpa",
    "cudnn",
    "flash",
    "efficient",
    "math",
    "flash_attn",
    "flash_attn_3",
    "sage",
)
LISTED = 1000  # names of a folder that are compared with a misspelt one


def check(args: argparse.Namespace) -> None:
    """Check the arguments of a command as far as the standard library can.

    Raises:
        RequestError: for what the command would refuse later, at the cost of importing torch.
    """
    checks: dict[str, Callable[[argparse.Namespace], None]] = {
        "generate": _generate,
        "replay": _replay,
        "decode": lambda args: check_state(args.latent),
        "plan": _planned,
        "bench": _measured,
        "serve": _served,
        "inspect": lambda args: _model(args.path, to_load=False),
        "convert": _converted,
        "train": _train,
        "worker": _worked,
        "gang": _worked,
    }
    if args.command in checks:
        checks[args.command](args)


def _generate(args: argparse.Namespace) -> None:
    runtime = runtime_from(args)
    _check_runtime(runtime)
    if asks_for_several(args) or args.out_dir is not None:
        return _several(args)
    if args.resume is not None:
        return  # its flags come first
    if args.ckpt_dir is not None or given_parts(args):
        _check_request(request_from(args), model_of_task(args))
        _weights(args)
    target = args.save_file
    if target is not None and (target.suffix not in (".mp4", ".png") or exists(target)):
        check_target_name(target, args.overwrite)


def _several(args: argparse.Namespace) -> None:
    if not asks_for_several(args):
        raise RequestError("--out_dir is for several videos; one is named by --save_file")
    if args.resume is not None:
        raise RequestError(
            "--resume goes on with one saved run, and these flags ask for several videos; leave"
            f" one out: {', '.join(f'--{flag}' for flag in LIST)}"
        )
    if args.save_file is not None:
        raise RequestError(
            "--save_file names one video, and several are asked for; name their folder with"
            " --out_dir"
        )
    if args.ckpt_dir is not None or given_parts(args):
        from wanflow.cli.prompts import wanted

        wanted(args, request_from(args), partial(_check_one, model_of_task(args)))
        _weights(args)
    folder = args.out_dir
    if folder is not None and exists(folder) and not folder.is_dir():
        raise RequestError(f"--out_dir {printable(folder)} is a file; name a folder")


def _check_one(spec: ModelSpec | None, request: Request) -> None:
    """Check one request of several, with its pictures: all that is wrong is named at once."""
    _check_request(request, spec)
    for name in PICTURES:
        if (picture := getattr(request, name)) is not None:
            from wanflow.pictures import open_picture

            open_picture(picture, name)


def _replay(args: argparse.Namespace) -> None:
    _clip(args.video)
    for picture in filter(None, (args.image, args.last_image)):
        check_regular(picture)


def _planned(args: argparse.Namespace) -> None:
    if args.gpu is not None:
        from wanflow.plan.gpus import described

        described(args.gpu, args.num_gpus, args.ram, args.disk)
    _check_request(replace(request_from(args), prompt="any"), model_of_task(args), needed=False)
    _check_runtime(runtime_from(args))
    _weights(args)


def _measured(args: argparse.Namespace) -> None:
    _check_runtime(runtime_from(args))
    if not args.check:
        _check_request(Request(**{"prompt": "any", **settings_from(Request, args)}))
        _weights(args)


def _worked(args: argparse.Namespace) -> None:
    _check_runtime(runtime_from(args))
    _weights(args)


def _served(args: argparse.Namespace) -> None:
    from wanflow.cli.serve import check_serve, environment

    environment(args)
    check_serve(args)
    _check_runtime(runtime_from(args))
    _weights(args)
    for folder in args.lora_dir or ():
        if not user_path(folder).is_dir():
            raise RequestError(f"--lora_dir {printable(folder)}: there is no such folder")


def _converted(args: argparse.Namespace) -> None:
    from wanflow.convert.taken import refuse_folder

    _model(args.source)
    refuse_folder(args.target, args.overwrite)


def _train(args: argparse.Namespace) -> None:
    if args.data is None and not args.evaluate and not args.nano:
        raise RequestError(
            "train needs --data DIR (fine-tune on clips), --nano (train the miniature) or"
            " --evaluate MODEL (measure one)"
        )
    if args.data is not None and not exists(user_path(args.data)):
        raise RequestError(
            f"{printable(args.data)}: there is no such folder; give one with clips and captions to"
            " --data"
        )
    from wanflow.train.limits import check_limits

    check_limits(vars(args))
    if args.evaluate:
        _model(args.evaluate)
    elif args.data is not None and args.ckpt_dir is not None:
        _model(args.ckpt_dir)


def _check_request(request: Request, spec: ModelSpec | None = None, needed: bool = True) -> None:
    """Check the values that are given: the model's own are not known yet.

    Args:
        request: of the flags.
        spec: the model that `--task` names.
        needed: whether a model of pictures must have one.
    """
    for lora in request.loras():  # checks every value
        if not exists(user_path(lora.path)):
            raise RequestError(f"lora {printable(lora.path)}: there is no such file or folder")
    for name in PICTURES:
        picture = getattr(request, name)
        if isinstance(picture, str):
            check_regular(picture_path(picture, name))
    if request.size is not None:
        parse_size(request.size, COMMON if spec is None else geometry_of(spec))
    if spec is not None:
        request.refuse_pictures(spec, needed)
    if request.frame_num is not None:
        COMMON.check_frames(request.frame_num)


def _check_runtime(runtime: Runtime) -> None:
    if runtime.dtype not in ("auto", *DTYPES):
        names = ("auto", *DTYPES)
        raise RequestError(
            f"dtype {printable(runtime.dtype)!r} is none of {', '.join(names)}"
            f"{did_you_mean(runtime.dtype, names)}"
        )
    if runtime.attention not in KERNELS:
        raise RequestError(
            f"attention {printable(runtime.attention)!r} is none of {', '.join(KERNELS)}"
            f"{did_you_mean(runtime.attention, KERNELS)}"
        )
    if not re.fullmatch(r"auto|mps|(cpu|cuda)(:\d{1,3})?", runtime.device):
        raise RequestError(
            f"device {printable(runtime.device)!r} is none of auto, cpu, cuda, cuda:1 and mps"
        )


def _weights(args: argparse.Namespace) -> None:
    """Check that the folder and the files of the weights exist."""
    for part, file in given_parts(args).items():
        if not exists(user_path(file)):
            raise RequestError(f"--{part} {printable(file)}: there is no such file")
    if args.ckpt_dir is not None:
        _model(args.ckpt_dir, spec=model_of_task(args))


def _model(name: str | Path, to_load: bool = True, spec: ModelSpec | None = None) -> None:
    """Refuse a model that is not there; a repository's name may be in a cache.

    Args:
        name: of a folder, a file or nano.
        to_load: whether a whole model is needed, and not anything that can be looked into.
        spec: the model that is asked for; None: the one that the name tells.
    """
    text, path = str(name), user_path(name)
    if text in EMBEDDED or exists(path) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        return
    from wanflow.plan.needed import named

    shown, near = printable(name), _near(path)
    if spec is None:
        (spec,) = (one for one in FAMILY if one.name == named(path.name))
    if named(near) != spec.name:  # the folder of another model
        near = ""
    if near:
        raise RequestError(f"{shown} is missing; did you mean {near}?")
    if not to_load:
        raise RequestError(f"{shown} is missing; name an existing file or folder")
    from wanflow.checkpoint.published import how_to_get

    how = how_to_get(Path(shown), spec.task)
    raise RequestError(f"{shown} is missing; {how}", *machine_lines(text, spec.name))


def exists(path: Path) -> bool:
    """Return whether a path is there; False where the system does not take or show it."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _near(path: Path) -> str:
    """Return nano, or the path beside a missing one whose name is most like it; "" if none is."""
    if difflib.get_close_matches(str(path).lower(), ["nano"], cutoff=0.75):
        return "nano, the miniature inside wanflow"
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, LISTED)]
    except (OSError, ValueError):
        return ""
    found = difflib.get_close_matches(path.name, names, 1, cutoff=0.8)
    return printable(path.parent / found[0]) if found else ""


def machine_lines(folder: str | None, model: str | None = None) -> list[str]:
    """Return lines on missing weights and a machine that is too small, for a refusal.

    Args:
        folder: of the weights.
        model: its name; None: the one that the folder's name tells.
    """
    if folder is None or folder in EMBEDDED:
        return []
    from wanflow.plan.gpus import this_machine
    from wanflow.plan.needed import enough_for_full_size, named, needed_words, where_else

    path = user_path(folder)
    lines = [] if path.is_dir() else [f"  weights: there is no folder {printable(folder)}"]
    machine, model = this_machine(path.absolute(), ask_torch=False), model or named(path.name)
    if not enough_for_full_size(machine, model):
        lines += [f"  {needed_words(model)}", f"  here: {machine.words()}"]
        lines.append(f"  do: {where_else(model)}")
    return lines


def check_state(file: Path) -> None:
    """Refuse a saved run that is not there."""
    if not exists(user_path(file)):
        raise RequestError(f"there is no saved run at {printable(file)}")
    check_regular(user_path(file))


def _clip(file: Path) -> None:
    """Refuse a clip that is not there, or a folder that holds no frames with their recipe."""
    check_regular(user_path(file / "recipe.json" if file.is_dir() else file))
