#!/usr/bin/env python3
"""Damaged files for every container that wanflow reads, opened in a process of their own as users
open them.

A seed names one damaged file for good. Whatever is done with it may succeed, or end in a
RequestError of one line that names the file; nothing else, not a crash of the interpreter, more
than `SECONDS`, `MEMORY` bytes, or code that a file carries.

    python fuzz.py CONTAINER [FIRST [COUNT]]      # what comes of each seed
    python fuzz.py CONTAINER SEED 1 --keep FOLDER # and leave the damaged files in FOLDER
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import faulthandler
import io
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer as Engine
from tokenizers import normalizers, pre_tokenizers
from tokenizers.models import Unigram
from torch import Tensor, nn

if __name__ == "__main__":  # a worker, which is started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.common import official_config
from helpers.mutations import (
    Damage,
    field,
    of_bytes,
    of_embedded,
    of_gguf,
    of_json,
    of_metadata,
    of_safetensors,
    of_sentencepiece,
    of_zip,
)
from helpers.scaled_forms import FORMS, written
from helpers.tiny import tiny_family
from wanflow.checkpoint.checkpoint import open_checkpoint
from wanflow.checkpoint.key_maps import from_official
from wanflow.checkpoint.load import load_expert, load_text_encoder, load_tokenizer, load_vae
from wanflow.checkpoint.source import open_source
from wanflow.checkpoint.tokenizers import open_tokenizer
from wanflow.checkpoint.values import BadValuesError, check_values
from wanflow.cli import command_parser
from wanflow.cli import inspect as command
from wanflow.cli.output import Output
from wanflow.config import DiTConfig, RequestError, TextConfig, VAEConfig
from wanflow.lora.reader import read_adapter
from wanflow.models.dit import WanDiT
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.pipeline import Run
from wanflow.presets import T2V_A14B
from wanflow.recipe import ModelRecord, Recipe
from wanflow.request import Request
from wanflow.sampling.solvers import SolverState
from wanflow.transforms.deltas import changed

SECONDS, MEMORY = 5.0, 300 << 20
SELDOM = 7
LONGEST = 4000  # characters of an error

DIT = DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=1, text_dim=32, text_len=8, freq_dim=32)
TEXT = TextConfig(
    vocab=32, dim=32, dim_attn=32, dim_ffn=32, num_heads=2, num_layers=1, num_buckets=8, max_dist=16
)
VAE = VAEConfig(dim=4, dim_mult=(1, 1), num_res_blocks=1, temperal_downsample=(False,))
SHAPES = {name: tuple(value.shape) for name, value in WanDiT(DIT).named_parameters()}
WORDS = ["<pad>", "</s>", "<unk>", "▁red", "▁circle", "<mark>", "a"]
TYPES = [3, 3, 2, 1, 1, 4, 1]  # control, control, unknown, normal, normal, user-defined, normal
# sentencepiece's own, for the rules A -> a, fullwidth A -> a, no-break space -> space, soft hyphen
# -> nothing.
CHARSMAP = zlib.decompress(
    base64.b85decode(
        "c-ke?Wy}yn7y#fC_(2cpln!ZWq(d4(y1N9WrQ?GspwbP}sl@0;K|ngCM7lvbr0e<MwrB6Xx4XT&3ekf0Q79EBgs34z%t{rRg$RQYn<Jux*@;4kA&E{bVq$8D&C(np#1%"
        "g#9tnt#B_Sb6NK7)4l7i$Y5mJ(xPe@A|(vyyiWFRw{_>?SUBP+^=?BpURpOKrq<RL%#C`bVcQ-~sbPBDs7g5s2-BxNYg7nG$u<)}ynDpQH7RG}JQ@)gyoNeyaKi@MaI"
        "KJ{ow0~*tarZk~B&1gvrTGNWQwBc*o(Si1S%QtkQBVFiBH@fm2-RVgWdee)(^r1if7{~wyg%20L?fVc0i$9<nhBAa78OG22#0Z8nijj<AG~*b{1jaLoiA-TKzc7{QOk*"
        "Z9n9VHaGKcxhV<8LpjbB;JqR4m05|(k#L9Y;(vx=3hVKwVm%Ldl7iH-cuX14GLf3lVBk!QeP>|hr=*~4!3v6lnv=MV=u!eNf`H^(`~NltKze>ly*oaGGXImbmVaG6V7<q"
        "Fri#!YT;i~qR8?Z~}zmj~SE5fAyF$2{c;&w0j6UhtY%yyZ=J|M{AScku;=kp"
    )
)
INDEX, SHARDS = (
    "model.safetensors.index.json",
    ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
)
State = dict[str, Tensor]


# good files


def states() -> dict[str, State]:
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"dit": WanDiT(DIT), "t5": UMT5Encoder(TEXT), "vae": WanVAE(VAE)}
    return {
        kind: {name: torch.randn_like(value) * 0.2 for name, value in model.named_parameters()}
        for kind, model in models.items()
    }


def sentencepiece() -> bytes:
    pieces = [
        field(1, field(1, word.encode()) + field(2, -float(n)) + field(3, kind))
        for n, (word, kind) in enumerate(zip(WORDS, TYPES, strict=True))
    ]
    return (
        b"".join(pieces)
        + field(2, field(3, 1))
        + field(3, field(1, b"own") + field(2, CHARSMAP) + field(3, 1) + field(4, 1))
    )


def write_gguf(path: Path, state: State, arch: str, tokens: bool = False) -> None:
    writer = gguf.GGUFWriter(path, arch)
    if tokens:
        writer.add_tokenizer_model("t5")
        writer.add_token_list(WORDS)
        writer.add_token_scores([-float(n) for n in range(len(WORDS))])
        writer.add_token_types(TYPES)
        writer.add_precompiled_charsmap(CHARSMAP)
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(True)
    kinds = [gguf.GGMLQuantizationType[kind] for kind in ("Q8_0", "Q4_0", "F16", "Q5_1", "BF16")]
    for number, (name, value) in enumerate(state.items()):
        kind, data = gguf.GGMLQuantizationType.F32, value.numpy()
        if value.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(side) for side in value.shape])
            data = data.reshape(value.shape[0], -1)
        elif value.ndim == 2 and value.shape[1] % 32 == 0:
            kind = kinds[number % len(kinds)]
        writer.add_tensor(
            name, np.ascontiguousarray(gguf.quants.quantize(data, kind)), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fp8(state: State, new: bool, header: bool = False) -> tuple[State, dict[str, str]]:
    tensors: State = {name: value.half() for name, value in state.items()}
    layers = {}
    for name, value in state.items():
        if value.ndim != 2 or "embedding.weight" in name:
            continue
        layer, scale = name.removesuffix(".weight"), value.abs().amax(1, keepdim=True) / 448
        tensors[name] = (value / scale).to(torch.float8_e4m3fn)
        tensors[layer + (".weight_scale" if new else ".scale_weight")] = scale
        layers[layer] = {"format": "float8_e4m3fn"}
        if not new:
            tensors[f"{layer}.scale_input"] = torch.tensor(1.0)
        elif not header:
            tensors[f"{layer}.comfy_quant"] = torch.tensor(
                list(json.dumps(layers[layer]).encode()), dtype=torch.uint8
            )
    if not new:
        tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return tensors, (
        {"_quantization_metadata": json.dumps({"layers": layers})} if header else {"format": "pt"}
    )


def mixed(state: State) -> State:
    """A weight in each form in turn."""
    tensors: State = {}
    for number, (name, value) in enumerate(state.items()):
        plain = value.ndim != 2 or not name.endswith(".weight")
        form = list(FORMS)[number % len(FORMS)]
        tensors |= {name: value} if plain else written(form, name.removesuffix(".weight"), value)[0]
    return tensors


def loras(folder: Path) -> list[str]:
    """A file of each kind of naming and adapter; PEFT's with its configuration."""
    modules = ("blocks.0.self_attn.q", "blocks.0.ffn.2", "head.head", "text_embedding.0")
    files = []

    def add(name: str, tensors: State, metadata: dict[str, str] | None = None) -> None:
        (folder / name).write_bytes(
            safetensors.torch.save(
                {key: value.contiguous() for key, value in tensors.items()}, metadata
            )
        )
        files.append(name)

    def pair(stem: str, ends: tuple[str, str], alpha: str = "") -> State:
        tensors: State = {}
        for module in modules:
            out, inner = SHAPES[f"{module}.weight"]
            other = from_official("dit", "diffusers", [f"{module}.weight"])[
                f"{module}.weight"
            ].removesuffix(".weight")
            start = stem.format(o=module, d=other, o_=module.replace(".", "_"))
            tensors |= {
                start + ends[0]: torch.randn(4, inner),
                start + ends[1]: torch.randn(out, 4),
            }
            if alpha:
                tensors[start + alpha] = torch.tensor(2.0)
        return tensors

    ab, down_up = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
    add("comfy.safetensors", pair("diffusion_model.{o}.", ab))
    add(
        "kohya.safetensors",
        pair("lora_unet_{o_}.", down_up, "alpha"),
        {"ss_network_alpha": "2", "ss_tag": json.dumps({"a": 1})},
    )
    add(
        "pair.safetensors",
        pair("transformer.{d}.", ab) | pair("transformer_2.{d}.", ab),
        {
            "lora_adapter_metadata": json.dumps(
                {f"transformer{n}.{key}": value for n in ("", "_2") for key, value in PEFT.items()}
            )
        },
    )
    out, inner = SHAPES["blocks.0.ffn.0.weight"]
    stem, q = "diffusion_model.blocks.0.ffn.0", "diffusion_model.blocks.0.self_attn.q"
    w = {
        f"{stem}.hada_w{n}_{x}": torch.randn(*((out, 4) if x == "a" else (4, inner)))
        for n in (1, 2)
        for x in "ab"
    }
    k = {
        f"{q}.lokr_w1": torch.randn(4, 4),
        f"{q}.lokr_w2_a": torch.randn(8, 2),
        f"{q}.lokr_w2_b": torch.randn(2, 8),
        f"{q}.alpha": torch.ones(()),
    }
    d = {
        "diffusion_model.head.head.lora_A.weight": torch.randn(2, 32),
        "diffusion_model.head.head.lora_B.weight": torch.randn(64, 2),
        "diffusion_model.head.head.dora_scale": torch.ones(64, 1),
    }
    more = {
        "diffusion_model.blocks.0.norm3.diff": torch.randn(32),
        "diffusion_model.blocks.0.diff_m": torch.randn(1, 6, 32),
        "diffusion_model.blocks.0.self_attn.k.diff_b": torch.randn(32),
        "diffusion_model.patch_embedding.set_weight": torch.randn(32, 16, 1, 2, 2),
    }
    add("lycoris.safetensors", w | k | d | more)
    torch.save(pair("base_model.model.{o}.", ab), folder / "adapter_model.bin")
    return [*files, "adapter_model.bin"]


PEFT = {
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "alpha_pattern": {"blocks.0.self_attn.q": 3},
    "rank_pattern": {},
    "target_modules": ["q"],
}


# what users reach


def read_all(path: Path) -> None:
    source = open_source(path)
    for name in source.tensors:
        source.read(name, torch.bfloat16 if len(name) % 2 else None)


def look(path: Path) -> None:
    """`wanflow inspect`, in both its forms, as it prints them."""
    for argv in (["inspect", str(path)], ["inspect", str(path), "--json"]):
        output, args = Output.of(argv), command_parser("inspect").parse_args(argv[1:])
        output.take(args)
        args.output = output
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stdout(out):
            command.inspect(args)
            output.conclude()
        out.flush()


def values(path: Path) -> None:
    for finding in check_values(path):
        judge_text(f"{finding.path}: {finding.tensor} {finding.what}")


def checkpoint(root: Path, given: dict[Any, Path], load: bool = True) -> None:
    """Open a model, and load of it what was given."""
    found = open_checkpoint(root, given)
    if not load:
        return
    loaders: dict[str, Callable[..., Any]] = {
        "high": lambda c, *a: load_expert(c, "high", *a),
        "t5": load_text_encoder,
        "vae": load_vae,
    }
    for part in given:
        if part in loaders:
            loaders[part](found, torch.bfloat16, "cpu")
    if "tokenizer" in given:
        load_tokenizer(found)(["red circle"])


def tokenizer(path: Path) -> None:
    Tokenizer(open_tokenizer(path), 8)(["a red\u00a0circle ", "Ａ <mark>"])


def adapter(path: Path) -> None:
    found = read_adapter(path, SHAPES)
    judge_text(found.report())
    for name, change in found.changes["high"].items():
        changed(torch.zeros(SHAPES[name]), change, 0.5)


def saved(path: Path) -> None:
    run = Run.load(path)
    json.dumps(run.recipe.to_json())
    run.finished  # noqa: B018


@dataclass(frozen=True)
class Container:
    """files: to be damaged, one for each seed, and how; reach: what is done then, and `seldom`
    where that takes long, with some seeds; one seed in `every` is tried.
    """

    files: tuple[tuple[str, Damage], ...]
    reach: Callable[[Path, Path], Iterable[Callable[[], object]]]
    seldom: Callable[[Path, Path], Iterable[Callable[[], object]]] = lambda root, file: ()
    every: int = 1


def parts(files: dict[str, tuple[Damage, str]], *more: Callable[[Path], object]) -> Container:
    """Files with one part of a model each: how to damage them, and which part they are."""
    return Container(
        tuple((name, damage) for name, (damage, _) in files.items()),
        lambda root, file: [lambda: read_all(file), *(lambda one=one: one(file) for one in more)],
        lambda root, file: [
            lambda: look(file),
            lambda: values(file),
            lambda: checkpoint(root / "model", {files[file.name][1]: file}),
        ],
    )


def folder(root: Path, file: Path) -> Path:
    """The model's folder that a config is in."""
    return root / file.relative_to(root).parts[0]


MODEL = (
    "wanflow.json",
    "high_noise_model/config.json",
    "high_noise_model/diffusion_pytorch_model.safetensors.index.json",
    "google/umt5-xxl/tokenizer.json",
)
DIFFUSERS = (
    "model_index.json",
    "transformer/config.json",
    "text_encoder/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
ONE = "diffusion_pytorch_model-00001-of-00001.safetensors"
ONE_NETWORK: tuple[tuple[str, Damage], ...] = (  # of the folder of TI2V-5B, whose root holds it
    ("config.json", of_json),
    ("wanflow.json", of_json),
    ("diffusion_pytorch_model.safetensors.index.json", of_json),
    (ONE, of_safetensors),
    ("Wan2.2_VAE.pth", of_zip),
)
LORAS = ("comfy", "kohya", "pair", "lycoris")

CONTAINERS: dict[str, Container] = {
    "safetensors": parts({"high.safetensors": (of_safetensors, "high")}),
    "shards": Container(
        ((f"sharded/{INDEX}", of_json), *((f"sharded/{name}", of_safetensors) for name in SHARDS)),
        lambda root, file: [lambda: read_all(file.parent)],
        lambda root, file: [
            lambda: look(file.parent),
            lambda: values(file.parent),
            lambda: checkpoint(root / "model", {"high": file.parent}),
        ],
    ),
    "torch": parts({"t5.pth": (of_zip, "t5"), "vae.pth": (of_zip, "vae")}),
    "torch by another name": parts({"zip.safetensors": (of_zip, "t5")}),
    "GGUF expert": parts({"high.gguf": (of_gguf, "high")}),
    "GGUF T5": parts({"t5.gguf": (of_gguf, "t5")}, tokenizer),
    "fp8": parts(
        {"old.safetensors": (of_safetensors, "high"), "new.safetensors": (of_safetensors, "high")}
    ),
    "nvfp4, mxfp8, int8": parts({"mixed.safetensors": (of_safetensors, "high")}),
    "quantisation metadata": parts(
        {
            "header.safetensors": (of_metadata, "t5"),
            "new.safetensors": (of_metadata, "high"),
            "noted.safetensors": (of_metadata, "high"),
        }
    ),
    "LoRA": Container(
        (
            *((f"{name}.safetensors", of_safetensors) for name in LORAS),
            ("adapter_model.bin", of_zip),
            ("adapter_config.json", of_json),
        ),
        lambda root, file: [lambda: adapter(root if file.name.startswith("adapter") else file)],
        lambda root, file: [
            lambda: look(root / "adapter_model.bin" if file.suffix == ".json" else file)
        ],
    ),
    "sentencepiece": Container(
        (("spiece.model", of_sentencepiece),),
        lambda root, file: [lambda: tokenizer(file)],
        lambda root, file: [lambda: look(file)],
    ),
    "embedded tokenizer": parts({"embedded.safetensors": (of_embedded, "t5")}, tokenizer),
    "tokenizer.json": Container(
        (("tokenizer.json", of_json),),
        lambda root, file: [lambda: tokenizer(file)],
        lambda root, file: [lambda: look(file)],
    ),
    "configs": Container(
        (
            *((f"model/{name}", of_json) for name in MODEL),
            *((f"diffusers/{name}", of_json) for name in DIFFUSERS),
        ),
        lambda root, file: [
            lambda: checkpoint(
                folder(root, file), {"tokenizer": file} if file.name == "tokenizer.json" else {}
            )
        ],
        lambda root, file: [lambda: look(folder(root, file))],
    ),
    "one network": Container(
        tuple((f"ti2v/{name}", damage) for name, damage in ONE_NETWORK),
        lambda root, file: [lambda: checkpoint(folder(root, file), {})],
        lambda root, file: [
            lambda: look(folder(root, file)),
            lambda: load_vae(open_checkpoint(folder(root, file))),
        ],
        every=4,
    ),
    "saved run": Container(
        (("x.latent.safetensors", of_safetensors),), lambda root, file: [lambda: saved(file)]
    ),
}


def write_good(root: Path) -> None:
    """All files that containers name, below `root`."""
    held = states()
    dit, t5, vae = (held[kind] for kind in ("dit", "t5", "vae"))
    save = safetensors.torch.save
    embedded = {"spiece_model": torch.tensor(list(sentencepiece()), dtype=torch.uint8)}
    sheet = {
        "name": "tiny",
        "dit": {"num_heads": 2, "text_len": 8},
        "text": {"max_dist": 16},
        "vocabulary": ["red"],
        "defaults": {
            "size": "64*48",
            "frame_num": 9,
            "fps": 8,
            "sample_steps": 4,
            "negative_prompt": "",
        },
    }
    (root / "high.safetensors").write_bytes(
        save({name: value.bfloat16() for name, value in dit.items()}, {"format": "pt"})
    )
    write_shards(root / "sharded", INDEX, SHARDS, dit)
    (root / "sharded/config.json").write_text("{}")
    torch.save({name: value.bfloat16() for name, value in t5.items()}, root / "t5.pth")
    torch.save(
        {"model_state": {name: nn.Parameter(value) for name, value in vae.items()}},
        root / "vae.pth",
    )
    torch.save(t5, root / "zip.safetensors")
    write_gguf(root / "high.gguf", dit, "wan")
    names = from_official("t5", "gguf", t5)
    write_gguf(
        root / "t5.gguf",
        {names[name]: value for name, value in t5.items()},
        "t5encoder",
        tokens=True,
    )
    for name, state, form in (
        ("old", dit, (False,)),
        ("new", dit, (True,)),
        ("header", t5, (True, True)),
    ):
        tensors, metadata = fp8(state, *form)
        (root / f"{name}.safetensors").write_bytes(save(tensors, metadata))
    for name in ("mixed", "noted"):
        (root / f"{name}.safetensors").write_bytes(save(mixed(dit)))
    loras(root)
    (root / "adapter_config.json").write_text(json.dumps(PEFT))
    (root / "spiece.model").write_bytes(sentencepiece())
    names = from_official("t5", "huggingface", t5)
    (root / "embedded.safetensors").write_bytes(
        save({names[name]: value.half() for name, value in t5.items()} | embedded)
    )
    engine = Engine(Unigram([(word, -float(n)) for n, word in enumerate(WORDS)], unk_id=2))
    engine.normalizer = normalizers.Sequence([normalizers.Precompiled(CHARSMAP)])
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.save(str(root / "tokenizer.json"))
    for which in ("high", "low"):
        write_shards(root / f"model/{which}_noise_model", *official_names(), dit)
        (root / f"model/{which}_noise_model/config.json").write_text(
            json.dumps(official_config(DIT))
        )
    (root / "model/models_t5_umt5-xxl-enc-bf16.safetensors").write_bytes(save(t5))
    (root / "model/Wan2.1_VAE.safetensors").write_bytes(save(vae))
    (root / "model/google/umt5-xxl").mkdir(parents=True)
    shutil.copy(root / "tokenizer.json", root / "model/google/umt5-xxl")
    (root / "model/wanflow.json").write_text(json.dumps(sheet))
    tiny_family(root / "ti2v", "ti2v")
    write_diffusers(root / "diffusers", held, sheet)
    shutil.copytree(root / "model/google/umt5-xxl", root / "diffusers/tokenizer")
    request = replace(
        Request("a red circle", seed=1),
        size="64*48",
        frame_num=5,
        sample_steps=4,
        negative_prompt="",
    ).complete(T2V_A14B)
    x = torch.randn(4, 1, 16, 2, 6, 8)
    recipe = Recipe(
        request,
        ModelRecord("model", "model", "0" * 16),
        {"device": "cpu", "dtype": "float32"},
        {"wanflow": "1"},
        "cpu",
        None,
    )
    state = SolverState(2, x[0], (x[1], x[2]), x[3])
    Run(recipe, state).save(root / "x.latent.safetensors")


def official_names() -> tuple[str, tuple[str, str]]:
    stem = "diffusion_pytorch_model"
    return f"{stem}.safetensors.index.json", (
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
    )


def write_shards(folder: Path, index: str, names: tuple[str, str], state: State) -> None:
    folder.mkdir(parents=True)
    tensors = list(state)
    places = {tensor: names[number >= len(tensors) // 2] for number, tensor in enumerate(tensors)}
    for name in names:
        (folder / name).write_bytes(
            safetensors.torch.save(
                {tensor: state[tensor] for tensor in tensors if places[tensor] == name}
            )
        )
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def write_diffusers(root: Path, held: dict[str, State], sheet: dict[str, Any]) -> None:
    from wanflow.convert import configs

    preset = replace(
        T2V_A14B,
        dit=DIT,
        text=TEXT,
        vae=replace(VAE, latent_mean=T2V_A14B.vae.latent_mean, latent_std=T2V_A14B.vae.latent_std),
    )
    said = {
        "transformer": configs.transformer(DIT),
        "transformer_2": configs.transformer(DIT),
        "text_encoder": configs.text_encoder(TEXT),
        "vae": configs.autoencoder(preset.vae),
        "scheduler": configs.scheduler(3.0),
    }
    kinds: dict[str, tuple[Any, Any]] = {
        "transformer": ("dit", "diffusers"),
        "transformer_2": ("dit", "diffusers"),
        "text_encoder": ("t5", "huggingface"),
        "vae": ("vae", "diffusers"),
    }
    for folder, config in said.items():
        (root / folder).mkdir(parents=True)
        (
            root / folder / ("scheduler_config.json" if folder == "scheduler" else "config.json")
        ).write_bytes(configs.as_json(config))
        if folder in kinds:
            kind, dialect = kinds[folder]
            names = from_official(kind, dialect, held[kind])
            state = {names[name]: value for name, value in held[kind].items()}
            file = "model.safetensors" if kind == "t5" else "diffusion_pytorch_model.safetensors"
            (root / folder / file).write_bytes(safetensors.torch.save(state))
    (root / "model_index.json").write_bytes(
        configs.as_json(configs.model_index(preset, "T5TokenizerFast"))
    )
    (root / "wanflow.json").write_text(
        json.dumps({key: value for key, value in sheet.items() if key != "text"})
    )


# what may come of it


class Misbehaviour(Exception):
    """An outcome that no user should see."""


def judge_text(told: str) -> None:
    """One line, of which a terminal shows what it says."""
    odd = {
        char
        for char in told
        if ord(char) < 32
        or 127 <= ord(char) < 160
        or char in "\u2028\u2029\u202a\u202b\u202c\u202d\u202e"
        or "\ud800" <= char <= "\udfff"
    }
    if odd:
        raise Misbehaviour(f"the message holds {odd}: {told!r:.600}")


def judge(error: RequestError, root: Path) -> None:
    """A refusal must name the file in one line, and not be made of memory that was asked for in
    vain.
    """
    told = str(error)
    judge_text(told)
    if str(root) not in told:
        raise Misbehaviour(f"the message does not name the file: {told:.600}")
    if len(told) > LONGEST:
        raise Misbehaviour(f"the message has {len(told):,} characters: {told:.600}")
    cause: BaseException | None = error
    while cause is not None:
        if (
            isinstance(cause, MemoryError)
            or "allocate memory" in str(cause)
            or "Cannot allocate" in str(cause)
        ):
            raise Misbehaviour(f"it asked for too much memory: {cause!r:.300}")
        cause = cause.__cause__ or cause.__context__


PROBES: dict[str, Callable[[Path, Path], Iterable[Callable[[], object]]]] = {
    # Faults of every kind, to see that the net holds them.
    "crash": lambda root, file: [lambda: ctypes.string_at(0)],
    "hang": lambda root, file: [lambda: time.sleep(60)],
    "allocate": lambda root, file: [lambda: torch.empty(1 << 30, dtype=torch.uint8)],
    "touch": lambda root, file: [touch],
    "another error": lambda root, file: [lambda: {}["x"]],
    "two lines": lambda root, file: [lambda: refuse(str(root), "again")],
    "no name": lambda root, file: [lambda: refuse("something is wrong")],
    "code": lambda root, file: [lambda: Path("ran").touch()],
}


def touch() -> None:
    """Memory that no limit of the process' own data counts."""
    with mmap.mmap(-1, MEMORY + (50 << 20)) as pages:
        for at in range(0, len(pages), mmap.PAGESIZE):
            pages[at] = 1


def refuse(*lines: str) -> None:
    raise RequestError(*lines)


class Bench:
    """A folder of good files, in which one after the other is damaged, tried and put back."""

    def __init__(self, root: Path, bare: bool = False) -> None:
        self.root = root
        if not bare:
            write_good(root)
        names = {
            name for container in CONTAINERS.values() for name, _ in container.files if not bare
        }
        self.good = {name: (root / name).read_bytes() for name in sorted(names)}

    def damaged(self, name: str, seed: int) -> tuple[str, bytes]:
        """The file that a seed damages, and its new bytes."""
        rng = Random(f"{name} {seed}")
        files = CONTAINERS[name].files
        file, damage = files[seed % len(files)]
        good = self.good[file]
        for _ in range(20):
            data = damage(rng, good)
            if data != good:
                return file, data
        return file, of_bytes(rng, good)

    def try_one(self, name: str, seed: int) -> dict[str, Any]:
        """What comes of a seed: how many of the ways to open its file were refused; `fault` where
        something else came.
        """
        file, data = ("probe", b"") if name in PROBES else self.damaged(name, seed)
        path = self.root / file
        path.write_bytes(data)
        container = Container((), PROBES[name]) if name in PROBES else CONTAINERS[name]
        result: dict[str, Any] = {"seed": seed, "ways": 0, "refused": 0}
        try:
            actions = [
                *container.reach(self.root, path),
                *(container.seldom(self.root, path) if seed % SELDOM == 0 else ()),
            ]
            for action in actions:
                result["ways"] += 1
                try:
                    action()
                except RequestError as error:
                    judge(error, self.root)
                    result["refused"] += 1
                    result["told"] = str(error)
                except BadValuesError as error:
                    judge_text(str(error))
            if Path("ran").exists():
                Path("ran").unlink()
                raise Misbehaviour("code of the file was run")
        except BaseException:  # a panic of a library in Rust is no Exception
            told = traceback.format_exc(limit=-6).encode("ascii", "backslashreplace").decode()
            result["fault"] = told if len(told) < 4000 else f"{told[:2000]} ... {told[-2000:]}"
        path.write_bytes(self.good.get(file, b""))
        return result


def resident() -> int:
    return (
        int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        if Path("/proc/self/statm").exists()
        else peak()
    )


def peak() -> int:
    """The most that this process held. What getrusage says includes what the process it was started
    from held, at that time.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            int(line.split()[1]) << 10
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def bound_memory(memory: int) -> None:
    """Let no more than `memory` bytes be asked for from here on, whether they are used or not."""
    status = Path("/proc/self/status")
    if status.exists():
        held = next(
            int(line.split()[1]) << 10
            for line in status.read_text().splitlines()
            if line.startswith("VmData")
        )
        resource.setrlimit(
            resource.RLIMIT_DATA, (held + memory, resource.getrlimit(resource.RLIMIT_DATA)[1])
        )


def serve(root: Path, bare: bool) -> None:
    """Make good files, and answer what comes of damaged ones."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print stays out of the answers
    faulthandler.enable()
    bench = Bench(root, bare)
    os.chdir(root)
    for name, container in (
        CONTAINERS.items() if not bare else ()
    ):  # nothing is damaged yet: all must be well, and is imported then
        for file, _ in container.files:
            for action in (
                *container.reach(root, root / file),
                *container.seldom(root, root / file),
            ):
                try:
                    action()
                except RequestError as error:
                    raise SystemExit(f"the good {name} ({file}) is refused: {error}") from error
    answer(answers, bench.try_one, MEMORY)


def answer(
    answers: Any,
    try_one: Callable[[str, int], dict[str, Any]],
    memory: int,
    prepare: Callable[[str], object] = lambda name: None,
) -> None:
    """Read lines of JSON, `{"name", "seed", "seconds"}`, and answer each with a line of what came
    of it: no more than `memory` bytes more than at the start. prepare: called before the clock of
    a seed starts.
    """
    print("ready", file=answers, flush=True)
    bounded = set[str]()
    for line in sys.stdin:
        job = json.loads(line)
        prepare(job["name"])
        if job["name"] not in bounded:
            bounded.add(job["name"])
            bound_memory(memory)
        faulthandler.dump_traceback_later(job["seconds"], exit=True)
        start, before, highest = time.perf_counter(), resident(), peak()
        result = try_one(job["name"], job["seed"])
        faulthandler.cancel_dump_traceback_later()
        grown = peak() - before if peak() > highest else 0
        if grown > memory:
            result["fault"] = f"memory grew by {grown >> 20} MB"
        result |= {"seconds": time.perf_counter() - start, "grown": grown, "peak": peak()}
        print(json.dumps(result), file=answers, flush=True)


class Worker:
    """The process in which inputs are tried; one that dies is replaced.

    script: run with `--serve FOLDER` and these options, see `answer`.
    """

    def __init__(self, folder: Path, script: Path, options: tuple[str, ...] = ()) -> None:
        self.folder, self.script, self.options = folder, script, options
        self.process: subprocess.Popen[str] | None = None
        self.log = (folder / "log").open("w+")
        self.count = 0

    def _start(self) -> subprocess.Popen[str]:
        self.count += 1
        place = self.folder / f"worker-{self.count}"
        place.mkdir()
        self.log.seek(0)
        self.log.truncate()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, str(self.script), "--serve", str(place), *self.options]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the worker did not start: {self._logged()}")
        return process

    def _logged(self) -> str:
        self.log.seek(0)
        return self.log.read()[-3000:]

    def try_one(self, name: str, seed: int, seconds: float = SECONDS) -> dict[str, Any]:
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(
            json.dumps({"name": name, "seed": seed, "seconds": seconds}) + "\n"
        )
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return dict(json.loads(answer))
        code = self.process.wait()
        self.process = None
        return {"seed": seed, "fault": f"the process died ({code}): {self._logged()}"}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.log.close()


@contextlib.contextmanager
def worker(script: Path = Path(__file__), bare: bool = False) -> Iterator[Worker]:
    """A worker in a folder of its own. bare: without any good files, for the probes."""
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if os.access(fast, os.W_OK) else None) as folder:
        one = Worker(Path(folder), script, ("--bare",) if bare else ())
        try:
            yield one
        finally:
            one.close()


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "container", nargs="?", choices=[*CONTAINERS, *PROBES, "all"], default="all"
    )
    parser.add_argument("first", nargs="?", type=int, default=0)
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="leave the damaged files here")
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--bare", action="store_true")
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.bare)
    seeds = range(args.first, args.first + args.count)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        bench = Bench(args.keep)
        for seed in seeds:
            file, data = bench.damaged(args.container, seed)
            (args.keep / f"{seed}-{Path(file).name}").write_bytes(data)
    with worker(bare=args.container in PROBES) as one:
        for name in CONTAINERS if args.container == "all" else [args.container]:
            start, results = time.perf_counter(), []
            for seed in seeds:
                results.append(one.try_one(name, seed))
                if args.count == 1:
                    print(json.dumps(results[-1], indent=1))
                elif "fault" in results[-1]:
                    print(f"--- {name} {seed}\n{results[-1]['fault']}")
            refused = sum(result.get("refused", 0) > 0 for result in results)
            faults = sum("fault" in result for result in results)
            print(
                f"{name}: {len(results)} files, {refused} refused, {faults} faults,"
                f" {time.perf_counter() - start:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
