"""Train `nano` from nothing to a folder in the official layout, and measure what it understands.

Stages, each resumable: text encoder, VAE, cache of latents, each expert, export. The experts do not
depend on each other and may be trained side by side (`--stage high` and `--stage low` in two
processes of one thread each).
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from wanflow.assemble import make_engine
from wanflow.checkpoint.tokenizers import open_tokenizer
from wanflow.convert.configs import as_json, tokenizer_config
from wanflow.files import atomic_path
from wanflow.front import Pipeline
from wanflow.models.dit import WanDiT
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.opening import load, resolve
from wanflow.outputs import bytes_of
from wanflow.presets import NANO, NANO_FOLDER, Expert, ModelSpec
from wanflow.screen import Screen
from wanflow.train import adherence, autoencoder, experts, stages, text, toy
from wanflow.train.keeping import Shown
from wanflow.train.loop import Train, fit
from wanflow.train.saving import write_tensors
from wanflow.train.stopping import Stop
from wanflow.units import file_size

CLIPS = 9000  # cached for the experts
TEXT = Train(steps=1000, batch=64, learning_rate=2e-3, dtype=torch.float32)
VAE = Train(steps=2850, batch=0, learning_rate=2e-3, weight_decay=0.0)
EXPERT: dict[Expert, Train] = {
    "high": Train(
        steps=2600, batch=48, learning_rate=1.5e-3, muon_rate=2e-3, ema=0.998, decay=0.35, seed=1
    ),
    "low": Train(
        steps=4600, batch=48, learning_rate=1.5e-3, muon_rate=2e-3, ema=0.998, decay=0.35, seed=2
    ),
}

# Keys of the defaults in wanflow.json.
DEFAULT_KEYS = (
    "size frame_num fps sample_shift sample_steps cfg_high cfg_low boundary negative_prompt"
    " sample_solver"
)


def train(
    work: Path,
    out: Path,
    scale: float,
    only: str | None,
    screen: Screen,
    overwrite: bool = False,
    stop: Stop | None = None,
) -> None:
    """Run all stages, or one.

    Args:
        work: the folder of every stage's state; a stage is claimed while it runs.
        out: the folder of the model.
        scale: shortens every stage, for a trial.
        only: the stage to run; None runs all.
        screen: shows progress.
        overwrite: replace a model in `out`.
        stop: asks for the end.

    Raises:
        RequestError: for a stage that another training runs, and an `out` that is taken.
    """
    trained = {which: partial(_expert, which) for which in NANO.expert_names}
    made: dict[str, stages.Stage] = {"text": _text, "vae": _vae, "cache": _cache, **trained}
    made["export"] = lambda work, scale, screen, stop: export(work, out, screen)
    stages.run(made, work, out, scale, only, screen, overwrite, stop)


def short(settings: Train, scale: float) -> Train:
    """Return how to train, for a share of the steps."""
    return replace(settings, steps=max(2, round(settings.steps * scale)))


def _tokenizer(work: Path) -> Tokenizer:
    engine = open_tokenizer(stages.needs(work / "tokenizer.json", "text"))
    return Tokenizer(engine, NANO.dit.text_len)


def _text(work: Path, scale: float, screen: Screen, stop: Stop) -> None:
    text.build_tokenizer(work / "tokenizer.json")
    tokenizer = _tokenizer(work)
    tagger = text.Tagger(NANO.text)

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        return tagger.loss(*text.tagged(tokenizer, rng, TEXT.batch))

    fit(tagger, loss, short(TEXT, scale), work / "text.pt", screen, stop=stop)
    stop.here()
    write_tensors(work / "text.safetensors", tagger.encoder.state_dict())
    accuracy = tagger.accuracy(*text.tagged(tokenizer, random.Random(-1), 1000))
    screen.say(f"captions with every word tagged right: {accuracy:.3f}")


def _vae(work: Path, scale: float, screen: Screen, stop: Stop) -> None:
    vae = WanVAE(NANO.vae)
    autoencoder.initialise(vae)
    settings = short(VAE, scale)

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        count, frames, crop = autoencoder.curriculum(step, settings.steps)
        videos, weight = autoencoder.clips(rng, count, frames, NANO.size[0], crop)
        return autoencoder.loss(vae, videos, weight, generator)

    fit(vae, loss, settings, work / "vae.pt", screen, stop=stop)
    stop.here()
    # The log variance is not learned: it is the noise that training added.
    with torch.no_grad():
        half = NANO.vae.z_dim
        vae.conv1.weight[half:].zero_()
        assert vae.conv1.bias is not None
        vae.conv1.bias[half:].fill_(2 * torch.tensor(autoencoder.NOISE).log())
    write_tensors(work / "vae.safetensors", vae.state_dict())
    mean, std = autoencoder.statistics(vae, random.Random(0), NANO.size[0])
    (work / "latent.json").write_text(json.dumps({"latent_mean": mean, "latent_std": std}))
    count = max(2, round(200 * scale))
    scenes = [toy.sample_scene(random.Random(f"vae/{n}"), None) for n in range(count)]
    with torch.no_grad():
        adherence.evaluate(
            lambda _, n: _reconstruct(vae, scenes[n], n), scenes, range(count), screen
        )


def _reconstruct(vae: WanVAE, scene: toy.Scene, seed: int) -> adherence.Frames:
    from wanflow.pipeline import to_uint8

    clip = toy.render(scene, random.Random(seed), NANO.frame_num, NANO.size[0]).unsqueeze(0)
    return to_uint8(vae.decode(vae.encode(clip, 4), 4))


def preset(work: Path) -> ModelSpec:
    """Return NANO with the latent statistics that training measured."""
    statistics = json.loads(stages.needs(work / "latent.json", "vae").read_text())
    return replace(NANO, vae=replace(NANO.vae, **statistics))


def _vae_of(work: Path) -> WanVAE:
    vae = WanVAE(preset(work).vae)
    vae.load_state_dict(load_file(stages.needs(work / "vae.safetensors", "vae")))
    return vae.eval()


def _cache(work: Path, scale: float, screen: Screen, stop: Stop) -> None:
    encoder = UMT5Encoder(NANO.text)
    encoder.load_state_dict(load_file(stages.needs(work / "text.safetensors", "text")))
    count = max(64, round(CLIPS * scale))
    vae, tokenizer, side = _vae_of(work), _tokenizer(work), NANO.size[0]
    cache = experts.precompute(
        vae, encoder.eval(), tokenizer, 0, count, NANO.frame_num, side, screen
    )
    values = {"latents": cache.latents, "texts": cache.texts, "empty": cache.empty}
    write_tensors(work / "cache.safetensors", values)
    screen.say(f"{count} clips cached; latent standard deviation {cache.latents.float().std():.3f}")


def _expert(which: Expert, work: Path, scale: float, screen: Screen, stop: Stop) -> None:
    model = WanDiT(NANO.dit)
    experts.initialise(model)
    stages.train_expert(model, NANO, which, short(EXPERT[which], scale), work, screen, stop)


def export(work: Path, out: Path, screen: Screen) -> None:
    """Write the trained parts as a folder in the official layout, weights in bfloat16.

    An expert still in training is taken from its saved state, with its averaged weights.
    """
    made = preset(work)
    with atomic_path(out, overwrite=True) as part:
        _export(made, work, part)
    size = file_size(bytes_of(out))
    screen.say(f"exported to {out}: {size} (copy it over {NANO_FOLDER} to embed it)")


def _export(made: ModelSpec, work: Path, out: Path) -> None:
    for which, folder in made.expert_folders:
        stages.export_expert(work, which, made.dit, out / folder)
    for source, target in (
        ("text.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("vae.safetensors", "Wan2.1_VAE.pth"),
    ):
        values = load_file(work / source)
        torch.save({k: v.bfloat16().clone() for k, v in values.items()}, out / target)
    (out / "google" / "umt5-xxl").mkdir(parents=True)
    beside = out / "google" / "umt5-xxl"
    shutil.copy(work / "tokenizer.json", beside / "tokenizer.json")
    (beside / "tokenizer_config.json").write_bytes(as_json(tokenizer_config()))
    words = [part for word in (*toy.vocabulary(), *text.FILLERS) for part in word.split("-")]
    card = {
        "name": made.name,
        "dit": {"text_dim": made.dit.text_dim},
        "text": asdict(made.text),
        "vae": asdict(made.vae),
        "defaults": {key: getattr(made, key) for key in DEFAULT_KEYS.split()},
        "vocabulary": sorted({word for word in words if word}),
    }
    (out / "wanflow.json").write_text(json.dumps(card, indent=1) + "\n")


def evaluate(
    model: str,
    prompts: int,
    roles: str,
    seen: bool,
    wording: bool,
    screen: Screen,
    ends: str = "first",
    hidden: bool = False,
) -> str:
    """Measure prompt adherence of a model on scenes that training never saw, as a line of JSON.

    A model that takes pictures gets those of the scene, and its clips are compared with them.

    Args:
        roles: "both"; "swapped": the experts in each other's place; or the one for all steps.
        seen: measure on scenes that training saw instead.
        wording: use free wordings instead of the plain form.
        ends: the pictures that are given: "first", "last" or "both".
        hidden: give first pictures that say nothing of the motion.
    """
    resolve(model)
    pipe = load(model, keep_experts=True)
    names = pipe.parts.spec.expert_names
    cast = {"both": names, "swapped": names[::-1]}.get(roles, (roles,) * len(names))
    recast: Any = _Recast(pipe.parts, dict(zip(names, cast, strict=True)))
    pipe = Pipeline(make_engine(recast), recast)
    scenes = [
        toy.sample_scene(random.Random(f"evaluate/{n}"), unseen=not seen) for n in range(prompts)
    ]
    shown = Shown(pipe.parts.spec, scenes, ends, hidden)
    takes = pipe.parts.spec.conditioning == "channels"

    def generate(prompt: str, seed: int) -> adherence.Frames:
        if not takes:
            return pipe.generate(prompt, seed=seed).frames
        return shown.measure(seed, pipe.generate(prompt, seed=seed, **shown.pictures(seed)).frames)

    tally = adherence.evaluate(
        generate, scenes, range(prompts), screen, random.Random("wording") if wording else None
    )
    about: dict[str, Any] = {
        "model": str(model),
        "prompts": prompts,
        "experts": roles,
        "seen": seen,
        "wording": "free" if wording else "plain",
    }
    if takes:
        about |= {"pictures": ends, "hidden": hidden, "kept": shown.as_dict()}
    return json.dumps({**about, **tally.as_dict()})


class _Recast:
    """Loaded parts whose experts play other roles."""

    def __init__(self, parts: Any, roles: dict[Expert, Expert]) -> None:
        self._parts, self._roles = parts, roles

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parts, name)

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT:
        model: WanDiT = self._parts.expert(self._roles[which], strengths)
        return model
