"""Every form in which the weights are found in the world, written by someone else's writer, gives
what the official form gives.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from helpers.common import filled, official_config, refusal
from helpers.gguf_blocks import blocks
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Engine
from tokenizers import pre_tokenizers
from tokenizers.models import Unigram
from torch import Tensor

import wanflow
from wanflow.checkpoint import load
from wanflow.checkpoint import published as catalogue
from wanflow.checkpoint.checkpoint import Checkpoint, open_checkpoint
from wanflow.checkpoint.key_maps import from_official
from wanflow.config import DiTConfig, TextConfig, VAEConfig
from wanflow.models.dit import WanDiT
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.opening import resolve
from wanflow.presets import LATENT_MEAN, LATENT_STD
from wanflow.transforms.packed import PackedEmbedding, PackedLinear

# Widths of 256, the largest block of any packing; heads of 128, as every published model has them.
DIT = DiTConfig(
    dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=256, text_len=8, freq_dim=256
)
TEXT = TextConfig(vocab=64, dim=256, dim_attn=256, dim_ffn=256, num_heads=4, num_layers=2)
VAE = VAEConfig(dim=4, num_res_blocks=1, latent_mean=LATENT_MEAN, latent_std=LATENT_STD)
WORDS = ["<pad>", "</s>", "<unk>", "▁red", "▁circle"]
SHEET = {
    "name": "tiny",
    "dit": {"text_len": 8},
    "defaults": {"size": "32*32", "frame_num": 5, "sample_steps": 2, "negative_prompt": ""},
}
STEMS = {
    "high": "wan2.2_t2v_high_noise_14B",
    "low": "wan2.2_t2v_low_noise_14B",
    "t5": "umt5_xxl",
    "vae": "wan_2.1_vae",
}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    models = {
        "high": filled(WanDiT(DIT), 1),
        "low": filled(WanDiT(DIT), 2),
        "t5": filled(UMT5Encoder(TEXT), 3),
        "vae": filled(WanVAE(VAE), 4),
    }
    return {part: dict(model.state_dict()) for part, model in models.items()}


def write_sheet(folder: Path) -> None:
    (folder / "wanflow.json").write_text(json.dumps(SHEET))


def write_tokenizer(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    engine = Engine(Unigram([(word, -float(n)) for n, word in enumerate(WORDS)], unk_id=2))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.save(str(file))


def official(
    root: Path, states: dict[str, State], dtype: torch.dtype = torch.float32, suffix: str = ""
) -> Path:
    """The published layout; `-bf16` as ModelScope's revision has it."""
    for which in ("high", "low"):
        folder = root / f"{which}_noise_model"
        folder.mkdir(parents=True)
        name = f"diffusion_pytorch_model-00001-of-00001{suffix}.safetensors"
        save_file({key: value.to(dtype) for key, value in states[which].items()}, folder / name)
        index = {"metadata": {}, "weight_map": dict.fromkeys(states[which], name)}
        (folder / f"diffusion_pytorch_model{suffix}.safetensors.index.json").write_text(
            json.dumps(index)
        )
        (folder / "config.json").write_text(
            json.dumps({"_class_name": "WanModel"} | official_config(DIT))
        )
    torch.save(states["t5"], root / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(states["vae"], root / "Wan2.1_VAE.pth")
    write_tokenizer(root / "google/umt5-xxl/tokenizer.json")
    write_sheet(root)
    return root


def diffusers_folder(root: Path, states: dict[str, State], shift: float = 3.0) -> Path:
    """Diffusers' layout, by diffusers' and transformers' own `save_pretrained`."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    for which, name in (("high", "transformer"), ("low", "transformer_2")):
        dit = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=DIT.num_heads,
            attention_head_dim=DIT.dim // DIT.num_heads,
            in_channels=16,
            out_channels=16,
            text_dim=DIT.text_dim,
            freq_dim=DIT.freq_dim,
            ffn_dim=DIT.ffn_dim,
            num_layers=DIT.num_layers,
        )
        fill(dit, "dit", states[which])
        dit.save_pretrained(root / name, max_shard_size="1MB")  # several shards
    vae = AutoencoderKLWan(base_dim=VAE.dim, z_dim=16, num_res_blocks=1)
    fill(vae, "vae", states["vae"])
    vae.save_pretrained(root / "vae")
    config = UMT5Config(
        vocab_size=TEXT.vocab,
        d_model=TEXT.dim,
        d_kv=64,
        d_ff=TEXT.dim_ffn,
        num_layers=TEXT.num_layers,
        num_heads=TEXT.num_heads,
        feed_forward_proj="gated-gelu",
    )
    encoder = UMT5EncoderModel(config)
    fill(encoder, "t5", states["t5"])
    encoder.save_pretrained(root / "text_encoder")
    write_tokenizer(root / "tokenizer/tokenizer.json")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    ).save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "boundary_ratio": 0.875})
    )
    (root / "wanflow.json").write_text(json.dumps(SHEET))
    return root


def fill(model: Any, kind: Any, state: State) -> None:
    names = from_official(kind, "huggingface" if kind == "t5" else "diffusers", state)
    missing, unexpected = model.load_state_dict(
        {names[name]: value for name, value in state.items()}, strict=False
    )
    assert not unexpected and all("embed_tokens" in name for name in missing)


def single_files(
    root: Path, states: dict[str, State], write: Callable[[str, State, Path], None]
) -> Path:
    """ComfyUI's tree, each file by `write(part, state, path without ending)`."""
    for part, folder in (
        ("high", "diffusion_models"),
        ("low", "diffusion_models"),
        ("t5", "text_encoders"),
        ("vae", "vae"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        write(part, states[part], root / folder / STEMS[part])
    write_tokenizer(root / "tokenizer.json")
    write_sheet(root)
    return root


def sixteen(dtype: torch.dtype, prefix: str = "") -> Callable[[str, State, Path], None]:
    def write(part: str, state: State, path: Path) -> None:
        save_file(
            {
                prefix * (part in ("high", "low")) + name: value.to(dtype)
                for name, value in state.items()
            },
            path.parent / f"{path.name}.safetensors",
        )

    return write


def linears(part: str, state: State) -> list[str]:
    return [
        name
        for name, value in state.items()
        if value.ndim == 2 and name.endswith("weight") and "embedding.weight" not in name
    ]


def fp8(form: str) -> Callable[[str, State, Path], None]:
    """fp8 files as ComfyUI and musubi-tuner write them, by hand."""

    def write(part: str, state: State, path: Path) -> None:
        tensors, layers = {name: value.half() for name, value in state.items()}, {}
        if part == "vae":
            return save_file(tensors, path.parent / f"{path.name}.safetensors")
        for name in linears(part, state):
            layer, value = name.removesuffix(".weight"), state[name]
            scale = value.abs().amax() / 448
            if form == "rows":
                scale = value.abs().amax(1, keepdim=True) / 448
            if form == "blocks":
                scale = value.unflatten(1, (4, -1)).abs().amax(2, keepdim=True) / 448
            flat = value.unflatten(1, (4, -1)) / scale if form == "blocks" else value / scale
            tensors[name] = flat.reshape(value.shape).to(torch.float8_e4m3fn)
            new = form in ("new", "header")
            tensors[f"{layer}.{'weight_scale' if new else 'scale_weight'}"] = scale.float()
            layers[layer] = {"format": "float8_e4m3fn"}
            if form == "old":
                tensors[f"{layer}.scale_input"] = torch.tensor(1.0)
            if form == "new":
                tensors[f"{layer}.comfy_quant"] = torch.tensor(
                    list(json.dumps(layers[layer]).encode()), dtype=torch.uint8
                )
        if form == "old":
            tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
        if part == "t5":
            tensors["spiece_model"] = torch.tensor(
                [10, 0], dtype=torch.uint8
            )  # not read: the folder has its tokenizer
        meta = (
            {"_quantization_metadata": json.dumps({"layers": layers})} if form == "header" else None
        )
        save_file(tensors, path.parent / f"{path.name}.safetensors", metadata=meta)

    return write


def quantised(name: str, value: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """A matrix in a packing, by the gguf package; where that can only unpack (K-quants), random
    blocks that its name decides.
    """
    if kind in ("Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K"):
        return blocks(kind, *value.shape, seed=zlib.crc32(name.encode()), size=1e-4).numpy()
    return np.ascontiguousarray(gguf.quants.quantize(value, gguf.GGMLQuantizationType[kind]))


def write_gguf(kind: str) -> Callable[[str, State, Path], None]:
    """GGUF files as city96's tools write them, by the gguf package: official names for experts,
    llama.cpp's for T5.
    """
    quant = gguf.GGMLQuantizationType[kind]

    def write(part: str, state: State, path: Path) -> None:
        if part == "vae":
            return sixteen(torch.float32)(part, state, path)
        names = (
            from_official("t5", "gguf", state) if part == "t5" else {name: name for name in state}
        )
        writer = gguf.GGUFWriter(
            path.parent / f"{path.name}.gguf", "t5encoder" if part == "t5" else "wan"
        )
        for name, value in state.items():
            data, own = value.numpy(), gguf.GGMLQuantizationType.F32
            if value.ndim == 5:  # ggml knows four sides
                writer.add_array(
                    f"comfy.gguf.orig_shape.{names[name]}", [int(side) for side in value.shape]
                )
                data = data.reshape(value.shape[0], -1)
            elif value.ndim == 2 and name.endswith("weight") and value.shape[1] % 256 == 0:
                own = quant
            writer.add_tensor(names[name], quantised(name, data, own.name), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def rounded(state: State, how: Callable[[str, Tensor], Tensor]) -> State:
    return {name: how(name, value) for name, value in state.items()}


# What each part computes


def outputs(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latent, text = (
        torch.randn(1, 16, 2, 4, 4, generator=generator),
        torch.randn(1, 8, 256, generator=generator),
    )
    found: dict[str, Tensor] = {}
    for which in ("high", "low"):
        found[which] = load.load_expert(checkpoint, which, dtype, "cpu")(
            latent, torch.tensor([900.0]), text
        )  # type: ignore[arg-type]
    ids, mask = load.load_tokenizer(checkpoint)(["red circle"])
    found["t5"] = load.load_text_encoder(checkpoint, dtype, "cpu")(ids, mask)
    found["vae"] = load.load_vae(checkpoint).decode(latent)
    return found


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    for part, value in one.items():
        assert torch.equal(value, two[part]), f"{part}: {(value - two[part]).abs().max()}"


@pytest.fixture(scope="module")
def reference(
    states: dict[str, State], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    return outputs(open_checkpoint(official(tmp_path_factory.mktemp("official"), states)))


def from_states(states: dict[str, State], folder: Path) -> dict[str, Tensor]:
    """What the official layout gives with other values."""
    return outputs(open_checkpoint(official(folder, states)))


# Lossless layouts: bit-equal


def test_the_bf16_revision_of_the_official_folder(states: dict[str, State], tmp_path: Path) -> None:
    found = outputs(open_checkpoint(official(tmp_path / "a", states, torch.bfloat16, "-bf16")))
    half = {
        part: (
            rounded(state, lambda name, value: value.bfloat16().float())
            if part in ("high", "low")
            else state
        )
        for part, state in states.items()
    }
    same(from_states(half, tmp_path / "b"), found)


def test_diffusers_folder(
    states: dict[str, State], reference: dict[str, Tensor], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(diffusers_folder(tmp_path, states))
    same(reference, outputs(checkpoint))
    assert checkpoint.layout == "diffusers" and checkpoint.spec.boundary == 0.875
    assert (
        checkpoint.paths["high"].name == "transformer"
        and checkpoint.paths["low"].name == "transformer_2"
    )
    assert (
        checkpoint.spec.sample_shift == 12
    )  # the official one, whatever the scheduler's config says
    assert (
        len(checkpoint.notes) == 1
        and "flow_shift 3" in checkpoint.notes[0]
        and "--sample_shift 3" in checkpoint.notes[0]
    )


def test_a_diffusers_folder_with_the_official_shift_has_nothing_to_warn_of(
    states: dict[str, State], tmp_path: Path
) -> None:
    assert not open_checkpoint(diffusers_folder(tmp_path, states, shift=12.0)).notes


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_files(
    states: dict[str, State], tmp_path: Path, dtype: torch.dtype, prefix: str
) -> None:
    found = outputs(open_checkpoint(single_files(tmp_path / "a", states, sixteen(dtype, prefix))))
    half = {
        part: rounded(state, lambda name, value: value.to(dtype).float())
        for part, state in states.items()
    }
    same(from_states(half, tmp_path / "b"), found)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_gguf_without_loss(states: dict[str, State], tmp_path: Path, kind: str) -> None:
    found = outputs(open_checkpoint(single_files(tmp_path / "a", states, write_gguf(kind))))
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]

    def how(name: str, value: Tensor) -> Tensor:
        return (
            value.to(dtype).float()
            if value.ndim == 2 and name.endswith("weight") and value.shape[1] % 256 == 0
            else value
        )

    half = {part: rounded(state, how) if part != "vae" else state for part, state in states.items()}
    same(from_states(half, tmp_path / "b"), found)


# Packed layouts: they stay packed, and give what their unpacked values give


def close(one: dict[str, Tensor], two: dict[str, Tensor], limit: float = 1e-4) -> None:
    for part, value in one.items():
        worst = float((value - two[part]).abs().max() / value.abs().max())
        assert worst < limit, f"{part}: {worst}"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["old", "new", "header", "rows", "blocks"])
def test_scaled_fp8(states: dict[str, State], tmp_path: Path, form: str) -> None:
    checkpoint = open_checkpoint(single_files(tmp_path / "a", states, fp8(form)))
    expert = load.load_expert(checkpoint, "high", torch.float32, "cpu")
    held = expert.get_submodule("blocks.0.ffn.0")
    assert isinstance(held, PackedLinear) and held.data.dtype == torch.float8_e4m3fn

    def unpacked(part: str) -> State:
        if part == "vae":
            return rounded(states[part], lambda name, value: value.half().float())
        written = load_file(
            tmp_path
            / "a"
            / ("text_encoders" if part == "t5" else "diffusion_models")
            / f"{STEMS[part]}.safetensors"
        )
        state = {}
        for name in states[part]:
            value, layer = written[name].float(), name.removesuffix(".weight")
            scale = written.get(f"{layer}.scale_weight", written.get(f"{layer}.weight_scale"))
            if scale is not None:
                value = (
                    (value.unflatten(1, (4, -1)) * scale).flatten(1)
                    if scale.ndim == 3
                    else value * scale
                )
            state[name] = value
        return state

    # rounding: a large matmul is done in pieces
    close(
        from_states({part: unpacked(part) for part in states}, tmp_path / "b"),
        outputs(checkpoint),
        1e-5,
    )


def test_merely_rounded_fp8(states: dict[str, State], tmp_path: Path) -> None:
    """Without scales, as some repackage: the values are the weights."""

    def write(part: str, state: State, path: Path) -> None:
        matmuls = linears(part, state) if part in ("high", "low") else []
        save_file(
            {
                name: value.to(torch.float8_e4m3fn) if name in matmuls else value
                for name, value in state.items()
            },
            path.parent / f"{path.name}.safetensors",
        )

    found = outputs(open_checkpoint(single_files(tmp_path / "a", states, write)))

    def how(name: str, value: Tensor) -> Tensor:
        return (
            value.to(torch.float8_e4m3fn).float()
            if name in linears("high", states["high"])
            else value
        )

    eight = {
        part: rounded(state, how) if part in ("high", "low") else state
        for part, state in states.items()
    }
    close(from_states(eight, tmp_path / "b"), found, 1e-5)


def test_an_fp8_weight_without_its_scale_is_an_error_and_never_noise(
    states: dict[str, State], tmp_path: Path
) -> None:
    for form, lost in (
        ("old", ".scale_weight"),
        ("new", ".weight_scale"),
        ("header", ".weight_scale"),
    ):
        folder = single_files(tmp_path / form, states, fp8(form))
        file = folder / "diffusion_models" / f"{STEMS['high']}.safetensors"
        tensors = load_file(file)
        meta = (
            {
                "_quantization_metadata": json.dumps(
                    {"layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}}
                )
            }
            if form == "header"
            else None
        )
        save_file(
            {name: value for name, value in tensors.items() if name != f"blocks.0.ffn.0{lost}"},
            file,
            metadata=meta,
        )
        told = refusal(lambda folder=folder: open_checkpoint(folder))  # type: ignore[misc]
        assert "blocks.0.ffn.0" in told and "scale" in told
        # No scale and no mark left in the whole file: the values themselves show it, when they are
        # read.
        bare = {
            name: value
            for name, value in tensors.items()
            if not name.endswith((lost, "scaled_fp8", "comfy_quant", "scale_input"))
        }
        save_file(bare, file)
        checkpoint = open_checkpoint(folder)
        assert "scale is missing" in refusal(
            lambda checkpoint=checkpoint: load.load_expert(checkpoint, "high", torch.float32, "cpu")
        )  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"blocks.0.ffn.0.scale_weight": torch.ones(3)}, "fits no known way"),
        (lambda t: t | {"blocks.9.ffn.0.scale_weight": torch.ones(())}, "has no weight"),
        (lambda t: t | {"blocks.0.ffn.0.scale_weight": torch.tensor(3)}, "int64"),
        (
            lambda t: (
                t
                | {
                    "blocks.0.ffn.0.comfy_quant": torch.tensor(
                        list(b'{"format": "convrot_w4a4"}'), dtype=torch.uint8
                    )
                }
            ),
            "'convrot_w4a4'",
        ),
        (
            lambda t: (
                t | {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(b'{"form'), dtype=torch.uint8)}
            ),
            "cannot be read",
        ),
        (
            lambda t: (
                t
                | {
                    "blocks.0.ffn.0.comfy_quant": torch.tensor(
                        list(b'{"format": "float8_e5m2"}'), dtype=torch.uint8
                    )
                }
            ),
            "float8_e5m2",
        ),
    ],
)
def test_fp8_files_that_make_no_sense(
    states: dict[str, State], tmp_path: Path, change: Callable[[State], State], words: str
) -> None:
    folder = single_files(tmp_path, states, fp8("old"))
    file = folder / "diffusion_models" / f"{STEMS['high']}.safetensors"
    save_file(change(load_file(file)), file)
    assert words in refusal(lambda: open_checkpoint(folder))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K"])
def test_packed_gguf(states: dict[str, State], tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(single_files(tmp_path / "a", states, write_gguf(kind)))
    expert, encoder = (
        load.load_expert(checkpoint, "high", torch.float32, "cpu"),
        load.load_text_encoder(checkpoint, torch.float32, "cpu"),
    )
    assert isinstance(expert.get_submodule("time_projection.1"), PackedLinear) and isinstance(
        encoder.token_embedding, PackedEmbedding
    )
    assert tuple(expert.patch_embedding.weight.shape) == (256, 16, 1, 2, 2)
    quant = gguf.GGMLQuantizationType[kind]

    def how(name: str, value: Tensor) -> Tensor:
        if value.ndim != 2 or not name.endswith("weight") or value.shape[1] % 256:
            return value
        return torch.from_numpy(
            gguf.quants.dequantize(quantised(name, value.numpy(), kind), quant)
        ).view(value.shape)

    values = {
        part: rounded(state, how) if part != "vae" else state for part, state in states.items()
    }
    close(from_states(values, tmp_path / "b"), outputs(checkpoint), 1e-5)
    packed, whole = (
        load.expert_bytes(checkpoint, torch.bfloat16),
        load.expert_bytes(open_checkpoint(tmp_path / "b"), torch.bfloat16),
    )
    assert packed < whole * (
        0.7 if kind in ("Q8_0", "Q6_K") else 0.6
    )  # norms, biases and the patch embedding are a larger share than at full size


# Mixed, named by hand, and told apart


def test_everything_mixes(
    states: dict[str, State], reference: dict[str, Tensor], tmp_path: Path
) -> None:
    """A GGUF expert with the other in 16 bits, an fp8 T5 and a .pth VAE, on top of a Diffusers
    folder.
    """
    single_files(tmp_path / "gguf", states, write_gguf("F32"))
    single_files(tmp_path / "f32", states, sixteen(torch.float32, "model.diffusion_model."))
    single_files(tmp_path / "fp8", states, fp8("new"))
    base = diffusers_folder(tmp_path / "base", states)
    torch.save(states["vae"], tmp_path / "any.name")
    given = {
        "high": tmp_path / "gguf/diffusion_models" / f"{STEMS['high']}.gguf",
        "low": tmp_path / "f32/diffusion_models" / f"{STEMS['low']}.safetensors",
        "t5": tmp_path / "fp8/text_encoders" / f"{STEMS['t5']}.safetensors",
        "vae": tmp_path / "any.name",
    }
    found = outputs(resolve(base, given))
    for part in ("high", "low", "vae"):
        assert torch.equal(found[part], reference[part])
    assert (
        0
        < float((found["t5"] - reference["t5"]).abs().max())
        < float(reference["t5"].abs().max()) * 0.3
    )
    only = resolve(None, {**given, "tokenizer": base / "tokenizer/tokenizer.json"})
    assert only.spec.dit.num_heads == 2 and only.spec.name != "tiny"
    assert only.spec.dit.text_len == 512  # nothing beside these files says otherwise: as published


def test_names_are_not_trusted(
    states: dict[str, State], reference: dict[str, Tensor], tmp_path: Path
) -> None:
    """A GGUF file called .safetensors, a torch zip called .safetensors, a safetensors file called
    .pth.
    """
    folder = single_files(tmp_path, states, write_gguf("F32"))
    for which in ("high", "low"):
        file = folder / "diffusion_models" / f"{STEMS[which]}.gguf"
        file.rename(file.parent / f"{STEMS[which]}.safetensors")
    (folder / "text_encoders" / f"{STEMS['t5']}.gguf").unlink()
    torch.save(states["t5"], folder / "text_encoders/t5.safetensors")
    (folder / "vae" / f"{STEMS['vae']}.safetensors").rename(folder / "vae/vae.pth")
    same(reference, outputs(open_checkpoint(folder)))


def test_one_file_with_everything(
    states: dict[str, State], reference: dict[str, Tensor], tmp_path: Path
) -> None:
    for which in ("high", "low"):
        tensors = {f"model.diffusion_model.{name}": value for name, value in states[which].items()}
        tensors |= {
            f"text_encoders.umt5xxl.transformer.{name}": value
            for name, value in huggingface(states["t5"]).items()
        }
        tensors |= {f"first_stage_model.{name}": value for name, value in states["vae"].items()}
        save_file(tensors, tmp_path / f"all-in-one-{which}.safetensors")
    write_tokenizer(tmp_path / "tokenizer.json")
    write_sheet(tmp_path)
    one = tmp_path / "all-in-one-high.safetensors"
    same(reference, outputs(open_checkpoint(tmp_path, {"t5": one, "vae": one})))
    assert "several files for the text encoder" in refusal(lambda: open_checkpoint(tmp_path))


def huggingface(state: State) -> State:
    names = from_official("t5", "huggingface", state)
    return {names[name]: value for name, value in state.items()}


def test_experts_that_nothing_tells_apart_are_refused(
    states: dict[str, State], reference: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = single_files(tmp_path, states, sixteen(torch.float32))
    files = {}
    for which, name in (("high", "one"), ("low", "two")):
        files[which] = folder / "diffusion_models" / f"{name}.safetensors"
        (folder / "diffusion_models" / f"{STEMS[which]}.safetensors").rename(files[which])
    told = refusal(lambda: open_checkpoint(folder))
    assert (
        "one.safetensors" in told and "two.safetensors" in told and "--high FILE --low FILE" in told
    )
    same(reference, outputs(open_checkpoint(folder, files)))  # type: ignore[arg-type]
    # a folder's name is enough
    for which, file in files.items():
        place = folder / "diffusion_models" / f"{which.title()}Noise"
        place.mkdir()
        file.rename(place / file.name)
    same(reference, outputs(open_checkpoint(folder)))
    # and two files for one place are one too many
    shutil.copy(
        folder / "diffusion_models/HighNoise/one.safetensors",
        folder / "diffusion_models/HighNoise/other.safetensors",
    )
    assert "several files for the high-noise expert" in refusal(lambda: open_checkpoint(folder))


def test_a_hash_that_contradicts_the_name(states: dict[str, State], tmp_path: Path) -> None:
    """In Hugging Face's cache a file is a link to a blob that is called by its sha256."""
    folder = single_files(tmp_path / "snapshots/x", states, sixteen(torch.float32))
    (tmp_path / "blobs").mkdir()
    blob = (
        tmp_path / "blobs/e71b96d7c82e638694c5e7fb98fac4bfb0e4ddc5fbbb4b1df40da8f0f1278a97"
    )  # the published low-noise expert in fp8
    file = folder / "diffusion_models" / f"{STEMS['high']}.safetensors"
    file.rename(blob)
    file.symlink_to(blob)
    assert "its hash is that of the low-noise one" in refusal(lambda: open_checkpoint(folder))


def test_published_files_are_known_under_any_name(
    states: dict[str, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed, by the hash of what is in them, which is computed for files of a published size
    only.
    """
    folder = single_files(tmp_path, states, sixteen(torch.float32))
    for which, name in (("high", "a"), ("low", "b")):
        file = (folder / "diffusion_models" / f"{STEMS[which]}.safetensors").rename(
            folder / "diffusion_models" / f"{name}.safetensors"
        )
        monkeypatch.setitem(
            catalogue.known_hashes(),
            f"x_{which}_noise.safetensors",
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
    assert "--high FILE --low FILE" in refusal(lambda: open_checkpoint(folder))
    monkeypatch.setattr(catalogue, "EXPERT_SIZES", (file.stat().st_size,))
    found = open_checkpoint(folder).paths
    assert (found["high"].stem, found["low"].stem) == ("a", "b")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (
            lambda s: s | {"patch_embedding.weight": torch.zeros(256, 36, 1, 2, 2)},
            "the high-noise expert is of Wan2.2-I2V-A14B and the low-noise one of Wan2.2-T2V-A14B",
        ),
        (
            lambda s: s | {"patch_embedding.weight": torch.zeros(256, 48, 1, 2, 2)},
            "a model with 48 channels in and 16 out",
        ),
        (lambda s: s | {"img_emb.proj.0.weight": torch.zeros(2)}, "Wan2.1-I2V"),
        (lambda s: s | {"vace_blocks.0.before_proj.weight": torch.zeros(2)}, "Wan VACE"),
    ],
)
def test_relatives_are_refused_by_name(
    states: dict[str, State], tmp_path: Path, change: Callable[[State], State], name: str
) -> None:
    folder = single_files(
        tmp_path, states | {"high": change(states["high"])}, sixteen(torch.float32)
    )
    assert name in refusal(lambda: open_checkpoint(folder))
    high, low = (
        folder / "diffusion_models" / f"{STEMS[which]}.safetensors" for which in ("high", "low")
    )
    assert name in refusal(lambda: open_checkpoint(folder, {"high": high, "low": low}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>log in</html>", "web page"),
    ],
)
def test_what_stands_in_for_weights(
    states: dict[str, State], tmp_path: Path, content: bytes, words: str
) -> None:
    folder = single_files(tmp_path, states, sixteen(torch.float32))
    (folder / "vae" / f"{STEMS['vae']}.safetensors").write_bytes(content)
    assert words in refusal(lambda: open_checkpoint(folder))


def test_unrelated_files_beside_a_whole_model_do_not_matter(
    states: dict[str, State], tmp_path: Path
) -> None:
    folder = single_files(tmp_path, states, sixteen(torch.float32))
    (folder / "loras").mkdir()
    save_file(
        {"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(1, 256)},
        folder / "loras/some_low_noise.safetensors",
    )
    (folder / "broken.safetensors").write_bytes(b"\x00" * 7)
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    assert open_checkpoint(folder).layout == "files"


def test_a_t5_file_that_carries_its_tokenizer_needs_no_other(
    states: dict[str, State], tmp_path: Path
) -> None:
    """As ComfyUI's fp8 T5 does; the folder has no tokenizer of its own."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["red circle", "a red cat", "circle it"] * 9),
        model_writer=out,
        vocab_size=30,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder = single_files(tmp_path, states, fp8("old"))
    (folder / "tokenizer.json").unlink()
    file = folder / "text_encoders" / f"{STEMS['t5']}.safetensors"
    spiece = torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8)
    save_file(load_file(file) | {"spiece_model": spiece}, file)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.paths["tokenizer"] == checkpoint.paths["t5"] == file
    ids, mask = load.load_tokenizer(checkpoint)(["red it"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()).encode("red it")
    assert ids[0, : int(mask.sum())].tolist() == [*theirs, 1]
    video = wanflow.load(folder).generate("red circle", seed=1)
    assert video.frames.shape == (5, 32, 32, 3)


def test_a_tokenizer_of_another_model(states: dict[str, State], tmp_path: Path) -> None:
    folder = single_files(tmp_path, states, sixteen(torch.float32))
    engine = Engine(
        Unigram(
            [(f"w{n}", -float(n)) for n in range(100)] + [("</s>", 0.0), ("<pad>", 0.0)], unk_id=0
        )
    )
    engine.save(str(folder / "tokenizer.json"))
    assert "do not belong together" in refusal(lambda: load.load_tokenizer(open_checkpoint(folder)))


def test_a_repository_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "hf download Wan-AI/Wan2.2-T2V-A14B" in refusal(
        lambda: resolve("Wan-AI/Wan2.2-T2V-A14B")
    )


def test_the_hint_names_the_variant(tmp_path: Path) -> None:
    told = refusal(lambda: open_checkpoint(tmp_path / "T2V_A14B_comfy-fp8"))
    assert "wanflow download --variant comfy-fp8 --local_dir" in told
    assert "wanflow download --local_dir" in refusal(
        lambda: open_checkpoint(tmp_path / "T2V_A14B_weights")
    )


def test_heads_that_nothing_tells(states: dict[str, State], tmp_path: Path) -> None:
    dit = DiTConfig(**{**asdict(DIT), "dim": 192, "ffn_dim": 64, "num_heads": 6})
    narrow = {which: dict(filled(WanDiT(dit), 5).state_dict()) for which in ("high", "low")}
    folder = single_files(tmp_path, states | narrow, sixteen(torch.float32))
    assert "how many heads" in refusal(lambda: open_checkpoint(folder))
    (folder / "wanflow.json").write_text(
        json.dumps(SHEET | {"dit": {"text_len": 8, "num_heads": 6}})
    )
    assert open_checkpoint(folder).spec.dit == dit


def test_any_layout_generates(states: dict[str, State], tmp_path: Path) -> None:
    """The whole way, in a mixed layout, in both residencies."""
    folder = single_files(tmp_path, states, write_gguf("Q8_0"))
    videos = [
        wanflow.load(folder, keep_experts=keep, dtype="float32")
        .generate("red circle", seed=1)
        .frames
        for keep in (True, False)
    ]
    assert np.array_equal(*videos) and videos[0].shape == (5, 32, 32, 3)
