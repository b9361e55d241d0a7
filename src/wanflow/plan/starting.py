"""Whether to start: decided before a weight is read, and said in three lines where the answer is
no.
"""

from __future__ import annotations

import re
from dataclasses import replace

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.config import RequestError
from wanflow.lora.stack import find_loras
from wanflow.plan.gpus import Machine, this_machine
from wanflow.plan.layout import used_here
from wanflow.plan.solve import Plan, dtype_of, solve
from wanflow.presets import ModelSpec
from wanflow.request import CompleteRequest, Request
from wanflow.runtime import Runtime, dtype_name

GB = 10**9
FULL_SIZE = 20 * GB  # bytes of one expert in float32 from which a model belongs on a GPU
# The user's document asks for 80, 64 and 150 GB; machines sold as such report a little less.
NEEDS = {"GPU memory": (80, 75 * 2**30), "RAM": (64, 58 * 2**30)}
DISK_NEEDED = 150
# GB of GPU memory and of RAM, with which 1280*720 and 81 frames still run (tests hold the plan
# to it)
LEAST = (12, 32)
WHERE_ELSE = (
    "run it on a server or cloud machine with an 80 GB GPU, such as an A100 or H100 (Alibaba PAI,"
    " Tencent TI, AWS, Azure, Google Cloud, or a container platform), or on any GPU with 12 GB; on"
    " this machine, --ckpt_dir nano runs the miniature"
)
FORCE = "(--force starts it here all the same)"


def needed_words() -> str:
    gpu, ram = NEEDS["GPU memory"][0], NEEDS["RAM"][0]
    return (
        f"Wan2.2-T2V-A14B needs a GPU with {gpu} GB, {ram} GB of RAM and {DISK_NEEDED} GB of disk"
        f" for its weights; with {LEAST[0]} GB and {LEAST[1]} GB of RAM it runs by streaming them"
    )


def enough_for_full_size(machine: Machine) -> bool:
    """What the user's document asks for, GPU and RAM."""
    return machine.gpu >= NEEDS["GPU memory"][1] and (
        machine.ram == 0 or machine.ram >= NEEDS["RAM"][1]
    )


def completed(request: Request | CompleteRequest | None, preset: ModelSpec) -> CompleteRequest:
    """The request with its LoRA files found and nothing open; None is the model's default."""
    if isinstance(request, CompleteRequest):
        return request
    wanted = request or Request("any", seed=0)
    loras = find_loras(wanted.loras()) if wanted.lora else ()
    return replace(wanted, lora=tuple(str(lora) for lora in loras), lora_from=None).complete(preset)


def make_plan(
    checkpoint: Checkpoint,
    runtime: Runtime,
    request: Request | CompleteRequest | None = None,
    processes: int = 1,
    per_machine: int | None = None,
) -> Plan:
    """How a request runs on this machine, with every setting settled; it refuses nothing that could
    be tried.

    Args:
        processes, per_machine: as `settle` takes them. One process may plan for all.
    """
    complete = completed(request, checkpoint.spec)
    machine = this_machine(checkpoint.folder, used_here(processes, per_machine))
    return solve(
        checkpoint, complete, runtime, machine, processes=processes, per_machine=per_machine
    )


def plan_or_raise(
    checkpoint: Checkpoint,
    runtime: Runtime,
    request: Request | CompleteRequest | None = None,
    processes: int = 1,
    per_machine: int | None = None,
) -> Plan:
    """The plan, where it can be carried out.

    Args:
        processes, per_machine: as `settle` takes them. One process may plan for all.

    Raises:
        RequestError: in three lines: what is needed, what is here, what to do.
    """
    model, machine = (
        checkpoint,
        this_machine(checkpoint.folder, used_here(processes, per_machine)),
    )
    if machine.gpu == 0 or runtime.device == "cpu":
        refuse_without_gpu(model, machine)  # before anything is traced, which takes seconds
    complete = completed(request, checkpoint.spec)
    plan = solve(model, complete, runtime, machine, processes=processes, per_machine=per_machine)
    raise_if_unfit(plan, model)
    return plan


def refuse_without_gpu(model: Checkpoint, machine: Machine) -> None:
    """RequestError for a model of full size, where it would work on a CPU for days."""
    if model.parameters("high") * 4 <= FULL_SIZE:
        return
    saved = (
        sum(model.parameters(which) * 2 - model.file_bytes(which) for which in ("high", "low")) // 2
    )
    packed = (
        f"{model.spec.name}'s weights are packed here ({model.file_bytes('high') / GB:.0f} GB an"
        " expert). "
        if saved > GB
        else ""
    )
    raise RequestError(
        packed + needed_words(), f"  here: {machine.words()}", f"  do: {WHERE_ELSE} {FORCE}"
    )


def raise_if_unfit(plan: Plan, model: Checkpoint) -> None:
    """RequestError in three lines, where a plan cannot be carried out."""
    if plan.kind == "cpu":
        refuse_without_gpu(model, plan.machine)
    if plan.need is None:
        _refuse_small(plan, model)
        return
    if plan.fits:
        return
    needed = f"{model.spec.name} with these settings needs {'; and '.join(plan.short)}"
    ways = list(plan.offers)
    if plan.kind == "gpu":
        ways += [
            (
                "leave settings open that you set (--resident_blocks, --keep_experts and the"
                f" like): {LEAST[0]} GB of GPU memory and {LEAST[1]} GB of RAM are enough at"
                " 1280*720 then"
            ),
            "free memory that other programs hold",
        ]
    else:
        ways += [
            "try --dtype bfloat16 if that is not it",
            "close other programs",
            "use a larger machine",
        ]
    raise RequestError(
        needed, f"  here: {plan.machine.words()}", f"  do: {', or '.join(ways)} {FORCE}"
    )


def _refuse_small(plan: Plan, model: Checkpoint) -> None:
    """A model that stays in memory whole: against what is free, without a trace."""
    dtype = dtype_of(model, plan.runtime, plan.kind)
    experts = 2 if plan.runtime.keep_experts else 1
    need = (
        model.parameters("high") * dtype.itemsize * experts
        + model.parameters("t5") * dtype.itemsize
        + GB
    )
    have = plan.machine.ram_free if plan.kind == "cpu" else plan.machine.gpu_free
    if have and need > have:
        raise RequestError(
            f"{model.spec.name} needs about {need / GB:.1f} GB of"
            f" {'free RAM' if plan.kind == 'cpu' else 'GPU memory'} in"
            f" {dtype_name(dtype)}",
            f"  here: {have / GB:.1f} GB",
            "  do: try --dtype bfloat16 if that is not it, close other programs, or use a larger"
            f" machine {FORCE}",
        )


def advice(request: CompleteRequest, checkpoint: Checkpoint) -> list[str]:
    """What is known to go wrong with a request that is allowed."""
    preset, notes = checkpoint.spec, []
    if request.frame_num > preset.frame_num:
        notes.append(
            f"{request.frame_num} frames: trained on {preset.frame_num}; longer clips are known to"
            " repeat or burn out"
        )
    if request.fps != preset.fps:
        notes.append(
            f"{request.fps:g} fps: the motion was learnt at {preset.fps}, so it will look faster or"
            " slower"
        )
    if checkpoint.vocabulary:
        if request.size != preset.size:
            notes.append(
                f"{request.size[0]}*{request.size[1]}: {preset.name} was trained at"
                f" {preset.size[0]}*{preset.size[1]} only"
            )
        words = re.findall(r"[^\W_]+", request.prompt.lower())
        strange = [word for word in dict.fromkeys(words) if word not in checkpoint.vocabulary]
        if strange and not request.lora:  # which may have taught it more
            notes.append(
                f"{preset.name} does not know {', '.join(strange[:8])}: it draws one shape (circle,"
                " square, triangle, star, cross), its colour, size and motion, and the"
                " background's colour"
            )
    return notes
