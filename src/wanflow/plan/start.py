"""Plan a request before a weight is read, and refuse in three lines what cannot run here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from wanflow.assemble import is_tiny
from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.choices import choose_device
from wanflow.config import RequestError
from wanflow.plan.cards import GB
from wanflow.plan.gpus import Machine, this_machine
from wanflow.plan.needed import needed, needed_words, where_else
from wanflow.plan.plan import Plan, expert_parameters, ranks_here, set_up
from wanflow.presets import ModelSpec
from wanflow.request import CompleteRequest, Request
from wanflow.runtime import Runtime, dtype_name
from wanflow.units import file_size, memory_size

FULL_SIZE = 10 * GB  # bytes of an expert in float32 above which a model needs a GPU
FORCE = "(--force starts it anyway)"


def completed(request: Request | CompleteRequest | None, spec: ModelSpec) -> CompleteRequest:
    """Return the request with its LoRA files found; None is the model's default."""
    if isinstance(request, CompleteRequest):
        return request
    request = request or Request("any", seed=0)
    if request.lora:
        from wanflow.lora.find import with_found_loras

        request = with_found_loras(request)
    return request.complete(spec)


def make_plan(
    checkpoint: Checkpoint,
    runtime: Runtime,
    request: Request | CompleteRequest | None = None,
    processes: int = 1,
    per_machine: int | None = None,
    force: bool = False,
    report: Callable[[str], object] = str,
    decoding: bool = False,
    loaded: bool = False,
    least_free: int = 0,
) -> Plan:
    """Plan a request on this machine; one process may plan for all.

    With `force`, a plan that cannot run is returned too. `report` is called with what is planned
    next. `decoding` needs room for the VAE only. What a `loaded` model holds does not count
    against it: all memory of the machine is taken for free. `least_free` is of `this_machine`; the
    other arguments are as in `set_up`.

    Raises:
        RequestError: in three lines: what is needed, what is here, what to do.
    """
    cards = range(ranks_here(processes, per_machine)) if processes > 1 else ()
    runtime, machine = placed(runtime, checkpoint.folder, cards, least_free)
    if loaded:
        machine = replace(machine, gpu_free=machine.gpu, ram_free=machine.ram)
    if not (force or decoding) and (machine.gpu == 0 or runtime.device == "cpu"):
        refuse_without_gpu(checkpoint, machine)  # before a trace, which takes seconds
    complete = completed(request, checkpoint.spec)
    plan = set_up(checkpoint, complete, runtime, machine, processes, per_machine)
    if plan.small and is_tiny(checkpoint, runtime, complete):
        plan = plan.all_resident()
    else:
        from wanflow.plan.solve import completed_plan

        plan = completed_plan(plan, report)
    if decoding and not force:
        _refuse_decoding(plan)
    elif not force:
        raise_if_unfit(plan)
    return plan


def placed(
    runtime: Runtime, folder: Path, cards: Sequence[int] = (), least_free: int = 0
) -> tuple[Runtime, Machine]:
    """Return the runtime with its device chosen, and this machine as a run there finds it.

    Args:
        runtime: the settings so far.
        folder: on the disk that counts.
        cards: the GPUs of several processes, by their numbers.
        least_free: of `this_machine`.
    """
    device = choose_device(runtime.device, alone=not cards)
    used = () if device.type != "cuda" else cards or (device.index,)
    machine = this_machine(folder, used, least_free)
    if device.type == "cuda":
        from wanflow.transforms.host_memory import pinnable

        pinned = pinnable(device, runtime.machine_cache, machine.ram, machine.ram_free)
        machine = replace(machine, pinned=pinned)
    return replace(runtime, device=str(device)), machine


def needs_gpu(checkpoint: Checkpoint) -> bool:
    """Return whether a model is of full size, and would run on a CPU for weeks."""
    return expert_parameters(checkpoint) * 4 > FULL_SIZE


def refuse_without_gpu(checkpoint: Checkpoint, machine: Machine) -> None:
    """Raise RequestError for a model that needs a GPU."""
    if not needs_gpu(checkpoint):
        return
    spec = checkpoint.spec
    files = [checkpoint.file_bytes(name) for name in spec.expert_names]
    in_bf16 = [checkpoint.parameters(name) * 2 for name in spec.expert_names]
    packed = ""
    if (sum(in_bf16) - sum(files)) // len(files) > GB:
        each = " an expert" if len(files) > 1 else ""
        packed = f"{spec.name}'s weights are packed here ({file_size(files[0])}{each}). "
    raise RequestError(
        packed + needed_words(spec.name),
        f"  here: {machine.words()}",
        f"  do: {where_else(spec.name)} {FORCE}",
    )


def raise_if_unfit(plan: Plan) -> None:
    """Raise RequestError in three lines where a plan cannot run."""
    name = plan.checkpoint.spec.name
    if plan.kind == "cpu":
        refuse_without_gpu(plan.checkpoint, plan.machine)
    if plan.need is None:
        _refuse_small(plan)
        return
    if plan.fits:
        return
    if plan.small:
        width, height = plan.request.size
        fit = f"; these fit: {', or '.join(plan.offers)}" if plan.offers else ""
        raise RequestError(
            f"{name}: size {width}*{height} with frame_num {plan.request.frame_num} needs"
            f" {'; and '.join(plan.short)}{fit} (force starts it anyway)"
        )
    raise RequestError(
        f"{name} with these settings needs {'; and '.join(plan.short)}",
        f"  here: {plan.machine.words()}",
        f"  do: {', or '.join(ways_out(plan))} {FORCE}",
    )


def ways_out(plan: Plan) -> tuple[str, ...]:
    """Return what would make a plan fit that does not, in words."""
    if plan.small:
        return plan.offers
    if plan.kind == "gpu":
        spec = plan.checkpoint.spec
        (gpu, ram), (width, height) = needed(spec.name).least, spec.size
        return (
            *plan.offers,
            f"{gpu} GB of GPU memory and {ram} GB of RAM are enough at {width}*{height}: leave"
            " settings open that you set (--resident_blocks, --offload_model and the like)",
            "free memory that other programs hold",
        )
    return (*plan.offers, "try --dtype bfloat16", "close other programs", "use a larger machine")


def _refuse_decoding(plan: Plan) -> None:
    """Raise RequestError where a finished latent cannot be decoded."""
    if plan.need is None:
        return
    vae, machine = plan.need.phases[-1], plan.machine
    for kind, needs, free in (
        ("GPU memory", vae.device, machine.gpu_room),
        ("RAM", vae.ram, machine.ram_free),
    ):
        if needs > free > 0:
            width, height = plan.request.size
            raise RequestError(
                f"{plan.checkpoint.spec.name}: decoding {plan.request.frame_num} frames of"
                f" {width}*{height} needs {memory_size(needs)} of {kind}, and {memory_size(free)}"
                f" are free; use a larger machine {FORCE}"
            )


def _refuse_small(plan: Plan) -> None:
    """Compare a model that stays in memory with the free memory, without a trace."""
    checkpoint, on_cpu = plan.checkpoint, plan.kind == "cpu"
    experts = len(checkpoint.spec.expert_names) if plan.runtime.keep_experts else 1
    parameters = expert_parameters(checkpoint) * experts + checkpoint.parameters("t5")
    need = parameters * plan.dtype.itemsize + GB
    free = plan.machine.ram_free if on_cpu else plan.machine.gpu_room
    if free and need > free:
        memory = "free RAM" if on_cpu else "GPU memory"
        raise RequestError(
            f"{checkpoint.spec.name} needs about {memory_size(need)} of {memory} in"
            f" {dtype_name(plan.dtype)}",
            f"  here: {memory_size(free)}",
            f"  do: try --dtype bfloat16, close other programs, or use a larger machine {FORCE}",
        )
