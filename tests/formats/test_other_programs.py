"""What other programs accept of the files that wanflow writes, by their own rules.

Where a program can be installed here (transformers, diffusers, gguf) it reads the file itself. Of
the others, the rule that a file must meet is written out, with the place it is from.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import wanflow
from wanflow.checkpoint import tokenizers as tokens
from wanflow.checkpoint.checkpoint import fingerprint, open_checkpoint
from wanflow.checkpoint.load import load_tokenizer
from wanflow.convert.convert import convert, open_model
from wanflow.convert.formats import TARGETS, options
from wanflow.train import text

NANO = Path(wanflow.__file__).parent / "assets" / "nano"
EXPERT, T5 = NANO / "high_noise_model", NANO / "models_t5_umt5-xxl-enc-bf16.pth"
PROMPT = "a red circle moves left on a blue background"


def run(source: Path, out: Path, to: str, **how: Any) -> Path:
    return convert(open_model(source, {}), out, options(to, **how), lambda line: None)


# fp8 in ComfyUI


class TextEncoder(nn.Module):
    """ComfyUI from 2024-10 to 2025-12, comfy/sd1_clip.py, SDClipModel: a scaled text encoder has an
    empty parameter of this name, and `load_state_dict` demands equal shapes.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        empty = torch.tensor([], dtype=dtype)
        self.scaled_fp8 = nn.Parameter(empty, requires_grad=False)


def test_comfyui_loads_the_fp8_text_encoder(tmp_path: Path) -> None:
    state = load_file(run(T5, tmp_path / "t5.safetensors", "fp8"))
    model = TextEncoder(state["scaled_fp8"].dtype)
    model.load_state_dict({"scaled_fp8": state["scaled_fp8"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)})


def test_comfyui_quantises_no_activations_of_an_fp8_expert(tmp_path: Path) -> None:
    """comfy/model_detection.py, model_config_from_unet: two elements switch that off."""
    state = load_file(run(EXPERT, tmp_path / "x.safetensors", "fp8"))
    marker = state["scaled_fp8"]
    assert marker.dtype == torch.float8_e4m3fn
    assert marker.nelement() == 2
    assert not any(name.endswith("scale_input") for name in state)


class WanModel:
    """ComfyUI's, comfy/ldm/wan/model.py, in 0.33: what its constructor takes."""

    def __init__(
        self,
        model_type: str = "t2v",
        patch_size: tuple[int, ...] = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        eps: float = 1e-6,
    ) -> None:
        self.sizes = {name: value for name, value in locals().items() if name != "self"}


def comfyui_sizes(file: Path) -> dict[str, Any]:
    """comfy/model_detection.py, detect_unet_config, of Wan: by the tensors, then by the header."""
    state = load_file(file)
    dim = state["head.modulation"].shape[-1]
    sizes = {
        "dim": dim,
        "out_dim": state["head.head.weight"].shape[0] // 4,
        "num_heads": dim // 128,
        "ffn_dim": state["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "patch_size": (1, 2, 2),
        "freq_dim": 256,
        "eps": 1e-6,
        "in_dim": state["patch_embedding.weight"].shape[1],
        "model_type": "t2v",
    }
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    if metadata is not None and "config" in metadata:
        sizes.update(json.loads(metadata["config"]).get("transformer", {}))
    return sizes


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_comfyui_takes_an_experts_sizes_from_the_header(to: str, tmp_path: Path) -> None:
    out = run(NANO, tmp_path / "out", to, parts=("high",))
    (file,) = (out / "diffusion_models").iterdir()
    dit = open_checkpoint(NANO).spec.dit
    found = WanModel(**comfyui_sizes(file)).sizes
    assert found == {name: getattr(dit, name) for name in found}
    assert dit.num_heads != dit.dim // 128
    assert open_checkpoint(NANO, {"high": file}).spec.dit == dit


def test_a_lone_expert_of_unknown_heads_says_nothing_of_them(tmp_path: Path) -> None:
    with safe_open(run(EXPERT, tmp_path / "x.safetensors", "bf16"), framework="pt") as opened:
        assert "config" not in opened.metadata()


# GGUF


def stable_diffusion_cpp(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors' sides, innermost first, as stable-diffusion.cpp's gguf_reader.hpp finds
    them. ggml's own reader refuses five sides, and this one then reads each item of an array as a
    key with a value.
    """
    data = io.BytesIO(file.read_bytes())
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(form: str) -> int:
        value: int = struct.unpack(f"<{form}", data.read(struct.calcsize(f"<{form}")))[0]
        return value

    def words() -> str:
        return data.read(number("Q")).decode()

    def pair() -> None:
        words()
        kind = number("I")
        if kind == 8:
            data.seek(number("Q"), io.SEEK_CUR)
        elif kind == 9:
            number("I")
            for _ in range(number("Q")):
                pair()
        else:
            data.seek(sizes[kind], io.SEEK_CUR)

    assert data.read(4) == b"GGUF"
    number("I")
    tensors, pairs = number("Q"), number("Q")
    for _ in range(pairs):
        pair()
    found = {}
    for _ in range(tensors):
        name = words()
        found[name] = tuple(number("Q") for _ in range(number("I")))
        number("I"), number("Q")
    return found


@pytest.mark.parametrize("to", [name for name in TARGETS if name.startswith("gguf")])
def test_readers_of_gguf_open_every_expert(to: str, tmp_path: Path) -> None:
    out = run(EXPERT, tmp_path / "x.gguf", to)
    found = stable_diffusion_cpp(out)
    assert found["patch_embedding.weight"] == (2, 2, 1, 16, 160)
    reader = gguf.GGUFReader(out)
    assert set(found) == {tensor.name for tensor in reader.tensors}
    # ComfyUI-GGUF's loader.py and diffusers' gguf/utils.py take F32 and F16 as tensors; all other
    # types are unpacked in Linear and Embedding only, which have two sides.
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    odd = [tensor.name for tensor in reader.tensors if tensor.tensor_type not in plain]
    assert all(len(found[name]) == 2 for name in odd), odd


def test_an_array_of_the_original_shape_is_misread_as_they_misread_it(tmp_path: Path) -> None:
    """The rule above sees the fault that it is there for."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [160, 16, 1, 2, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises((struct.error, KeyError, UnicodeDecodeError)):
        stable_diffusion_cpp(tmp_path / "x.gguf")


# tokenizers


def official_ids(folder: Path, length: int) -> list[int]:
    """wan/modules/tokenizers.py, HuggingfaceTokenizer: what the official program's encoder gets."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    how = {"padding": "max_length", "truncation": True, "max_length": length}
    ids: list[int] = tokenizer([PROMPT], add_special_tokens=True, **how)["input_ids"][0]
    return ids


def ours(model: Path) -> list[int]:
    ids: list[int] = load_tokenizer(open_checkpoint(model))([PROMPT])[0][0].tolist()
    return ids


def with_sentencepiece(root: Path) -> Path:
    """Nano with words of its prompts as sentencepiece has them, inside a GGUF text encoder."""
    words = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in PROMPT.split())]
    pieces = tokens.Pieces(
        [(word, -float(n)) for n, word in enumerate(dict.fromkeys(words))],
        [3, 3, 2, *[1] * (len(dict.fromkeys(words)) - 3)],
        b"",
    )
    model = Path(shutil.copytree(NANO, root / "model"))
    place = model / "google/umt5-xxl"
    (place / "tokenizer.json").write_text(tokens.build(pieces, root).to_str())
    out = run(model, root / "gguf", "gguf-q8_0")
    shutil.rmtree(out / "google")
    return out


def test_the_official_program_gets_prompts_that_end(tmp_path: Path) -> None:
    assert official_ids(NANO / "google/umt5-xxl", 32) == ours(NANO)
    assert 1 in ours(NANO)
    # One that is generated, from a tokenizer inside another file; and that one copied.
    out = run(with_sentencepiece(tmp_path), tmp_path / "official", "official")
    assert official_ids(out / "google/umt5-xxl", 32) == ours(out)
    again = run(out, tmp_path / "again", "bf16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        made = (again / "google/umt5-xxl" / name).read_bytes()
        assert made == (out / "google/umt5-xxl" / name).read_bytes()


def test_a_tokenizer_that_does_not_end_prompts_is_mended(tmp_path: Path) -> None:
    """As wanflow wrote them before 2026-12."""
    model = Path(shutil.copytree(NANO, tmp_path / "model"))
    place = model / "google/umt5-xxl"
    (place / "tokenizer_config.json").unlink()
    parsed = json.loads((place / "tokenizer.json").read_bytes())
    (place / "tokenizer.json").write_text(json.dumps(parsed | {"post_processor": None}))
    assert ours(model) == ours(NANO)
    out = run(model, tmp_path / "out", "official", parts=("vae",))
    assert official_ids(out / "google/umt5-xxl", 32) == ours(NANO)


def test_nano_is_the_model_that_recipes_know(tmp_path: Path) -> None:
    assert fingerprint(open_checkpoint(NANO)) == "e0344b796653d108"
    text.build_tokenizer(tmp_path / "tokenizer.json")
    embedded = (NANO / "google/umt5-xxl/tokenizer.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == embedded
