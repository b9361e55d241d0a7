"""Train `nano-i2v` from `nano`'s experts: a picture of nano's world and a prompt become a clip.

VAE, text encoder and tokenizer stay nano's. The stages are a cache of clips with their pictures,
each expert, a finish of the low-noise one, and export; all resumable. The experts may be trained
side by side.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.infer_config import SHEET
from wanflow.checkpoint.load import load_expert, load_text_encoder, load_tokenizer, load_vae
from wanflow.conditioning import PictureChannels, clip_parts, conditioning_of, prepared
from wanflow.files import atomic_path
from wanflow.models.dit import WanDiT
from wanflow.models.vae import WanVAE
from wanflow.opening import resolve
from wanflow.outputs import bytes_of
from wanflow.presets import NANO_FOLDER, NANO_I2V, NANO_I2V_FOLDER, Expert
from wanflow.request import Request
from wanflow.screen import Screen
from wanflow.train import experts, nano, pictured, stages, toy
from wanflow.train.loop import Train
from wanflow.train.saving import write_tensors
from wanflow.train.stopping import Stop
from wanflow.units import file_size

CLIPS = 6000  # cached for the experts
BATCH = 16  # clips that are encoded at once
TRAIN = Train(
    steps=1620,
    batch=48,
    learning_rate=1e-3,
    muon_rate=1.5e-3,
    ema=0.998,
    decay=0.12,
    dtype=torch.float32,
)
EXPERT: dict[Expert, Train] = {"high": replace(TRAIN, seed=1), "low": replace(TRAIN, seed=2)}
# Then the low-noise expert, which draws what is near the data, learns to copy more exactly.
FINISH = replace(TRAIN, steps=800, learning_rate=6e-4, muon_rate=9e-4, decay=0.7, seed=3)
GIVEN = 5  # weight that squared errors of given frames have in it
FINISHED = "finish"
FLAGS = "--nano --i2v"


def train(
    work: Path,
    out: Path,
    scale: float,
    only: str | None,
    screen: Screen,
    overwrite: bool = False,
    stop: Stop | None = None,
) -> None:
    """Run all stages, or one; `nano.train` says what the arguments are."""
    trained = {which: partial(_expert, which) for which in NANO_I2V.expert_names}
    made: dict[str, stages.Stage] = {"cache": _cache, **trained}
    made[FINISHED] = _finish
    made["export"] = lambda work, scale, screen, stop: export(work, out, screen)
    stages.run(made, work, out, scale, only, screen, overwrite, stop)


def _cache(work: Path, scale: float, screen: Screen, stop: Stop) -> None:
    count = max(64, round(CLIPS * scale))
    cache = precompute(resolve("nano"), count, screen, stop)
    write_tensors(work / "cache.safetensors", vars(cache))
    screen.say(f"{count} clips cached")


@torch.no_grad()
def precompute(checkpoint: Checkpoint, count: int, screen: Screen, stop: Stop) -> experts.Cache:
    """Render, caption and encode clips that training may see; clip n depends on n alone."""
    vae = load_vae(checkpoint, torch.float32, "cpu")
    encoder = load_text_encoder(checkpoint, torch.float32, "cpu")
    tokenizer = load_tokenizer(checkpoint)
    latents, texts, given = [], [], []
    for start in range(0, count, BATCH):
        stop.here()
        clips, requests, words = [], [], []
        for clip in range(start, min(start + BATCH, count)):
            rng = random.Random(f"i2v/clip/{clip}")
            scene = toy.sample_scene(rng)
            clips.append(pictured.render(scene, rng, NANO_I2V.frame_num, NANO_I2V.size[0]))
            words += pictured.captions(scene, rng)
            ends = rng.choices(list(pictured.ENDS), pictured.SHARES)[0]
            requests.append(pictured.pictures_of(clips[-1], ends, rng))
        latents.append(vae.encode(torch.stack(clips), groups=4).bfloat16())
        given.append(_channels(vae, requests).bfloat16())
        states = experts.encode_texts(encoder, tokenizer, words)
        texts.append(states.bfloat16().unflatten(0, (-1, experts.WORDINGS)))
        screen.progress("encoding", min(start + BATCH, count), count, "clip")
    empty = experts.encode_texts(encoder, tokenizer, [""])[0].bfloat16()
    parts = (torch.cat(values).contiguous() for values in (latents, texts, given))
    return experts.Cache(next(parts), next(parts), empty, next(parts))


def _channels(vae: WanVAE, requests: list[pictured.Pictures]) -> Tensor:
    """Return mask and picture channels, as the pipeline makes them, [B, 4 + z, t, h, w]."""
    asked = [Request("any", seed=0, **pictures) for pictures in requests]
    complete = [request.complete(NANO_I2V) for request in asked]
    clips = [
        torch.cat([*clip_parts(NANO_I2V, one, prepared(NANO_I2V, request, one.size))], 2)
        for request, one in zip(asked, complete, strict=True)
    ]
    encoded = vae.encode(torch.cat(clips), groups=4).split(1)
    made = [
        conditioning_of(NANO_I2V, one, latent)
        for one, latent in zip(complete, encoded, strict=True)
    ]
    return torch.cat([cast(PictureChannels, one).y for one in made])


def _expert(which: Expert, work: Path, scale: float, screen: Screen, stop: Stop) -> None:
    narrow = load_expert(resolve("nano"), which, torch.float32, "cpu").state_dict()
    model = widened(WanDiT(NANO_I2V.dit), narrow)
    settings = nano.short(EXPERT[which], scale)
    stages.train_expert(model, NANO_I2V, which, settings, work, screen, stop, FLAGS)


def _finish(work: Path, scale: float, screen: Screen, stop: Stop) -> None:
    model = experts.attend_plainly(WanDiT(NANO_I2V.dit))
    model.load_state_dict(load_file(stages.needs(work / "low.safetensors", "low", FLAGS)))
    settings = nano.short(FINISH, scale)
    how = settings, work, screen, stop, FLAGS, FINISHED, given_weight
    stages.train_expert(model, NANO_I2V, "low", *how)


def given_weight(given: Tensor) -> Tensor:
    """Return the weights [B, 1, t, 1 or h, 1 or w] of errors: `GIVEN` where the mask is set."""
    return 1 + (GIVEN - 1) * given[:, :4].amax(1, keepdim=True)


@torch.no_grad()
def widened(model: WanDiT, narrow: Mapping[str, Tensor]) -> WanDiT:
    """Return a model with the weights of one without pictures, whose channels start at zero."""
    name = "patch_embedding.weight"
    wide = torch.zeros_like(model.get_parameter(name))
    wide[:, : narrow[name].shape[1]] = narrow[name]
    model.load_state_dict({**narrow, name: wide})
    return experts.attend_plainly(model)


def export(work: Path, out: Path, screen: Screen) -> None:
    """Write the experts and what `wanflow.json` says; the rest of the model is nano's own."""
    card = json.loads((NANO_FOLDER / SHEET).read_text())
    card |= {"name": NANO_I2V.name, "task": NANO_I2V.task}
    card["defaults"] = {key: getattr(NANO_I2V, key) for key in nano.DEFAULT_KEYS.split()}
    with atomic_path(out, overwrite=True) as part:
        for which, folder in NANO_I2V.expert_folders:
            name = FINISHED if which == "low" else which
            stages.export_expert(work, name, NANO_I2V.dit, part / folder)
        (part / SHEET).write_text(json.dumps(card, indent=1) + "\n")
    size = file_size(bytes_of(out))
    screen.say(f"exported to {out}: {size} (copy it over {NANO_I2V_FOLDER} to embed it)")
