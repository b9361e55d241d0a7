"""Files of adapters: every naming gives W + s * alpha / r * B A, by the formula, by peft and by
diffusers; and what is refused or left out.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_base import _pack_dict_with_prefix
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from helpers.common import refusal
from helpers.tiny import TINY, random_expert, run
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from wanflow.checkpoint.key_maps import from_official
from wanflow.config import RequestError
from wanflow.lora.reader import AdapterFile, describe_adapter, open_adapter, read_adapter
from wanflow.models.dit import WanDiT
from wanflow.presets import Expert
from wanflow.transforms.deltas import (
    Decomposed,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
    changed,
)
from wanflow.transforms.lora import Adapters

RANK, ALPHA = 4, 2.0
MODULES = (
    "blocks.0.self_attn.q",
    "blocks.0.self_attn.o",
    "blocks.1.cross_attn.k",
    "blocks.0.ffn.0",
    "blocks.1.ffn.2",
    "text_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "head.head",
    "patch_embedding",
)
Factors = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def plain() -> WanDiT:
    return random_expert()


@pytest.fixture(scope="module")
def shapes(plain: WanDiT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}


@pytest.fixture(scope="module")
def factors(shapes: dict[str, tuple[int, ...]]) -> Factors:
    """Random up and down of every module."""
    torch.manual_seed(1)
    found = {}
    for module in MODULES:
        out, *rest = shapes[f"{module}.weight"]
        found[module] = (
            torch.randn(out, RANK, *[1] * (len(rest) - 1)) / 4,
            torch.randn(RANK, *rest) / 4,
        )
    return found


def diffusers_name(module: str) -> str:
    return from_official("dit", "diffusers", [f"{module}.weight"])[f"{module}.weight"].removesuffix(
        ".weight"
    )


def by_hand(plain: WanDiT, factors: Factors, scale: float) -> WanDiT:
    """The model with W + scale * up @ down in place of each W."""
    model = copy.deepcopy(plain)
    for module, (up, down) in factors.items():
        weight = model.get_parameter(f"{module}.weight")
        weight.add_(scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape))
    return model


def fused(plain: WanDiT, changes: Any, strength: float = 1.0) -> WanDiT:
    model = copy.deepcopy(plain)
    for name, change in changes.items():
        parameter = model.get_parameter(name)
        parameter.copy_(changed(parameter, change, strength))
    return model


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, one), two in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}")


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path


@pytest.fixture
def read(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> Callable[..., AdapterFile]:
    def reader(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> AdapterFile:
        return read_adapter(write(tmp_path / "adapter.safetensors", tensors, metadata), shapes)

    return reader


# namings: {o} official path, {d} diffusers path, {o_} and {d_} with underscores

AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
NAMINGS: dict[str, tuple[str, tuple[str, str], str]] = {
    "ComfyUI": ("diffusion_model.{o}.", AB, ""),
    "ComfyUI with alpha": ("diffusion_model.{o}.", AB, "alpha"),
    "lightx2v": ("diffusion_model.{o}.", DOWN_UP, "alpha"),
    "whole checkpoint's": ("model.diffusion_model.{o}.", DOWN_UP, "alpha"),
    "diffusers": ("transformer.{d}.", AB, ""),
    "diffusers, official paths": ("transformer.{o}.", AB, ""),
    "official": ("{o}.", AB, ""),
    "DiffSynth": ("pipe.dit.{o}.", AB, ""),
    "DiffSynth, infix": ("{o}.", ("lora_A.default.weight", "lora_B.default.weight"), ""),
    "PEFT": ("base_model.model.{o}.", AB, ""),
    "PEFT, infix": (
        "base_model.model.{d}.",
        ("lora_A.my style.weight", "lora_B.my style.weight"),
        "",
    ),
    "PEFT, nested": ("base_model.model.diffusion_model.{o}.", AB, ""),
    "kohya, musubi": ("lora_unet_{o_}.", DOWN_UP, "alpha"),
    "kohya, diffusers paths": ("lora_unet_{d_}.", DOWN_UP, "alpha"),
    "VideoX-Fun": ("lora_unet__{o_}.", DOWN_UP, "alpha"),
    "LyCORIS": ("lycoris_{o_}.", DOWN_UP, "alpha"),
    "OneTrainer": ("lora_transformer_{d_}.", DOWN_UP, "alpha"),
    "dots": ("diffusion_model.{o}.", ("lora.down.weight", "lora.up.weight"), "alpha"),
    "old diffusers": ("transformer.{d}", ("_lora.down.weight", "_lora.up.weight"), ".alpha"),
    "attention processors": (
        "{d}.",
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        "",
    ),
    "no .weight": ("diffusion_model.{o}.", ("lora_A", "lora_B"), ""),
    "FastVideo": ("{o}.", ("lora_A", "lora_B"), "lora_alpha"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_namings(
    naming: str, plain: WanDiT, factors: Factors, read: Callable[..., AdapterFile]
) -> None:
    stem, (down_end, up_end), alpha_end = NAMINGS[naming]
    tensors = {}
    for module, (up, down) in factors.items():
        d = diffusers_name(module)
        start = stem.format(o=module, d=d, o_=module.replace(".", "_"), d_=d.replace(".", "_"))
        tensors |= {start + down_end: down, start + up_end: up}
        if alpha_end:
            tensors[start + alpha_end] = torch.tensor(ALPHA)
    adapter = read(tensors)
    scale = ALPHA / RANK if alpha_end else 1.0
    assert adapter.unused == {} and adapter.modules == adapter.applied == len(MODULES)
    assert adapter.ranks == (RANK,) and adapter.alphas == ((ALPHA,) if alpha_end else ())
    assert adapter.changes["high"] == adapter.changes["low"]
    same(fused(plain, adapter.changes["high"], 0.7), by_hand(plain, factors, 0.7 * scale))
    live = copy.deepcopy(plain)
    Adapters(live).attach("a", adapter.changes["high"], 0.7)
    torch.testing.assert_close(
        run(live), run(by_hand(plain, factors, 0.7 * scale)), atol=2e-5, rtol=2e-5
    )


def test_all_of_a_block(
    plain: WanDiT, shapes: dict[str, tuple[int, ...]], read: Callable[..., AdapterFile]
) -> None:
    """Every module has its own name in every naming: the norm that changes places, and the
    modulation, too.
    """
    for spell in (
        lambda x: x,
        lambda x: f"transformer.{from_official('dit', 'diffusers', [x])[x]}",
    ):
        tensors, expected = {}, {}
        for name, shape in shapes.items():
            expected[name] = torch.randn(shape)
            spelled = spell(name)
            for end, key in ((".weight", ".diff"), (".bias", ".diff_b"), ("", ".diff")):
                if spelled.endswith(end):
                    tensors[spelled.removesuffix(end) + key] = expected[name]
                    break
        adapter = read(tensors)
        assert adapter.unused == {} and adapter.changes["low"].keys() == shapes.keys()
        model = fused(plain, adapter.changes["low"], 0.5)
        for name, value in expected.items():
            torch.testing.assert_close(
                model.get_parameter(name), plain.get_parameter(name) + 0.5 * value
            )


def test_differences(plain: WanDiT, read: Callable[..., AdapterFile]) -> None:
    """What lightx2v and others write beside matrices: no alpha touches it."""
    r = torch.randn
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": r(4, 32),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": r(32, 4),
        "diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(2.0),
        "diffusion_model.blocks.0.self_attn.q.diff_b": r(32),
        "diffusion_model.blocks.0.diff_m": r(1, 6, 32),
        "diffusion_model.blocks.1.modulation.diff": r(1, 6, 32),
        "diffusion_model.head.modulation.diff_m": r(1, 2, 32),
        "diffusion_model.blocks.0.norm3.diff": r(32),
        "diffusion_model.blocks.0.norm3.diff_b": r(32),
        "diffusion_model.blocks.1.norm3.w_norm": r(32),
        "diffusion_model.blocks.1.norm3.b_norm": r(32),
        "diffusion_model.blocks.0.self_attn.norm_k.diff": r(32),
        "diffusion_model.head.head.diff": r(64, 32),
        "diffusion_model.head.head.diff_b": r(64),
        "lora_unet_blocks_1_ffn_0.set_weight": r(64, 32),
        "patch_embedding.diff": r(32, 16, 1, 2, 2),
    }
    adapter = read(tensors)
    assert adapter.unused == {} and adapter.kinds == {"LoRA": 1, "difference": 12, "replacement": 1}
    model = fused(plain, adapter.changes["high"], 0.5)
    for key, name in {
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "diffusion_model.blocks.0.diff_m": "blocks.0.modulation",
        "diffusion_model.blocks.1.modulation.diff": "blocks.1.modulation",
        "diffusion_model.head.modulation.diff_m": "head.modulation",
        "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "diffusion_model.blocks.1.norm3.w_norm": "blocks.1.norm3.weight",
        "diffusion_model.blocks.1.norm3.b_norm": "blocks.1.norm3.bias",
        "diffusion_model.blocks.0.self_attn.norm_k.diff": "blocks.0.self_attn.norm_k.weight",
        "diffusion_model.head.head.diff_b": "head.head.bias",
        "patch_embedding.diff": "patch_embedding.weight",
    }.items():
        torch.testing.assert_close(
            model.get_parameter(name), plain.get_parameter(name) + 0.5 * tensors[key]
        )
    assert isinstance(adapter.changes["high"]["blocks.1.ffn.0.weight"], Replacement)
    full = fused(plain, adapter.changes["high"])
    assert torch.equal(
        full.get_parameter("blocks.1.ffn.0.weight"), tensors["lora_unet_blocks_1_ffn_0.set_weight"]
    )


def test_lycoris(plain: WanDiT, read: Callable[..., AdapterFile]) -> None:
    """LoHa, LoKr in its four forms and DoRA by the formulas; two whole LoKr factors take no alpha
    (it has no rank).
    """
    r, two = torch.randn, torch.tensor(2.0)
    a, b, c, d, up, down, m = (
        r(32, 4),
        r(4, 32),
        r(32, 4),
        r(4, 32),
        r(64, 4),
        r(4, 32),
        r(64, 1).abs(),
    )
    w1, w2, w1a, w1b, w2a, w2b, row = (
        r(4, 4),
        r(8, 8),
        r(4, 2),
        r(2, 4),
        r(8, 2),
        r(2, 8),
        r(1, 32).abs(),
    )
    p = "lycoris_blocks_0_"
    tensors = {
        **{
            f"{p}self_attn_q.hada_{name}": value
            for name, value in (("w1_a", a), ("w1_b", b), ("w2_a", c), ("w2_b", d), ("alpha", two))
        },
        **{f"{p}self_attn_k.lokr_{name}": value for name, value in (("w1", w1), ("w2", w2))},
        **{
            f"{p}self_attn_v.lokr_{name}": value
            for name, value in (("w1", w1), ("w2_a", w2a), ("w2_b", w2b))
        },
        **{
            f"{p}self_attn_o.lokr_{name}": value
            for name, value in (("w1_a", w1a), ("w1_b", w1b), ("w2_a", w2a), ("w2_b", w2b))
        },
        f"{p}ffn_0.lora_up.weight": up,
        f"{p}ffn_0.lora_down.weight": down,
        f"{p}ffn_0.dora_scale": m,
        f"{p}cross_attn_q.hada_w1_a": a,
        f"{p}cross_attn_q.hada_w1_b": b,
        f"{p}cross_attn_q.hada_w2_a": c,
        f"{p}cross_attn_q.hada_w2_b": d,
        f"{p}cross_attn_q.dora_scale": row,
        **{
            f"{p}{name}.alpha": two.clone()
            for name in (
                "self_attn_q",
                "self_attn_k",
                "self_attn_v",
                "self_attn_o",
                "ffn_0",
                "cross_attn_q",
            )
        },
    }
    tensors.pop(f"{p}self_attn_q.hada_alpha")
    adapter = read(tensors)
    assert adapter.unused == {} and adapter.kinds == {
        "LoHa": 1,
        "LoKr": 3,
        "DoRA": 1,
        "DoRA of LoHa": 1,
    }
    assert adapter.ranks == (2, 4) and adapter.alphas == (2.0,)
    model, w = fused(plain, adapter.changes["low"]), plain.get_parameter
    loha = 0.5 * (a @ b) * (c @ d)
    v = w("blocks.0.ffn.0.weight") + 0.5 * up @ down
    u = w("blocks.0.cross_attn.q.weight") + loha
    for name, expected in {
        "self_attn.q": w("blocks.0.self_attn.q.weight") + loha,
        "self_attn.k": w("blocks.0.self_attn.k.weight") + torch.kron(w1, w2),
        "self_attn.v": w("blocks.0.self_attn.v.weight") + torch.kron(w1, w2a @ w2b),
        "self_attn.o": w("blocks.0.self_attn.o.weight") + torch.kron(w1a @ w1b, w2a @ w2b),
        "ffn.0": m * v / v.norm(dim=1, keepdim=True),
        "cross_attn.q": row * u / u.norm(dim=0, keepdim=True),
    }.items():
        torch.testing.assert_close(model.get_parameter(f"blocks.0.{name}.weight"), expected)


def test_fused_attention(plain: WanDiT, read: Callable[..., AdapterFile]) -> None:
    """diffusers' `fuse_qkv_projections` stacks matrices; low-rank ones come apart, others are
    named.
    """
    up, down, bias = torch.randn(96, 4), torch.randn(4, 32), torch.randn(96)
    tensors = {
        "transformer.blocks.0.attn1.to_qkv.lora_A.weight": down,
        "transformer.blocks.0.attn1.to_qkv.lora_B.weight": up,
        "transformer.blocks.0.attn1.to_qkv.diff_b": bias,
        "transformer.blocks.0.attn2.to_kv.lora_A.weight": down,
        "transformer.blocks.0.attn2.to_kv.lora_B.weight": up[:64],
        "transformer.blocks.1.attn2.to_kv.lokr_w1": torch.ones(2, 1),
        "transformer.blocks.1.attn2.to_kv.lokr_w2": torch.ones(32, 32),
    }
    adapter = read(tensors)
    assert (
        set(adapter.unused.values()) == {"a LoKr of 2 fused weights does not come apart"}
        and len(adapter.unused) == 2
    )
    model = fused(plain, adapter.changes["high"])
    for n, name in enumerate(
        ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.k", "cross_attn.v")
    ):
        rows = slice(32 * (n % 3), 32 * (n % 3) + 32)
        got = model.get_parameter(f"blocks.0.{name}.weight")
        torch.testing.assert_close(
            got, plain.get_parameter(f"blocks.0.{name}.weight") + up[rows] @ down
        )
    torch.testing.assert_close(
        model.get_parameter("blocks.0.self_attn.v.bias"),
        plain.get_parameter("blocks.0.self_attn.v.bias") + bias[64:],
    )


# by others' programs


def peft_models() -> dict[str, Any]:
    # not self_attn.q, whose compute_dtype our blocks read
    targets = [
        "blocks.0.self_attn.v",
        "blocks.1.cross_attn.k",
        "blocks.0.ffn.0",
        "blocks.1.ffn.2",
        "text_embedding.0",
    ]
    lora = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False}
    return {
        "LoRA": peft.LoraConfig(**lora),
        "patterns": peft.LoraConfig(
            **lora,
            rank_pattern={"ffn.0": 2, "blocks.1.cross_attn.k": 3},
            alpha_pattern={"ffn.0": 5, "text_embedding.0": 1},
        ),
        "rsLoRA": peft.LoraConfig(**lora, use_rslora=True),
        "DoRA": peft.LoraConfig(**lora, use_dora=True),
        "biases": peft.LoraConfig(**lora, lora_bias=True),
        "convolution": peft.LoraConfig(
            **{**lora, "target_modules": ["patch_embedding", "blocks.0.ffn.0"]}
        ),
        "DoRA of a convolution": peft.LoraConfig(
            **{**lora, "target_modules": ["patch_embedding"]}, use_dora=True
        ),
        "LoHa": peft.LoHaConfig(r=4, alpha=6, target_modules=targets, init_weights=False),
        "LoKr": peft.LoKrConfig(
            r=2, alpha=6, target_modules=targets, init_weights=False, decompose_both=True
        ),
        "LoKr, whole factors": peft.LoKrConfig(
            r=8, alpha=6, target_modules=targets, init_weights=False
        ),
    }


@pytest.mark.parametrize("kind", peft_models())
def test_peft(kind: str, plain: WanDiT, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    """A folder that PEFT saved gives PEFT's own output, live and fused."""
    torch.manual_seed(5)
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft_models()[kind])
    for name, parameter in theirs.named_parameters():
        if "lora_" in name or "hada_" in name or "lokr_" in name:
            parameter.data.uniform_(0.05, 0.3)
    theirs.eval().save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, shapes)
    assert adapter.unused == {} and adapter.applied == adapter.modules
    expected = run(theirs)
    assert not torch.allclose(expected, run(plain), atol=1e-2)
    torch.testing.assert_close(
        run(fused(plain, adapter.changes["high"])), expected, atol=5e-5, rtol=1e-4
    )
    live = copy.deepcopy(plain)
    Adapters(live).attach("a", adapter.changes["high"])
    torch.testing.assert_close(run(live), expected, atol=5e-5, rtol=1e-4)
    described = describe_adapter(open_adapter(tmp_path))
    assert (
        described is not None
        and described["naming"] == "PEFT"
        and described["rslora"] == (kind == "rsLoRA")
    )


@pytest.fixture(scope="module")
def theirs(plain: WanDiT) -> WanTransformer3DModel:
    """The same weights in diffusers."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
    )
    state = plain.state_dict()
    names = from_official("dit", "diffusers", state)
    model.load_state_dict({names[name]: value for name, value in state.items()})
    return model.eval()


def run_theirs(model: nn.Module) -> Tensor:
    """What `run` computes: padding of the text is the pipeline's business there."""

    def call(latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        padded = nn.functional.pad(text, (0, 0, 0, TINY.text_len - text.shape[1]))
        return model(
            hidden_states=latent, timestep=timestep, encoder_hidden_states=padded, return_dict=False
        )[0]

    return run(call)  # type: ignore[arg-type]


def test_diffusers_writes(
    plain: WanDiT, theirs: WanTransformer3DModel, shapes: Any, tmp_path: Path
) -> None:
    """`save_lora_adapter` and a pipeline's `save_lora_weights` (both experts in one file), with
    alpha in the header.
    """
    model = copy.deepcopy(theirs)
    targets = ["to_q", "to_out.0", "ffn.net.0.proj", "proj_out", "condition_embedder.time_proj"]
    model.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    )
    model.save_lora_adapter(tmp_path / "one")
    adapter = read_adapter(tmp_path / "one", shapes)
    assert adapter.unused == {} and adapter.alphas == (2.0,) and adapter.applied == 12
    expected = run_theirs(model)
    torch.testing.assert_close(
        run(fused(plain, adapter.changes["high"])), expected, atol=5e-5, rtol=1e-4
    )
    other = copy.deepcopy(theirs)
    other.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=8, use_rslora=True, target_modules=["to_k"], init_lora_weights=False
        )
    )
    config, config2 = model.peft_config["default"].to_dict(), other.peft_config["default"].to_dict()
    layers, layers2 = (
        get_peft_model_state_dict(model, adapter_name="default"),
        get_peft_model_state_dict(other, adapter_name="default"),
    )
    WanLoraLoaderMixin.save_lora_weights(
        tmp_path / "two", layers, transformer_lora_adapter_metadata=config
    )
    one = read_adapter(tmp_path / "two", shapes)
    assert one.changes["high"] == one.changes["low"] and one.alphas == (2.0,) and one.applied == 12
    # Both experts in one file, as its pipelines load them; it has no call that writes that.
    tensors = _pack_dict_with_prefix(layers, "transformer") | _pack_dict_with_prefix(
        layers2, "transformer_2"
    )
    header = {f"transformer.{name}": config[name] for name in ("r", "lora_alpha")}
    header |= {f"transformer_2.{name}": config2[name] for name in ("r", "lora_alpha", "use_rslora")}
    write(
        tmp_path / "two" / "pytorch_lora_weights.safetensors",
        tensors,
        {"lora_adapter_metadata": json.dumps(header)},
    )
    both = read_adapter(tmp_path / "two", shapes)
    assert (
        both.unused == {} and both.alphas == (2.0, 8.0) and both.applied == both.modules == 12 + 4
    )
    assert not both.changes["high"].keys() & both.changes["low"].keys()
    torch.testing.assert_close(
        run(fused(plain, both.changes["high"])), expected, atol=5e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        run(fused(plain, both.changes["low"])), run_theirs(other), atol=5e-5, rtol=1e-4
    )


@pytest.mark.parametrize("naming", ["diffusers", "lightx2v", "kohya, musubi"])
def test_diffusers_reads(
    naming: str, plain: WanDiT, theirs: WanTransformer3DModel, read: Callable[..., AdapterFile]
) -> None:
    """A file that diffusers can read (every matmul of every block, alpha there) has the effect it
    has there.
    """
    stem, (down_end, up_end), alpha_end = NAMINGS[naming]
    tensors = {}
    torch.manual_seed(6)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            d = diffusers_name(name)
            start = stem.format(o=name, d=d, o_=name.replace(".", "_"), d_=d.replace(".", "_"))
            tensors[start + down_end] = torch.randn(RANK, module.in_features) / 8
            tensors[start + up_end] = torch.randn(module.out_features, RANK) / 8
            if alpha_end:
                tensors[start + alpha_end] = torch.tensor(ALPHA)
    adapter = read(tensors)
    assert adapter.unused == {} and adapter.applied == 20
    model = copy.deepcopy(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_lora_adapter(
            WanLoraLoaderMixin.lora_state_dict(dict(tensors)), prefix="transformer"
        )
    expected = run_theirs(model)
    assert not torch.allclose(expected, run(plain), atol=1e-3)
    torch.testing.assert_close(
        run(fused(plain, adapter.changes["high"])), expected, atol=5e-5, rtol=1e-4
    )


# experts, reports, refusals


def pair(start: str, out: int = 32, width: int = 32) -> dict[str, Tensor]:
    return {
        f"{start}.lora_A.weight": torch.randn(RANK, width),
        f"{start}.lora_B.weight": torch.randn(out, RANK),
    }


def test_experts(plain: WanDiT, read: Callable[..., AdapterFile]) -> None:
    first = pair("transformer.blocks.0.attn1.to_q")
    alone = read(first)
    assert (
        alone.changes["high"].keys()
        == alone.changes["low"].keys()
        == {"blocks.0.self_attn.q.weight"}
    )
    both = read(first | pair("transformer_2.blocks.0.attn1.to_k") | pair("blocks.1.self_attn.v"))
    assert both.changes["high"].keys() == {
        "blocks.0.self_attn.q.weight",
        "blocks.1.self_attn.v.weight",
    }
    assert both.changes["low"].keys() == {
        "blocks.0.self_attn.k.weight",
        "blocks.1.self_attn.v.weight",
    }
    low = read(pair("transformer_2.blocks.0.attn1.to_k"))
    assert not low.changes["high"] and low.changes["low"] and low.modules == 1
    # One file on two models, each at a strength of its own: they share nothing.
    strengths: dict[Expert, float] = {"high": 0.5, "low": -1.0}
    models = {which: copy.deepcopy(plain) for which in strengths}
    adapters = {which: Adapters(model) for which, model in models.items()}
    for which, strength in strengths.items():
        adapters[which].attach("a", alone.changes[which], strength)
    adapters["low"].set_strength("a", 2.0)
    for which, strength in (("high", 0.5), ("low", 2.0)):
        expected = run(fused(plain, alone.changes["high"], strength))
        torch.testing.assert_close(run(models[which]), expected, atol=2e-5, rtol=2e-5)  # type: ignore[index]


def test_lightning(tmp_path: Path, plain: WanDiT, shapes: Any) -> None:
    """The shape of Wan2.2-Lightning: rank 64, alpha 8, so an eighth of what the matrices alone
    would do.
    """
    tensors = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(
                64, module.in_features, dtype=torch.bfloat16
            )
            tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(
                module.out_features, 64, dtype=torch.bfloat16
            )
            tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(8.0, dtype=torch.bfloat16)
    path = write(
        tmp_path / "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors",
        tensors,
        {"format": "pt"},
    )
    adapter = read_adapter(path, shapes)
    assert adapter.report() == "applied 20 of 20 modules (LoRA, rank 64, alpha 8)"
    change = adapter.changes["high"]["blocks.0.ffn.0.weight"]
    assert (
        isinstance(change, LowRank) and change.scale == 0.125 and change.up.dtype == torch.float32
    )
    assert describe_adapter(open_adapter(path)) == {
        "naming": "ComfyUI",
        "modules": 20,
        "kinds": {"LoRA": 20},
        "ranks": [64],
        "alphas": [8.0],
        "rslora": False,
        "experts": ["high"],
    }


def test_report(read: Callable[..., AdapterFile]) -> None:
    """Every key that has no use is named, with the reason."""
    reasons = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": (
            "image-to-video module of Wan2.1, dropped"
        ),
        "lora_unet_blocks_0_cross_attn_v_img.lora_down.weight": (
            "image-to-video module of Wan2.1, dropped"
        ),
        "transformer.blocks.0.attn2.add_k_proj.lora_A.weight": (
            "image-to-video module of Wan2.1, dropped"
        ),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": (
            "image-to-video module of Wan2.1, dropped"
        ),
        "diffusion_model.img_emb.proj.1.diff_b": "image-to-video module of Wan2.1, dropped",
        "text_encoder.encoder.layers.0.q.lora_A.weight": "text-encoder module",
        "lora_te1_blocks_0_q.lora_down.weight": "text-encoder module",
        "diffusion_model.blocks.7.ffn.0.diff": "no such module in this model",
        "diffusion_model.blocks.0.self_attn.norm_q.diff_b": (
            "no such parameter in this model (blocks.0.self_attn.norm_q.bias)"
        ),
        "diffusion_model.blocks.0.ffn.0.diff": "shape [1000, 7] does not fit [64, 32]",
        "diffusion_model.blocks.0.ffn.2.lora_A.weight": "the rest of its adapter is missing",
        "diffusion_model.blocks.0.self_attn.v.dora_scale": "the rest of its adapter is missing",
        "diffusion_model.blocks.1.ffn.2.alpha": "an alpha without its matrices",
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": (
            "the same part of the same module as "
        ),
        "blocks.0.self_attn.q.diff": "a second change of blocks.0.self_attn.q.weight",
        "diffusion_model.blocks.0.self_attn.o.diff_b": (
            "torch.int32 holds no plain floating-point numbers"
        ),
        "diffusion_model.blocks.0.self_attn.o.lora_C.weight": "no part of any known adapter",
    }
    tensors = {key: torch.ones(1000, 7) for key in reasons} | pair(
        "diffusion_model.blocks.0.self_attn.q"
    )
    tensors["diffusion_model.blocks.1.ffn.2.alpha"] = torch.tensor(1.0)
    tensors["blocks.0.self_attn.q.diff"] = torch.ones(32, 32)
    tensors["diffusion_model.blocks.0.self_attn.o.diff_b"] = torch.ones(32, dtype=torch.int32)
    tensors["diffusion_model.blocks.0.self_attn.q.lora_down.weight"] = torch.ones(4, 32)
    adapter = read(tensors)
    twice = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
    }
    assert adapter.applied == 1 and len(adapter.unused) == len(reasons)
    for key, why in reasons.items():
        found = next(
            adapter.unused[name]
            for name in (twice if key in twice else {key})
            if name in adapter.unused
        )
        assert found.startswith(why), key
    text = adapter.report()
    assert text.startswith(
        f"applied 1 of {adapter.modules} modules (LoRA, rank 4); not used: {len(reasons)} keys ("
    )
    assert (
        "image-to-video module of Wan2.1, dropped: " in text
        and ", …" in text
        and all(why in text for why in set(reasons.values()))
    )


def test_refusals(tmp_path: Path, shapes: Any, read: Callable[..., AdapterFile]) -> None:
    good = pair("blocks.0.self_attn.q")
    with pytest.raises(RequestError, match="no LoRA or other adapter"):
        read({"blocks.0.self_attn.q.weight": torch.ones(32, 32)})
    with pytest.raises(RequestError, match="none of its 1 modules applies.*no such module"):
        read(pair("transformer_blocks.0.attn.to_q"))
    with pytest.raises(RequestError, match="none of its.*does not fit"):
        read(pair("blocks.0.self_attn.q", out=33))
    with pytest.raises(RequestError, match="none of its.*text-encoder"):
        read(pair("text_encoder.layers.0.q"))
    for bad in (float("nan"), float("inf")):
        good["blocks.0.self_attn.q.lora_B.weight"][3, 2] = bad
        with pytest.raises(
            RequestError, match=r"q\.lora_B\.weight holds values that are not finite"
        ):
            read(good)
    good = pair("blocks.0.self_attn.q")
    with pytest.raises(RequestError, match="alpha is"):
        read(good | {"blocks.0.self_attn.q.alpha": torch.tensor(float("nan"))})
    with pytest.raises(RequestError, match="one number"):
        read(good | {"blocks.0.self_attn.q.alpha": torch.ones(2)})
    for header in (
        "[",
        "[" * 100_000,
        '{"r": "many"}',
        '{"r": 4, "lora_alpha": NaN}',
        '{"r": 4, "alpha_pattern": 3}',
        "3",
    ):
        with pytest.raises(RequestError, match="header|configuration"):
            read(good, {"lora_adapter_metadata": header})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "adapter.safetensors").read_bytes()[:-9])
    with pytest.raises(RequestError, match="cut off"):
        read_adapter(tmp_path / "cut.safetensors", shapes)
    with pytest.raises(RequestError, match="missing"):
        read_adapter(tmp_path / "none.safetensors", shapes)


def test_nothing_large_is_made(read: Callable[..., AdapterFile]) -> None:
    """Factors of a product far larger than the weight are refused by their shapes: neither read nor
    multiplied.
    """
    tensors = pair("blocks.0.self_attn.q") | {
        "blocks.0.self_attn.k.lora_B.weight": torch.ones(1 << 20, 1),
        "blocks.0.self_attn.k.lora_A.weight": torch.full((1, 1 << 20), float("nan")),
        "blocks.0.self_attn.v.lokr_w1": torch.ones(1024, 1024),
        "blocks.0.self_attn.v.lokr_w2": torch.ones(1024, 1024),
    }
    adapter = read(tensors)
    assert (
        adapter.applied == 1
        and all("does not fit" in why for why in adapter.unused.values())
        and len(adapter.unused) == 4
    )


def test_torch_files_and_header_notes(
    tmp_path: Path, shapes: Any, read: Callable[..., AdapterFile]
) -> None:
    tensors = pair("blocks.0.self_attn.q")
    torch.save(tensors, tmp_path / "a.pt")
    torch.save({"state_dict": tensors}, tmp_path / "b.bin")
    for name in ("a.pt", "b.bin"):
        assert read_adapter(tmp_path / name, shapes).applied == 1
    # kohya's note of what was trained: where alpha keys are absent, it was multiplied in or never
    # there
    change = read(tensors, {"ss_network_alpha": "1", "ss_network_dim": "4"}).changes["high"][
        "blocks.0.self_attn.q.weight"
    ]
    assert isinstance(change, LowRank) and change.scale == 1.0
    rs = {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.use_rslora": True}
        )
    }
    change = read(pair("transformer.blocks.0.attn1.to_q"), rs).changes["high"][
        "blocks.0.self_attn.q.weight"
    ]
    assert isinstance(change, LowRank) and change.scale == 3.0


def test_describe(tmp_path: Path) -> None:
    described = describe_adapter(
        open_adapter(write(tmp_path / "a.safetensors", pair("transformer_2.blocks.0.attn1.to_q")))
    )
    assert (
        described is not None
        and described["naming"] == "diffusers"
        and described["experts"] == ["low"]
        and described["alphas"] == []
    )
    assert (
        describe_adapter(
            open_adapter(write(tmp_path / "b.safetensors", {"x.weight": torch.ones(1)}))
        )
        is None
    )


def test_kinds_of_changes(read: Callable[..., AdapterFile]) -> None:
    """The values that a loader gets: one class for each kind."""
    r = torch.ones
    adapter = read(
        {
            "blocks.0.self_attn.q.diff": r(32, 32),
            **{
                f"blocks.0.self_attn.k.hada_{name}": r(32, 2) if name.endswith("a") else r(2, 32)
                for name in ("w1_a", "w1_b", "w2_a", "w2_b")
            },
            "blocks.0.self_attn.v.lokr_w1": r(4, 4),
            "blocks.0.self_attn.v.lokr_w2": r(8, 8),
            "blocks.0.self_attn.o.lora_up.weight": r(32, 2),
            "blocks.0.self_attn.o.lora_down.weight": r(2, 32),
            "blocks.0.self_attn.o.lora_magnitude_vector.default.weight": r(32),
        }
    )
    kinds = [type(adapter.changes["high"][f"blocks.0.self_attn.{x}.weight"]) for x in "qkvo"]
    assert adapter.unused == {} and kinds == [Difference, Hadamard, Kronecker, Decomposed]


# A model of one network


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "lora_unet_", "pipe.dit."])
def test_one_network_takes_a_file_that_names_no_expert(
    plain: WanDiT, factors: Factors, shapes: dict[str, tuple[int, ...]], tmp_path: Path, prefix: str
) -> None:
    tensors = {}
    for module, (up, down) in factors.items():
        name = diffusers_name(module) if prefix == "transformer." else module
        name = name.replace(".", "_") if prefix == "lora_unet_" else name
        tensors |= {f"{prefix}{name}.lora_up.weight": up, f"{prefix}{name}.lora_down.weight": down}
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors), shapes, ("dit",))
    assert [*adapter.changes] == ["dit"] and not adapter.unused
    same(fused(plain, adapter.changes["dit"]), by_hand(plain, factors, 1.0))


def test_one_network_takes_nothing_that_is_for_an_expert(
    shapes: dict[str, tuple[int, ...]], factors: Factors, tmp_path: Path
) -> None:
    """A pair in one file; the first of it would be the only network's."""
    up, down = factors["blocks.0.ffn.0"]
    there = diffusers_name("blocks.0.ffn.0")
    tensors = {
        f"{one}.{there}.lora_{side}.weight": value
        for one in ("transformer", "transformer_2")
        for side, value in (("A", down), ("B", up))
    }
    path = write(tmp_path / "a.safetensors", tensors)
    told = refusal(lambda: read_adapter(path, shapes, ("dit",)))
    assert "for the high-noise expert, which this model does not have" in told
    assert read_adapter(path, shapes).applied == 2
