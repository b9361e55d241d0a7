"""Put a model together: a checkpoint and a complete `Runtime` become a pipeline, in one order.

Everything that the machine decides (device, dtype, kernel, layout) is decided here, before a weight
is read. A feature's module is imported where a run uses that feature.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wanflow import __version__
from wanflow.advice import advice
from wanflow.checkpoint.checkpoint import Checkpoint, fingerprint
from wanflow.checkpoint.load import expert_bytes
from wanflow.checkpoint.parts import weights_of
from wanflow.choices import choose_device, choose_dtype, compiling_saves, has_bfloat16, is_small
from wanflow.conditioning import TextToVideo, clip_parts, conditioning_of, encoded_shape
from wanflow.config import RequestError
from wanflow.front import Display, Pipeline
from wanflow.geometry import geometry_of, parse_size
from wanflow.loaders.parts import LoadedParts, Report, refuse_packed
from wanflow.loaders.placement import Placement
from wanflow.loaders.velocity import make_velocity
from wanflow.pipeline import Engine, Frames, OnPart, Run, frame_by_frame, to_frames
from wanflow.recipe import ModelRecord, Recipe
from wanflow.request import CompleteRequest, Request
from wanflow.runtime import Runtime, recorded
from wanflow.sampling.schedule import Step
from wanflow.sampling.solvers import SolverState, Velocity
from wanflow.sampling.timeline import timeline
from wanflow.threads import on_free_threads
from wanflow.transforms import attention

if TYPE_CHECKING:
    from wanflow.parallel.groups import Layout
    from wanflow.parallel.ranks import DistInfo
    from wanflow.presets import ModelSpec
    from wanflow.transforms.attention_kernels import Backend

# Bytes: a run that takes no more needs no plan, and no look at memory.
TINY = 2**29
WORTH_A_LOOK = 3.0  # seconds: blocks that save less by being compiled are not

logger = logging.getLogger("wanflow")


def assemble(
    checkpoint: Checkpoint,
    runtime: Runtime,
    report: Report | None = None,
    info: DistInfo | None = None,
    admit: Callable[[CompleteRequest], None] | None = None,
    display: Display | None = None,
) -> Pipeline:
    """Return the pipeline of a model; weights are read when they are first needed.

    Args:
        checkpoint: the model's files.
        runtime: how to run; what is open takes its default.
        report: called while weights are read.
        info: this rank, of several that call this with the same runtime; None: it is alone.
        admit: raises RequestError for a request that is too large for this machine.
        display: shows the runs of `generate`.

    Raises:
        RequestError: for a runtime that this machine, this model or this layout cannot follow.
    """
    ctx = None
    if info is not None and info.world_size > 1:
        from wanflow.parallel.groups import make_groups

        runtime = replace(runtime, device=str(info.device))
        ctx = make_groups(layout_of(runtime), info)
    spec = checkpoint.spec
    _refuse(runtime, spec.dit.num_layers)
    refuse_together(runtime, spec.dit.num_layers, 1 if ctx is None else ctx.layout.size)
    device = choose_device(runtime.device)
    if runtime.compile == "on":
        from wanflow.transforms.compile import refuse_compile

        refuse_compile(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels of packages launch on the current one
    float32_bytes = expert_bytes(checkpoint, torch.float32)
    bfloat16 = has_bfloat16(device)
    dtype = choose_dtype(runtime.dtype, device.type == "cpu", float32_bytes, bfloat16)
    small = is_small(float32_bytes * dtype.itemsize // 4)
    kernel = choose_kernel(spec, runtime, device, dtype, small, info)
    if ctx is not None and ctx.layout.ring > 1 and kernel.with_lse is None:
        raise RequestError(
            f"ring attention needs the log-sum-exp, which {kernel.name!r} does not return;"
            " use --attention flash or --ring_size 1"
        )
    for warning in attention.warnings_for(kernel, runtime.quantize):
        logger.warning(warning)
    placement = Placement(dtype, device, runtime, ctx)
    if runtime.quantize:
        refuse_packed(checkpoint, placement)
    parts = LoadedParts(checkpoint, placement, kernel, report)
    logger.debug("%s on %s, attention kernel %s", dtype, device, kernel.name)
    logger.debug("settings %s", asdict(runtime))
    for part, path in checkpoint.paths.items():
        logger.debug("%s from %s", part, path)
    engine, speaks = make_engine(parts, admit), info is None or info.rank == 0
    advise = partial(advice, checkpoint=checkpoint) if speaks else None
    return Pipeline(engine, parts, advise, display)


def choose_kernel(
    spec: ModelSpec,
    runtime: Runtime,
    device: torch.device,
    dtype: torch.dtype,
    small: bool,
    info: DistInfo | None = None,
) -> Backend:
    """Return the attention kernel; `auto` is the fastest on a GPU, unless the model is small.

    Rank 0 measures for all.

    Raises:
        RequestError: for a kernel that fails here, and where none is sound.
    """
    dit, name = spec.dit, runtime.attention
    head_dim = dit.dim // dit.num_heads
    if name == "auto" and device.type == "cuda" and not small:
        from wanflow.parallel.ranks import broadcast_from_rank0
        from wanflow.remembered import of_device
        from wanflow.transforms.attention_timing import fastest_kernel, timed_width

        geometry = geometry_of(spec)
        tokens = geometry.tokens(parse_size(spec.size, geometry), spec.frame_num)

        def measured() -> str:
            width = timed_width(device, dit.num_heads, head_dim, dtype, tokens)
            kept, ring = of_device(runtime.machine_cache, device), (runtime.ring_size or 1) > 1
            return fastest_kernel(device, width, kept, lse=ring)

        name = measured() if info is None else broadcast_from_rank0(info, measured)
    return attention.choose_kernel(name, device, dtype, head_dim, small)


def make_engine(
    parts: LoadedParts, admit: Callable[[CompleteRequest], None] | None = None
) -> Engine:
    """Return what the core calls, made of loaded parts."""
    spec, ctx, runtime = parts.spec, parts.ctx, parts.runtime
    model = model_record(parts.checkpoint)
    layout = "one process" if ctx is None else str(ctx.layout)

    def record(request: Request) -> Recipe:
        fingerprints: dict[str, str] = {}
        if request.lora:
            from wanflow.lora.find import lora_fingerprints, with_found_loras

            request = with_found_loras(request)
            fingerprints = lora_fingerprints(request.loras())
        complete = request.complete(spec)
        if admit is not None:
            admit(complete)
        if ctx is not None:
            complete = replace(complete, seed=ctx.from_rank0(complete.seed))
        fixed = parts.device, parts.placement.dtype, parts.kernel.name, layout
        settings = recorded(parts.runtime, *fixed)
        how = settings | {"compile": "on" if compiles(parts, complete) else "off"}
        return Recipe(
            complete, model, how, versions(), runtime.noise_device, runtime.cfg_batch, fingerprints
        )

    def check(run: Run) -> None:
        parts.use_loras(run.request.loras, run.recipe.loras)

    def share(state: SolverState) -> SolverState:
        tensors = {name: value.to(parts.device) for name, value in state.tensors().items()}
        if ctx is not None:
            tensors = {name: ctx.world.broadcast("state", one) for name, one in tensors.items()}
        return SolverState.from_tensors(state.index, tensors)

    def velocity(run: Run, conditioning: TextToVideo) -> Velocity:
        parts.compile(run.recipe.runtime.get("compile"))
        how = run.request, run.state.index, runtime.cfg_batch
        velocity = partial(make_velocity, parts, *how, conditioning=conditioning)
        if ctx is None:
            return velocity()
        from wanflow.parallel.cfg import split_guidance
        from wanflow.parallel.sequence import sharded

        return velocity(sharded(ctx), split_guidance(ctx))

    def agree(stop: bool) -> bool:
        return stop if ctx is None else bool(ctx.from_rank0(int(stop)))

    condition, decode = partial(encode_pictures, parts), partial(decode_frames, parts)
    engine = Engine(spec, parts.device, record, check, share, condition, velocity, decode, agree)
    engine = in_less_memory(engine, parts)
    return on_free_threads(engine) if ctx is None and parts.device.type == "cpu" else engine


def compiles(parts: LoadedParts, request: CompleteRequest) -> bool:
    """Return whether the blocks run compiled for a video: where that is asked for, or pays."""
    asked, ctx, spec = parts.runtime.compile, parts.ctx, parts.spec
    if asked != "auto":
        return asked == "on"
    tokens = geometry_of(spec).tokens(request.size, request.frame_num)
    passes = sum(1 + step.guided for step in timeline(request, spec))
    processes = 1 if ctx is None else ctx.layout.size
    saved = compiling_saves(spec.dit, tokens, passes, processes, parts.device.type == "cuda")
    if saved < WORTH_A_LOOK:
        return False
    pays = parts.compiler.pays(saved)
    return pays if ctx is None else bool(ctx.from_rank0(int(pays)))


def encode_pictures(parts: LoadedParts, run: Run) -> TextToVideo:
    """Return what is denoised in a run; reads the VAE where it has pictures."""
    spec, request = parts.spec, run.request
    if not run.pictures:
        return conditioning_of(spec, request)
    clip = clip_parts(spec, request, run.pictures)
    encoded = parts.encode(clip, encoded_shape(spec, request))
    return conditioning_of(spec, request, encoded)


def decode_frames(parts: LoadedParts, latent: Tensor, on_part: OnPart | None) -> Iterator[Frames]:
    """Decode on all ranks, in tiles, or in full frames."""
    vae, tile = parts.vae(), parts.runtime.vae_tile
    if parts.ctx is not None:
        from wanflow.parallel import vae_parallel

        return vae_parallel.decode_frames(vae, latent, parts.ctx, to_frames, on_part)
    if tile:
        from wanflow.transforms import vae_tiling

        return vae_tiling.decode_frames(vae, latent, tile, to_frames, on_part)
    return frame_by_frame(vae, latent, on_part)


def in_less_memory(engine: Engine, parts: LoadedParts) -> Engine:
    """Return an engine that tries again, in smaller pieces, what memory did not suffice for.

    Memory is freed between two tries, after the error with the tensors in its traceback is gone.
    The thread that calls takes the device: it need not be the one that loaded the model.
    """

    def take_device() -> None:
        if parts.device.type == "cuda":
            torch.cuda.set_device(parts.device)

    def condition(run: Run) -> TextToVideo:
        take_device()
        return _beside_experts_or_alone(engine, parts, run)

    def velocity(run: Run, conditioning: TextToVideo) -> Velocity:
        steps, tokens = timeline(run.request, parts.spec), parts.own_tokens(run.request)
        take_device()
        try:
            once = engine.velocity(run, conditioning)  # which encodes the prompts
        except Exception as error:
            parts.next_try(error, "prompts", 0)
            raise

        def velocity(x: Tensor, step: Step) -> Tensor:
            while True:
                try:
                    return once(x, step)
                except Exception as error:
                    read = parts.holds(steps[step.index].expert)
                    smaller = parts.next_try(error, "step" if read else "expert", tokens)
                    if not smaller:
                        raise
                parts.adapt(**smaller)

        return velocity

    def decode(latent: Tensor, on_part: OnPart | None) -> Iterator[Frames]:
        take_device()
        done = 0  # parts that are given out; their places in the video are the same in tiles
        while True:
            try:
                for piece in islice(_some_at_first(engine.decode(latent, on_part)), done, None):
                    done += 1
                    yield piece
                return
            except Exception as error:
                side = max(latent.shape[-2:]) * parts.spec.vae.spatial_stride
                smaller = parts.next_try(error, "decode", side)
                if not smaller:
                    raise
            parts.adapt(**smaller)

    def used(run: Run) -> Run:
        if not parts.adapted:
            return run
        return replace(run, recipe=replace(run.recipe, runtime=run.recipe.runtime | parts.adapted))

    return replace(engine, condition=condition, velocity=velocity, decode=decode, used=used)


def _beside_experts_or_alone(engine: Engine, parts: LoadedParts, run: Run) -> TextToVideo:
    """Encode the pictures of a run; where memory runs out beside the experts, without them."""
    while True:
        try:
            return engine.condition(run)
        except Exception as error:
            if not parts.makes_room(error):
                parts.next_try(error, "picture", 0)
                raise
        parts.close()


def _some_at_first(pieces: Iterator[Frames]) -> Iterator[Frames]:
    """Give out nothing before the third part: by then a decode takes the most memory.

    So a video is of one kind, although a decode that runs out of memory begins again.
    """
    yield from list(islice(pieces, 3))
    yield from pieces


def model_record(checkpoint: Checkpoint) -> ModelRecord:
    """Return what a recipe records of a checkpoint; reads samples of its files."""
    given = {part: str(path) for part, path in checkpoint.given.items()}
    return ModelRecord(checkpoint.spec.name, str(checkpoint.folder), fingerprint(checkpoint), given)


def versions() -> dict[str, str]:
    """Return what a recipe records of the software."""
    return {
        "wanflow": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def layout_of(runtime: Runtime) -> Layout:
    """Return how ranks share a forward; what a runtime leaves open counts as one."""
    from wanflow.parallel.groups import Layout

    return Layout(
        2 if runtime.cfg_parallel else 1, runtime.ring_size or 1, runtime.ulysses_size or 1
    )


def refuse_together(runtime: Runtime, layers: int, processes: int) -> None:
    """Raise RequestError for settings that exclude each other on this number of processes."""
    if processes == 1:
        if runtime.dit_fsdp:
            raise RequestError(
                "dit_fsdp shards the weights over several processes, and there is one; start more"
                " with --gpus 0,1 or torchrun, or leave out --dit_fsdp"
            )
        return
    if runtime.vae_tile:
        raise RequestError(
            f"vae_tile {runtime.vae_tile}: several processes decode in strips, which take less"
            " memory than tiles; leave out --vae_tile"
        )
    if runtime.dit_fsdp:
        if runtime.resident_blocks not in (None, layers):
            raise RequestError(
                f"dit_fsdp and resident_blocks {runtime.resident_blocks}: blocks are sharded or"
                " streamed, not both; leave out --dit_fsdp or --resident_blocks"
            )
        if runtime.prefetch:
            raise RequestError(
                "dit_fsdp and prefetch: sharded experts are not prefetched; leave out --prefetch"
                " (--offload_model False keeps both experts loaded)"
            )


def weights_in_float32(checkpoint: Checkpoint) -> int:
    """Return the bytes of all weights in float32."""
    return 4 * sum(checkpoint.parameters(part) for part in weights_of(checkpoint.spec))


def is_tiny(
    checkpoint: Checkpoint, runtime: Runtime, request: Request | CompleteRequest | None = None
) -> bool:
    """Return whether a run takes less than `TINY`, by a bound that needs no trace."""
    return at_most(checkpoint, runtime, request) <= TINY


def at_most(
    checkpoint: Checkpoint, runtime: Runtime, request: Request | CompleteRequest | None = None
) -> int:
    """Return more bytes than a run takes.

    A test holds it to the trace: bytes of a decode or an encode for each pixel, of a step for each
    token, and of the finished frames. Plain attention adds matrices of scores.
    """
    spec = checkpoint.spec
    geometry = geometry_of(spec)
    size = parse_size((request and request.size) or spec.size, geometry)
    frames = (request and request.frame_num) or spec.frame_num
    pixels, tokens = size[0] * size[1], geometry.tokens(size, frames)
    decoding, step = (
        160 * spec.vae.dec_dim * pixels,
        32 * (spec.dit.dim + spec.dit.ffn_dim) * tokens,
    )
    scores = 32 * spec.dit.num_heads * tokens**2 if runtime.attention == "math" else 0
    taken = weights_in_float32(checkpoint) + decoding + step + scores
    return taken + 6 * frames * pixels


def _refuse(runtime: Runtime, layers: int) -> None:
    """Raise RequestError for what this machine or this model cannot do."""
    if runtime.noise_device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "noise_device cuda: this machine has no CUDA GPU; use --noise_device cpu"
        )
    if runtime.resident_blocks is not None and runtime.resident_blocks > layers:
        raise RequestError(
            f"resident_blocks must be at most {layers}, the blocks of an expert"
            f" (got {runtime.resident_blocks})"
        )
    if runtime.vae_tile:
        from wanflow.transforms.vae_tiling import check_tile

        check_tile(runtime.vae_tile)
