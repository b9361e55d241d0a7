"""Attention kernels: each against float64, the choice among them, and packages that are missing,
broken or lying (as fakes on the path).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.common import PROMPT
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from wanflow.api import Pipeline
from wanflow.config import DiTConfig, RequestError
from wanflow.models.dit import Attend, Attention, WanDiT, sdpa
from wanflow.transforms import attention, attention_kernels
from wanflow.transforms.attention import (
    Trial,
    benchmark,
    card_of,
    choose_kernel,
    order,
    set_attention,
    unsupported_reason,
    warnings_for,
)
from wanflow.transforms.attention_kernels import BACKENDS, Backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = ("sdpa", "flash", "math")  # those that a CPU has
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-14}
SHAPES = [
    (1, 64, 64, 2, 32),
    (2, 33, 512, 3, 128),
    (1, 130, 7, 1, 8),
    (1, 1, 1, 2, 64),
]  # B, L, S, N, K: to itself, to the text, odd, least


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, size = shape
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(batch, rows, heads, size, generator=generator).to(dtype)
        for rows in (queries, keys, keys)
    )
    return 3 * q, k, v


def truth(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, L, N, K] and log-sum-exp [B, N, L], float64, spelled without softmax."""
    scores = torch.einsum("blnk,bsnk->bnls", q.double(), k.double()) * q.shape[-1] ** -0.5
    weights = scores.exp()
    return (
        torch.einsum("bnls,bsnk->blnk", weights / weights.sum(-1, keepdim=True), v.double()),
        weights.sum(-1).log(),
    )


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_each_kernel_against_float64(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = numbers(shape, dtype)
    out, lse = truth(q, k, v)
    backend = BACKENDS[name]
    found = backend.attend(q, k, v)
    assert found.shape == q.shape and found.dtype == dtype
    assert (found.double() - out).abs().max() <= CLOSE[dtype] * v.abs().max()
    assert backend.with_lse is not None
    beside, rows = backend.with_lse(q, k, v)
    assert beside.shape == q.shape and beside.dtype == dtype
    assert (beside.double() - out).abs().max() <= CLOSE[dtype] * v.abs().max()
    assert rows.dtype == torch.float32 and rows.shape == lse.shape
    assert (rows - lse).abs().max() <= (1e-4 if dtype.itemsize == 2 else 1e-5)


def test_slices_of_larger_tensors_are_taken_as_they_are() -> None:
    q, k, v = numbers((1, 64, 64, 4, 64), torch.float32)
    half = [x[:, ::2, 1:3, :32] for x in (q, k, v)]
    for name in HERE:
        assert torch.allclose(BACKENDS[name].attend(*half).double(), truth(*half)[0], atol=1e-5)


@pytest.mark.parametrize("name", HERE)
def test_parts_of_the_keys_are_joined_by_their_log_sum_exp(name: str) -> None:
    """What ring attention does."""
    q, k, v = numbers((1, 40, 96, 2, 32), torch.float32)
    with_lse = BACKENDS[name].with_lse
    assert with_lse is not None
    parts = [
        with_lse(q, k[:, part], v[:, part]) for part in (slice(0, 16), slice(16, 90), slice(90, 96))
    ]
    weights = (
        torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3).unsqueeze(-1)
    )  # [3, B, L, N, 1]
    whole = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    assert torch.allclose(whole, sdpa(q, k, v), atol=2e-6)


# in the model


def test_every_attention_of_a_model_gets_the_same_function() -> None:
    with torch.device("meta"):
        model = WanDiT(
            DiTConfig(
                dim=32, ffn_dim=64, num_heads=2, num_layers=3, text_dim=16, text_len=8, freq_dim=16
            )
        )
    set_attention(model, BACKENDS["math"])
    slots = [module.attend for module in model.modules() if isinstance(module, Attention)]
    assert len(slots) == 6 and set(slots) == {BACKENDS["math"].attend}


def test_a_forward_is_the_same_to_rounding_with_each(nano: Pipeline) -> None:
    """On real weights, the text's keys included."""
    model = deepcopy(nano.parts.expert("high"))
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, 2, 8, 8, generator=generator)
    text, calls = nano.parts.text([PROMPT]), []
    outs = {}
    for name in HERE:
        backend = BACKENDS[name]

        def counted(q: Tensor, k: Tensor, v: Tensor, attend: Attend = backend.attend) -> Tensor:
            calls.append(k.shape[1])
            return attend(q, k, v)

        set_attention(model, replace(backend, attend=counted))
        with torch.no_grad():
            outs[name] = model(latent, torch.tensor([900.0]), text)
    layers = model.config.num_layers
    assert sorted(calls) == sorted([model.config.text_len, 2 * 4 * 4] * layers * len(HERE))
    for name in HERE:
        assert torch.allclose(outs[name], outs["math"], atol=1e-5), name


def test_compiling_sees_one_function_for_all_blocks() -> None:
    """No graph break, and no recompilation from block to block."""
    for name in HERE:
        counter = CompileCounter()
        modules = [Attention(DiTConfig(dim=64, num_heads=2)) for _ in range(3)]
        for module in modules:
            set_attention(module, BACKENDS[name])
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda module, q, k, v: module.attend(q, k, v), backend=counter, fullgraph=True
        )
        q, k, v = numbers((1, 16, 16, 2, 32), torch.float32)
        for module in modules:
            assert torch.allclose(compiled(module, q, k, v), sdpa(q, k, v), atol=1e-6)
        assert counter.frame_count == 1, name


# what is chosen


def test_on_a_cpu_auto_is_pytorchs_own() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose_kernel("auto", CPU, dtype, 32).attend is sdpa
    assert choose_kernel("math", CPU, torch.float32, 128) == BACKENDS["math"]


def gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cudnn: int = 91501,
    hip: str | None = None,
) -> None:
    """What PyTorch says on a machine with such a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.version, "hip", hip)


def as_if(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], works: tuple[str, ...]
) -> None:
    """A GPU of this capability on which these kernels work."""
    gpu(monkeypatch, capability)
    monkeypatch.setattr(
        attention,
        "benchmark",
        lambda backend, *_: Trial(backend, "" if backend.name in works else "it is a fake"),
    )


@pytest.mark.parametrize(
    ("capability", "works", "chosen"),
    [
        ((9, 0), ("cudnn", "flash", "sdpa", "sage"), "cudnn"),
        ((9, 0), tuple(BACKENDS), "flash_attn_3"),
        ((10, 0), ("cudnn", "flash", "sdpa"), "flash"),
        ((12, 0), tuple(BACKENDS), "flash_attn_4"),
        ((8, 0), ("cudnn", "flash", "flash_attn", "sdpa", "sage"), "flash"),
        ((7, 5), ("efficient", "sdpa", "math"), "efficient"),
        ((9, 0), ("sdpa", "math", "sage"), "sdpa"),
    ],
)
def test_auto_takes_the_first_that_works(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    works: tuple[str, ...],
    chosen: str,
) -> None:
    as_if(monkeypatch, capability, works)
    assert choose_kernel("auto", CUDA, torch.bfloat16, 128).name == chosen


def test_auto_never_takes_what_changes_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        as_if(monkeypatch, capability, ("sage", "math"))
        names = order(card_of(CUDA))
        assert all(BACKENDS[name].exact for name in names) and "math" not in names
        with pytest.raises(RequestError, match="these work: math, sage;"):
            choose_kernel("auto", CUDA, torch.bfloat16, 128)


def test_refusals_say_why_and_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="attention 'fast' is none of auto, sdpa, cudnn, flash"):
        choose_kernel("fast", CPU, torch.float32, 128)
    with pytest.raises(RequestError) as refusal:
        choose_kernel("cudnn", CPU, torch.float32, 128)
    first, second = str(refusal.value).splitlines()
    assert first == "attention cudnn: it runs on cuda only, not on cpu"
    assert (
        "on cpu with float32 these work: auto, sdpa, flash, math;" in second
        and "wanflow doctor" in second
    )
    as_if(monkeypatch, (9, 0), ())
    with pytest.raises(RequestError, match="nothing else works either"):
        choose_kernel("flash", CUDA, torch.bfloat16, 128)


BF16, FP16 = torch.bfloat16, torch.float16
AUTO = ("flash_attn_3", "flash_attn_4", "flash_attn", "cudnn", "flash", "efficient", "sdpa")


@pytest.mark.parametrize(
    ("capability", "cudnn", "dtype", "hip", "possible"),
    [
        ((7, 0), 91501, FP16, None, ("efficient",)),
        ((7, 0), 91501, BF16, None, ()),
        ((7, 5), 91501, FP16, None, ("efficient",)),
        ((7, 5), 91501, BF16, None, ()),
        ((8, 6), 91002, BF16, None, ("flash", "efficient")),
        ((8, 6), 91501, BF16, None, ("flash", "cudnn", "efficient")),
        ((8, 9), 91501, FP16, None, ("flash", "cudnn", "efficient")),
        ((9, 0), 91002, BF16, None, ("flash", "efficient")),
        ((9, 0), 91500, BF16, None, ("flash", "efficient")),
        ((9, 0), 0, BF16, None, ("flash", "efficient")),
        ((9, 0), 91501, BF16, None, ("cudnn", "flash", "efficient")),
        ((9, 0), 91501, torch.float32, None, ("efficient",)),
        ((10, 0), 91501, BF16, None, ("flash", "cudnn", "efficient")),
        ((12, 0), 91900, BF16, None, ("flash", "cudnn", "efficient")),
        ((9, 4), 0, BF16, "6.4", ("flash", "efficient")),
        ((11, 0), 0, FP16, "6.4", ("flash", "efficient")),
    ],
)
def test_the_table_of_kernels(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cudnn: int,
    dtype: torch.dtype,
    hip: str | None,
    possible: tuple[str, ...],
) -> None:
    """By capability, cuDNN's version, dtype and vendor, best first, without packages."""
    gpu(monkeypatch, capability, cudnn, hip)
    monkeypatch.setattr(attention, "installed", lambda package: False)
    card = card_of(CUDA)
    assert card is not None
    names = order(card, small=False)
    assert possible == tuple(
        name for name in names if not unsupported_reason(BACKENDS[name], CUDA, dtype, 128)
    )
    assert card.bfloat16 == (hip is not None or capability >= (8, 0))
    assert order(card) == (*names, "sdpa")


@pytest.mark.parametrize(
    ("capability", "hip", "possible"),
    [
        ((7, 5), None, set()),
        ((8, 9), None, {"flash_attn", "flash_attn_4"}),
        ((9, 0), None, {"flash_attn", "flash_attn_3", "flash_attn_4"}),
        ((10, 0), None, {"flash_attn", "flash_attn_4"}),
        ((9, 4), "6.4", {"flash_attn"}),
    ],
)
def test_the_table_of_packages(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    hip: str | None,
    possible: set[str],
) -> None:
    gpu(monkeypatch, capability, hip=hip)
    monkeypatch.setattr(attention, "installed", lambda package: True)
    exact = [kernel for kernel in BACKENDS.values() if kernel.package and kernel.exact]
    found = {each.name for each in exact if not unsupported_reason(each, CUDA, FP16, 128)}
    assert found == possible and found <= set(order(card_of(CUDA)))


def test_an_unsound_cudnn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0), 91002)
    with pytest.raises(RequestError, match=r"cuDNN 9\.10\.2 reads past the end of lengths"):
        choose_kernel("cudnn", CUDA, BF16, 128)


def test_plain_products_are_never_taken_for_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by `auto` nor behind PyTorch's own choice, whose scores would be 457 GB at 720p."""
    as_if(monkeypatch, (7, 5), ("sdpa", "math"))
    for name in ("auto", "sdpa"):
        with pytest.raises(RequestError, match="does not compute in bfloat16, use --dtype float16"):
            choose_kernel(name, CUDA, BF16, 128, small=False)
    assert choose_kernel("auto", CUDA, BF16, 128).name == "sdpa"  # of a small model
    as_if(monkeypatch, (7, 5), ("sdpa", "math", "efficient"))
    assert choose_kernel("sdpa", CUDA, FP16, 128, small=False).name == "sdpa"


def test_what_is_known_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "installed", lambda package: True)

    def why(
        name: str,
        capability: tuple[int, int],
        dtype: torch.dtype = torch.bfloat16,
        head_dim: int = 128,
    ) -> str:
        gpu(monkeypatch, capability)
        return unsupported_reason(BACKENDS[name], CUDA, dtype, head_dim)

    assert (
        why("flash", (9, 0))
        == why("cudnn", (9, 0))
        == why("efficient", (7, 5), torch.float32)
        == ""
    )
    assert "does not compute in float32" in why("flash", (9, 0), torch.float32)
    assert "does not compute in float32" in why("cudnn", (9, 0), torch.float32)
    assert (
        "from 9.0 to below 10.0, and this GPU has 10.0; on Blackwell it imports and then dies"
        in why("flash_attn_3", (10, 0))
    )
    assert "from 9.0 to below 10.0, and this GPU has 8.0" in why("flash_attn_3", (8, 0))
    assert "from 8.0, and this GPU has 7.5" in why("flash_attn", (7, 5))
    assert "at most 128 wide, and these are 256" in why("sage", (8, 9), head_dim=256)
    assert "runs on cpu and cuda only, not on mps" in unsupported_reason(
        BACKENDS["flash"], torch.device("mps"), torch.bfloat16, 128
    )


def test_cautions() -> None:
    assert warnings_for(BACKENDS["cudnn"], "fp8") == []
    assert [
        ("differs" in note, "black" in note) for note in warnings_for(BACKENDS["sage"], "fp8")
    ] == [(True, False), (False, True)]
    assert len(warnings_for(BACKENDS["sage"], "")) == 1


# packages, as fakes on the path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Backend]:
    """Put a module onto the path, and make its kernel one that runs on this CPU."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, source: str) -> Backend:
        package = BACKENDS[name].package
        (tmp_path / f"{package}.py").write_text(source)
        monkeypatch.delitem(sys.modules, package, raising=False)
        backend = replace(BACKENDS[name], devices=("cpu",), dtypes=(torch.float32,))
        monkeypatch.setitem(BACKENDS, name, backend)
        return backend

    yield make
    for backend in BACKENDS.values():
        sys.modules.pop(backend.package, None)


SAGE = """
import torch.nn.functional as F
def sageattn(q, k, v, tensor_layout="HND", is_causal=True):
    assert tensor_layout == "NHD" and not is_causal
    q, k = (x.div(x.abs().max() / 127).round() * (x.abs().max() / 127) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
"""


def test_a_package_that_works(fake: Callable[..., Backend]) -> None:
    backend = fake("sage", SAGE)
    assert choose_kernel("sage", CPU, torch.float32, 64).attend is backend.attend
    trial = benchmark(backend, CPU, torch.float32, 64, budget=1e-6)
    assert trial.why == "" and 1e-4 < trial.error < attention.LOSSY_BOUND and trial.seconds > 0
    assert "return_lse" in trial.lse_why and trial.backend.with_lse is None
    assert choose_kernel("auto", CPU, torch.float32, 64).name == "sdpa"


SAGE_2 = """
import torch
def sageattn(q, k, v, tensor_layout="HND", is_causal=True, sm_scale=None, return_lse=False, **_):
    assert tensor_layout == "NHD" and not is_causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mean, scale = k.mean(2, keepdim=True), q.shape[-1] ** -0.5
    step = q.abs().amax() / 127
    scores = (q / step).round() * step @ (k - mean).mT * scale
    lse = torch.log2(scores.exp().sum(-1))
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    correction = (q @ mean.mT).squeeze(-1) * scale
    return (out, {lse}) if return_lse else out
"""


def test_sageattentions_log_sum_exp(fake: Callable[..., Backend]) -> None:
    """Natural, scaled, and of keys with their mean: a build that forgets one gets no ring."""
    for lse, right in (
        ("lse / 1.44269504 + correction", True),
        ("lse / 1.44269504", False),
        ("lse + correction", False),
        ("lse / 1.44269504 + correction / scale", False),
    ):
        backend = fake("sage", SAGE_2.format(lse=lse))
        trial = benchmark(backend, CPU, torch.float32, 64)
        assert trial.why == "" and (trial.lse_why == "") == right, lse
        assert (choose_kernel("sage", CPU, torch.float32, 64).with_lse is not None) == right


def test_a_ring_joins_sageattentions_parts(fake: Callable[..., Backend]) -> None:
    """Each part of the keys has a mean of its own."""
    backend = fake("sage", SAGE_2.format(lse="lse / 1.44269504 + correction"))
    assert backend.with_lse is not None
    q, k, v = numbers((1, 40, 96, 2, 32), torch.float32)
    k[:, :50] += 2
    parts = [backend.with_lse(q, k[:, part], v[:, part]) for part in (slice(0, 50), slice(50, 96))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3).unsqueeze(-1)
    whole = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    assert torch.allclose(whole, sdpa(q, k, v), atol=0.1)
    wrong = weights.roll(1, 0)
    other = sum(weight * out for weight, (out, _) in zip(wrong, parts, strict=True))
    assert not torch.allclose(other, sdpa(q, k, v), atol=1)


SAGE_3 = """
def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    assert attn_mask is None and not is_causal and q.shape[1] == {heads}
    k -= k.mean(dim=-2, keepdim=True)
    q, k = (x.div(x.abs().max() / 15).round() * (x.abs().max() / 15) for x in (q, k))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
"""


def test_sageattention_3_leaves_the_keys_as_they_are(fake: Callable[..., Backend]) -> None:
    """The package changes them, and those of the text serve every step."""
    backend = fake("sage_3", SAGE_3.format(heads=3))
    q, k, v = numbers((1, 40, 24, 3, 64), torch.float32)
    before = k.clone()
    assert backend.attend(q / 3, k, v).shape == q.shape and torch.equal(k, before)
    backend = fake("sage_3", SAGE_3.format(heads=2))
    trial = benchmark(backend, CPU, torch.float32, 64)
    assert trial.why == "" and trial.error > 1e-3 and trial.backend.with_lse is None
    assert "4-bit" in warnings_for(backend, "")[0] and "sage_3" not in order(None)


def test_sageattention_3_is_for_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "installed", lambda package: True)
    for capability, works in (((9, 0), False), ((10, 0), True), ((12, 0), True)):
        gpu(monkeypatch, capability)
        assert works == (not unsupported_reason(BACKENDS["sage_3"], CUDA, BF16, 128))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "raise ImportError('undefined symbol: _ZN3c10')",
            "ImportError: undefined symbol: _ZN3c10",
        ),
        ("raise ValueError('no GPU found')", "ValueError: no GPU found"),
        ("", "ImportError: cannot import name"),
        (
            (
                "def sageattn(*args, **kwargs):\n raise RuntimeError('CUDA error: no kernel image"
                " is available\\nmore')"
            ),
            "no kernel image is available)",
        ),
        ("def sageattn(q, *args, **kwargs):\n return q.new_zeros(())", "IndexError"),
        (
            "def sageattn(q, *args, **kwargs):\n import torch; return torch.randn_like(q)",
            "wrong numbers",
        ),
        ("def sageattn(q, *args, **kwargs):\n return q * float('nan')", "wrong numbers: nan"),
        ("def sageattn(q, *args, **kwargs):\n return q[:, :, :1]", "wrong numbers"),
    ],
)
def test_a_package_that_does_not(fake: Callable[..., Backend], source: str, words: str) -> None:
    backend = fake("sage", source)
    assert words in benchmark(backend, CPU, torch.float32, 64).why
    with pytest.raises(RequestError) as refusal:
        choose_kernel("sage", CPU, torch.float32, 64)
    assert words in str(refusal.value) and "these work: auto, sdpa, flash, math;" in str(
        refusal.value
    )


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        BACKENDS,
        "sage",
        replace(
            BACKENDS["sage"], devices=("cpu",), dtypes=(torch.float32,), package="sage_not_here"
        ),
    )
    with pytest.raises(RequestError, match="the package sage_not_here is not installed"):
        choose_kernel("sage", CPU, torch.float32, 64)


FLASH = """
import torch
def flash_attn_func(q, k, v{flag}):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*(x.transpose(1, 2) for x in (q, k, v)))
    out, lse = out.transpose(1, 2), torch.nn.functional.pad(lse, (0, 7), value=9.0)
    return {result}
"""


FLASH_4 = """
import torch
class Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, return_lse):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2), lse if return_lse else None
def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
                    window_size=(None, None), return_lse=False):
    return Flash.apply(q, k, v, return_lse)
"""


def test_flash_attention_4_beside_2_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies in the folder of version 2, which without that one is no module."""
    folder = tmp_path / "flash_attn"
    (folder / "cute").mkdir(parents=True)
    (folder / "cute" / "__init__.py").write_text(FLASH_4)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    kernel = replace(BACKENDS["flash_attn_4"], devices=("cpu",), dtypes=(torch.float32,))
    monkeypatch.setitem(BACKENDS, "flash_attn_4", kernel)
    try:
        assert attention.installed("flash_attn.cute") and not attention.installed("flash_attn")
        assert "flash_attn" not in sys.modules  # found, not imported
        trial = benchmark(kernel, CPU, torch.float32, 64)
        assert trial.why == trial.lse_why == "" and trial.lse_error < 1e-5
        (folder / "__init__.py").write_text("")
        assert attention.installed("flash_attn.cute")
        sys.modules.pop("flash_attn")
        assert attention.installed("flash_attn")
        (folder / "cute" / "__init__.py").unlink()
        (folder / "cute").rmdir()
        assert not attention.installed("flash_attn.cute")
    finally:
        for name in ("flash_attn", "flash_attn.cute"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "flag", "result"),
    [
        (
            "flash_attn",
            ", return_attn_probs=False",
            "(out, lse, None) if return_attn_probs else out",
        ),
        ("flash_attn_3", ", return_attn_probs=False", "(out, lse) if return_attn_probs else out"),
        ("flash_attn_3", "", "(out, lse)"),
    ],
)
def test_flash_attentions_ways_to_return(
    fake: Callable[..., Backend], name: str, flag: str, result: str
) -> None:
    source = FLASH.format(flag=flag, result=result)
    trial = benchmark(fake(name, source), CPU, torch.float32, 64)
    assert trial.why == trial.lse_why == "" and trial.lse_error < 1e-5
    assert trial.backend.with_lse is not None


def test_a_wrong_log_sum_exp_costs_only_that(fake: Callable[..., Backend]) -> None:
    source = FLASH.format(
        flag=", return_attn_probs=False",
        result="(out, lse / 0.69314718) if return_attn_probs else out",
    )
    backend = fake("flash_attn", source)
    chosen = choose_kernel("flash_attn", CPU, torch.float32, 64)
    assert chosen.attend is backend.attend and chosen.with_lse is None
    assert "log-sum-exp is wrong" in benchmark(backend, CPU, torch.float32, 64).lse_why


def test_a_package_is_no_break_for_compiling(fake: Callable[..., Backend]) -> None:
    backend = fake("flash_attn", FLASH.format(flag="", result="out"))
    q, k, v = numbers((1, 16, 16, 2, 32), torch.float32)
    compiled = torch.compile(backend.attend, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v), sdpa(q, k, v), atol=1e-6)


def test_sage_on_hopper_is_refused_for_its_fp8_values(
    fake: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, (9, 0))
    for source, words in (
        (SAGE + "\nsageattn_qk_int8_pv_fp8_cuda_sm90 = sageattn", "noise with Wan2.2"),
        (SAGE, ""),
    ):
        backend = replace(fake("sage", source), devices=("cuda",), dtypes=(torch.bfloat16,))
        why = unsupported_reason(backend, CUDA, torch.bfloat16, 128)
        assert words in why and bool(why) == bool(words)


def test_importing_imports_no_kernel_package(tmp_path: Path) -> None:
    for package in ("flash_attn", "flash_attn_interface", "sageattention"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import wanflow.transforms.attention as"
        " a; print(a.installed('flash_attn'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_log_sum_exps_with_rows_or_dimensions_too_many() -> None:
    """As the memory-efficient kernel (rows up to a multiple of 32) and cuDNN's (a dimension at the
    end) return them, which no CPU has.
    """
    out, lse = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40)
    for given in (
        torch.nn.functional.pad(lse, (0, 24), value=9.0),
        lse.unsqueeze(-1),
        lse.double(),
    ):
        turned, rows = attention_kernels._finish(out, given, 40)
        assert (
            turned.shape == (2, 40, 3, 8) and rows.dtype == torch.float32 and torch.equal(rows, lse)
        )
