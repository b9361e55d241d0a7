"""GPUs without bfloat16 (Volta, Turing): float16 for the experts, never for the text encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.plans import of

from wanflow.checkpoint.checkpoint import published
from wanflow.choices import choose_dtype, choose_text_dtype, has_bfloat16
from wanflow.config import DiTConfig
from wanflow.models.dit import Linear, PatchEmbedding, WanDiT
from wanflow.plan.gpus import described
from wanflow.plan.plan import set_up
from wanflow.presets import T2V_A14B
from wanflow.runtime import Runtime
from wanflow.sanity import Facts, OutputError, check_step
from wanflow.transforms.quant import choose_way

CUDA = torch.device("cuda")
LARGE = 57 * 10**9
OLD = ("t4", "v100-16gb", "v100-32gb", "rtx2080ti")


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.parametrize(
    ("capability", "hip", "dtype"),
    [
        ((7, 0), None, torch.float16),
        ((7, 5), None, torch.float16),
        ((8, 0), None, torch.bfloat16),
        ((8, 6), None, torch.bfloat16),
        ((9, 0), None, torch.bfloat16),
        ((12, 0), None, torch.bfloat16),
        ((9, 0), "6.4", torch.bfloat16),  # AMD's numbers are others
    ],
)
def test_auto_is_float16_where_bfloat16_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    hip: str | None,
    dtype: torch.dtype,
) -> None:
    gpu(monkeypatch, capability, hip)
    has = has_bfloat16(CUDA)
    assert choose_dtype("auto", False, LARGE, has) == dtype
    assert choose_dtype("auto", False, 1, has) == dtype
    assert choose_dtype("bfloat16", False, LARGE, has) == torch.bfloat16  # the kernels refuse it
    assert choose_text_dtype(dtype, small=False) == torch.bfloat16
    assert has_bfloat16(torch.device("cpu")) and has_bfloat16(torch.device("mps"))


@pytest.mark.parametrize("mode", ["fp8", "int8"])
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_eight_bits_are_weight_only_there(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], mode: Any
) -> None:
    gpu(monkeypatch, capability, None)
    assert choose_way(mode, torch.float16, CUDA, 5120, 13824) == "weight-only"


@pytest.mark.parametrize("card", OLD)
def test_a_plan_begins_in_float16_and_says_what_else_computes_in_what(card: str) -> None:
    request = of(T2V_A14B, size="832*480", frame_num=17)
    plan = set_up(published(), request, Runtime(), described(card))
    assert plan.dtype == torch.float16
    (reason,) = plan.reasons
    for words in ("float16", "memory-efficient", "text encoder", "bfloat16", "VAE in float32"):
        assert words in reason
    assert set_up(published(), request, Runtime(), described("a100-80gb")).reasons == ()
    on_cpu = set_up(published(), request, Runtime(device="cpu"), described(card))
    assert on_cpu.dtype == torch.bfloat16 and on_cpu.reasons == ()


# float16 has no room above 65,504


def model(dtype: torch.dtype, ffn: float) -> WanDiT:
    """A small model whose tokens are as wide as a full one's: weights that float16 holds."""
    torch.manual_seed(0)
    built = WanDiT(
        DiTConfig(
            dim=64, ffn_dim=256, num_heads=2, num_layers=3, text_dim=16, text_len=8, freq_dim=16
        )
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(parameter.half())
        for block in built.blocks:
            block.modulation.normal_()
            for weight, factor in (
                (block.self_attn.q.weight, 300),  # 300 squared is more than float16 holds
                (block.self_attn.k.weight, 300),
                (block.self_attn.o.weight, 100),
                (block.ffn[0].weight, 10),
                (block.ffn[2].weight, ffn),
            ):
                weight.mul_(factor)
    for module in built.modules():
        if isinstance(module, Linear | PatchEmbedding):
            module.weight.data = module.weight.data.to(dtype)
    return built.eval()


def passed(ffn: float, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """What a pass gives, and the largest value between two blocks."""
    built, largest = model(dtype, ffn), []
    assert built.blocks[0].ffn[0].compute_dtype == dtype
    for block in built.blocks:
        block.register_forward_hook(lambda *given: largest.append(float(given[2].abs().max())))
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, 2, 8, 8, generator=generator)
    text = torch.randn(1, 8, 16, generator=generator)
    with torch.no_grad():
        return built(latent, torch.tensor([900.0]), text), max(largest)


def test_tokens_may_be_larger_than_float16_holds() -> None:
    """They and the norms are float32; only what is between two products is float16."""
    exact, largest = passed(4000, torch.float32)
    found, also = passed(4000, torch.float16)
    assert largest > 65504 and also > 65504
    assert (found - exact).abs().max() <= 5e-3 * exact.abs().max()


def test_a_product_that_overflows_is_named() -> None:
    found, _ = passed(2e4, torch.float16)
    facts = Facts("float16", "efficient", "", (), 4, 40)
    with pytest.raises(OutputError, match="step 3 gave NaN or infinity: float16 overflows: use"):
        check_step(found, 3, facts)
    exact, _ = passed(2e4, torch.float32)
    assert exact.isfinite().all()
