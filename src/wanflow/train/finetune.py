"""Fine-tune on a folder of captioned clips: a LoRA for each expert, or new experts.

Clips and captions are encoded once. Then each expert is trained on its own range of sigma, with
rectified flow's objective; one expert is in memory at a time. A killed training resumes with the
same result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanflow.checkpoint.checkpoint import Checkpoint, fingerprint
from wanflow.checkpoint.load import (
    expert_bytes,
    load_expert,
    load_text_encoder,
    load_tokenizer,
    load_vae,
)
from wanflow.choices import choose_text_dtype, is_small
from wanflow.config import RequestError
from wanflow.convert.convert import convert, open_model, refuse_taken
from wanflow.convert.formats import options
from wanflow.convert.targets import plan
from wanflow.files import atomic_path
from wanflow.geometry import geometry_of
from wanflow.media import check_target
from wanflow.models.dit import Attention, WanDiT
from wanflow.outputs import Claims, bytes_of, refuse_without_room
from wanflow.parallel.fsdp import gather, shard
from wanflow.parallel.ranks import (
    DistInfo,
    broadcast_from_rank0,
    join_group,
    leave_group,
    rank_and_world_size,
)
from wanflow.presets import ONLY, Expert, title
from wanflow.runtime import dtype_name
from wanflow.screen import Screen
from wanflow.train.clips import Clip, Sample, find_clips, prepare
from wanflow.train.experts import plain_attention, sigma_range
from wanflow.train.loop import Train, fit
from wanflow.train.objective import Objective
from wanflow.train.saving import is_whole, write_tensors
from wanflow.train.stopping import Stop
from wanflow.train.tuning import TARGETS, FineTune
from wanflow.train.views import Views
from wanflow.transforms.deltas import LowRank
from wanflow.transforms.lora import Adapters
from wanflow.units import file_size

NAME = "finetune"  # of the trained adapter
FEW_TOKENS = 256  # up to here two matmuls train faster on a CPU than fused attention
FILES: dict[Expert, str] = {
    "high": "high_noise_lora.safetensors",
    "low": "low_noise_lora.safetensors",
    ONLY: "lora.safetensors",
}


def finetune(
    checkpoint: Checkpoint, settings: FineTune, screen: Screen, stop: Stop | None = None
) -> list[Path]:
    """Train, and return the files (LoRA) or the folder (full) written.

    Under torchrun with `fsdp` the model in training is sharded over the ranks. Each rank encodes
    its share of the clips; rank 0 saves and writes.

    Raises:
        RequestError: for clips that cannot be used, an output that exists or cannot be written, and
            a work folder in which another training is going on.
        KeyboardInterrupt: when it was stopped; the same call goes on.
    """
    (rank, size), stop = rank_and_world_size(), stop or Stop()
    settings = replace(settings, experts=settings.experts or checkpoint.spec.expert_names)
    with Claims() as claims:
        if rank == 0:
            check_outputs(checkpoint, settings)
            into = settings.method == "lora" and os.path.isdir(settings.out)  # next to other files
            for path in (*(_outputs(settings) if into else [settings.out]), settings.work):
                claims.take(path)
        replaced = {path for path in _outputs(settings) if os.path.lexists(path)}
        clips = find_clips(settings.data)
        width, height = settings.form.size
        frames = f"{settings.form.frame_num} frames of {width}*{height}"
        screen.say(f"{len(clips)} clips, {frames} each")
        screen.say(f"encoded clips and the state of the training are in {settings.work}")
        if settings.form.frame_num == 1 and Views(checkpoint.spec, settings.form).share:
            screen.say(
                f"clips of one frame are also the picture that {checkpoint.spec.name} is given, so"
                " it learns little from them: give clips, and a larger --frame_num"
            )
        _refuse_processes(settings, size)
        trained = _trained(checkpoint, settings, clips, screen, stop)
        written = _write(checkpoint, settings, trained, replaced, screen, claims)
        screen.say(
            f"{settings.work} ({file_size(bytes_of(settings.work))}) is needed no longer, unless"
            " you train on these clips again"
        )
        return written


def _trained(
    checkpoint: Checkpoint, settings: FineTune, clips: list[Clip], screen: Screen, stop: Stop
) -> dict[Expert, Path]:
    """Encode the clips, and return the file of each trained expert in the work folder."""
    rank, size = rank_and_world_size()
    info = join_group(torch.device(settings.device)) if size > 1 else None
    try:
        samples, empty = prepare(
            clips,
            settings.form,
            settings.work / "cache",
            fingerprint(checkpoint),
            lambda: _clip_encoder(checkpoint, settings),
            lambda: _text_encoder(checkpoint, settings),
            screen,
            (rank, size),
        )
        if info is not None:
            broadcast_from_rank0(info, lambda: None)  # until every rank has encoded its share
        return {
            which: _train(checkpoint, which, settings, samples, empty, screen, info, stop)
            for which in settings.experts
        }
    finally:
        leave_group()


def _write(
    checkpoint: Checkpoint,
    settings: FineTune,
    trained: dict[Expert, Path],
    replaced: set[Path],
    screen: Screen,
    claims: Claims,
) -> list[Path]:
    """Copy the LoRAs to their place, or write the model, on rank 0; return what there is then."""
    rank, _ = rank_and_world_size()
    if settings.method == "lora":
        files = [settings.out / FILES[which] for which in trained]
        for source, file in zip(trained.values(), files, strict=True):
            if rank == 0:  # a copy: a training of one expert can still go on with the other
                try:
                    with atomic_path(file, overwrite=file in replaced) as part:
                        shutil.copyfile(source, part)
                except FileExistsError:
                    raise RequestError(
                        f"{file} appeared meanwhile and is kept; the LoRA is {source}"
                    ) from None
            screen.say(f"wrote {file}")
        return files
    if rank == 0:
        screen.say(f"writing {settings.out}")
        model = open_model(checkpoint.folder, dict(trained.items()))
        target = options("official", dtype_name(settings.dtype), overwrite=settings.out in replaced)
        claims.give_back(settings.out)  # the conversion claims it
        convert(model, settings.out, target, screen.say, screen.count_bytes("converting"))
    return [settings.out]


def _outputs(settings: FineTune) -> list[Path]:
    if settings.method == "full":
        return [settings.out]
    return [settings.out / FILES[which] for which in settings.experts]


def check_outputs(checkpoint: Checkpoint, settings: FineTune) -> None:
    """Refuse an output or a work folder that exists or cannot be written, before the training.

    Raises:
        RequestError: naming it.
    """
    out, work = settings.out, settings.work
    for flag, folder in (("out", out), ("work_dir", work)):
        if os.path.lexists(folder) and not folder.is_dir():
            raise RequestError(f"--{flag} {folder} is no folder; name another place")
    if settings.method == "full":
        refuse_taken(checkpoint, out, settings.overwrite)
        target = options("official", dtype_name(settings.dtype))
        refuse_without_room(out, plan(checkpoint, target, out.name).nbytes, "the model")
        real, other = out.resolve(), work.resolve()
        if real == other or real in other.parents or other in real.parents:
            raise RequestError(f"--out {out} and --work_dir {work} overlap; name another --out")
        check_target(
            out.with_name(f"{out.name}.json"), overwrite=True
        )  # room for a name next to it
        return
    for path in _outputs(settings):
        if os.path.lexists(path) and not settings.overwrite:
            raise RequestError(f"{path} exists; name another --out, or give --overwrite")
        if os.path.isdir(out):
            check_target(path, overwrite=True)


def _refuse_processes(settings: FineTune, size: int) -> None:
    if size > 1 and not settings.fsdp:
        raise RequestError(
            f"{size} processes would all train the same; add --fsdp to shard the model over them,"
            " or leave out torchrun"
        )
    if size == 1 and settings.fsdp:
        raise RequestError(
            "--fsdp shards the model over several processes; start them with torchrun"
            " --nproc_per_node=N -m wanflow train ... --fsdp"
        )
    if settings.batch % (size * settings.accumulate):
        raise RequestError(
            f"--batch must divide into {size} processes times --grad_accum equal parts (got"
            f" {settings.batch} and {settings.accumulate})"
        )


def _clip_encoder(
    checkpoint: Checkpoint, settings: FineTune
) -> Callable[[Tensor], dict[str, Tensor]]:
    vae = load_vae(checkpoint, torch.float32, settings.device)
    views = Views(checkpoint.spec, settings.form)

    @torch.no_grad()
    def encode(clip: Tensor) -> dict[str, Tensor]:
        latents = {"latent": vae.encode(clip.unsqueeze(0).to(settings.device))}
        if views.share:
            parts = (part.to(settings.device) for part in views.parts(clip[:, 0]))
            latents["picture"] = vae.encode_parts(parts)
        return {name: latent[0].float() for name, latent in latents.items()}

    return encode


def _text_encoder(checkpoint: Checkpoint, settings: FineTune) -> Callable[[str], dict[str, Tensor]]:
    small = is_small(expert_bytes(checkpoint, torch.float32))
    dtype = choose_text_dtype(torch.float32, small)
    encoder = load_text_encoder(checkpoint, dtype, settings.device)
    tokenizer = load_tokenizer(checkpoint)

    @torch.no_grad()
    def encode(caption: str) -> dict[str, Tensor]:
        ids, mask = tokenizer([caption])
        states = encoder(ids.to(settings.device), mask.to(settings.device))
        return {"text": states[0, : int(mask.sum())]}

    return encode


# one expert


def _train(
    checkpoint: Checkpoint,
    which: Expert,
    settings: FineTune,
    samples: list[Sample],
    empty: Path,
    screen: Screen,
    info: DistInfo | None,
    stop: Stop,
) -> Path:
    """Train one expert and return its file in the work folder, unless this training wrote it."""
    state = settings.work / f"{which}-{_name(checkpoint, settings, samples)}.pt"
    file = state.with_suffix(".safetensors")
    if is_whole(file):
        screen.say(f"{title(which)}: trained already ({file})")
        return file
    stop.here()
    screen.say(f"{title(which)}: begins")
    full, spec = settings.method == "full", checkpoint.spec
    dtype = torch.float32 if full or settings.dtype == torch.float32 else torch.bfloat16
    # A model to shard goes to the GPU block by block: no GPU holds all of it.
    model = load_expert(checkpoint, which, dtype, settings.device if info is None else "cpu")
    tokens = geometry_of(spec).tokens(settings.form.size, settings.form.frame_num)
    if tokens <= FEW_TOKENS and settings.device == "cpu":
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = plain_attention
    adapters = None if full else attach(model, settings)
    if full:
        model.requires_grad_(True)
    if info is not None:
        settings = replace(settings, device=str(info.device))
        shard(model, info)
    share = (0, 1) if info is None else (info.rank, info.world_size)
    views, sigma = Views(spec, settings.form), sigma_range(spec, which)
    objective = Objective(model, samples, empty, sigma, settings, views, share)
    training = Train(
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        warmup=min(50, max(1, settings.steps // 10)),
        decay=0.3,
        ema=0.99,
        weight_decay=0.01,
        seed=settings.seed,
        save_seconds=settings.save_seconds,
        dtype=settings.dtype,
    )
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    if not state.exists() and (info is None or info.rank == 0):
        # Parameters, average and two moments in float32; the old state until the new is whole.
        refuse_without_room(state, 2 * trained * 4 * 4, "the state of the training")
    fit(model, objective, training, state, screen, info, stop)
    if adapters is None:
        about = {}
        named = {name: value.detach() for name, value in model.named_parameters()}
        tensors = gather({name: value.to(settings.dtype) for name, value in named.items()})
    else:
        about = _about(checkpoint, which, settings)
        tensors = gather(lora_tensors(adapters, settings.alpha))
    if tensors is not None:
        write_tensors(file, tensors, about)
    stop.here()
    return file


def _name(checkpoint: Checkpoint, settings: FineTune, samples: list[Sample]) -> str:
    """Return a name for the saved state, the same for every training with the same result."""
    same = replace(
        settings,
        save_seconds=0,
        out=Path(),
        work=Path(),
        data=Path(),
        checkpointing=False,
        accumulate=1,
        device="cpu",
        fsdp=False,
    )
    files = [(sample.latent_file.name, sample.text_file.name) for sample in samples]
    about = f"{same} {fingerprint(checkpoint)} {files}"
    return hashlib.sha256(about.encode()).hexdigest()[:12]


def attach(model: WanDiT, settings: FineTune) -> Adapters:
    """Add a LoRA to every target of every block; its second matrix starts at zero."""
    generator = torch.Generator().manual_seed(settings.seed)
    changes = {}
    for number in range(model.config.num_layers):
        for target in settings.targets:
            for leaf in TARGETS[target]:
                layer = cast(Any, model.get_submodule(f"blocks.{number}.{leaf}"))
                noise = torch.randn(settings.rank, layer.in_features, generator=generator)
                up, down = torch.zeros(layer.out_features, settings.rank), noise
                change = LowRank(up, down * layer.in_features**-0.5)
                changes[f"blocks.{number}.{leaf}.weight"] = change
    adapters = Adapters(model)
    adapters.attach(NAME, changes, settings.alpha / settings.rank)
    for slot in adapters.slots(NAME).values():
        # float32: updates are far smaller than bfloat16 can add
        slot.up, slot.down = (
            nn.Parameter(value.detach().float()) for value in (slot.up, slot.down)
        )
    return adapters


def lora_tensors(adapters: Adapters, alpha: float) -> dict[str, Tensor]:
    """Return the trained LoRA under the names that most programs read.

    `diffusion_model.<module>.lora_A.weight`, `.lora_B.weight`, `.alpha`.
    """
    tensors: dict[str, Tensor] = {}
    for name, slot in adapters.slots(NAME).items():
        path = f"diffusion_model.{name.removesuffix('.weight')}"
        tensors[f"{path}.lora_A.weight"] = slot.down.detach().float()
        tensors[f"{path}.lora_B.weight"] = slot.up.detach().float()
        tensors[f"{path}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _about(checkpoint: Checkpoint, which: Expert, settings: FineTune) -> dict[str, str]:
    about = {
        "model": checkpoint.spec.name,
        "expert": which,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "steps": settings.steps,
        "batch": settings.batch,
        "learning_rate": settings.learning_rate,
    }
    return {"wanflow": json.dumps(about)}
