"""What the models promise beside their numbers: equal ways to the same result, memory, refusals,
precision, gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.memory import measurable, measured
from torch import Tensor, nn

from wanflow.checkpoint.tokenizers import open_tokenizer
from wanflow.config import DiTConfig, RequestError, TextConfig, VAE22Config, VAEConfig
from wanflow.models import vae as autoencoder
from wanflow.models.dit import Block, Conditioning, Head, Linear, WanDiT, run_blocks
from wanflow.models.tokenizer import Tokenizer, clean
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.models.vae22 import WanVAE22
from wanflow.train.text import build_tokenizer

DIT = DiTConfig(
    dim=48,
    ffn_dim=96,
    num_heads=2,
    num_layers=3,
    in_dim=4,
    out_dim=4,
    text_dim=12,
    text_len=10,
    freq_dim=32,
)
TEXT = TextConfig(vocab=50, dim=24, dim_attn=32, dim_ffn=40, num_heads=4, num_layers=2)
VAE = VAEConfig(
    dim=8, z_dim=4, num_res_blocks=1, latent_mean=(0.3, -1, 0, 2), latent_std=(1.5, 0.7, 2, 1)
)
VAE22 = VAE22Config(
    dim=4,
    dec_dim=8,
    z_dim=4,
    num_res_blocks=1,
    latent_mean=VAE.latent_mean,
    latent_std=VAE.latent_std,
)
# float32 keeps 24 bits: outputs of order 1 after some dozens of operations agree to a few 1e-6 (the
# golden numbers tell as much).
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
# bfloat16 keeps 8 bits, an error of up to 2^-9 = 0.2 % in each rounding of weights and activations,
# which a few dozen roundings in a row, partly averaged out, bring to some per cent of the output's
# size.
BF16 = 0.03


@torch.no_grad()
def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
            parameter.copy_(1 + 0.2 * noise)
        else:
            small = name.endswith("bias") or parameter.shape[0] == 1
            parameter.copy_(0.2 * noise if small else noise * parameter[0].numel() ** -0.5)
    return module.eval()


@pytest.fixture
def dit() -> WanDiT:
    return randomised(WanDiT(DIT)).requires_grad_(False)  # type: ignore[return-value]


@pytest.fixture(params=["Wan2.1", "Wan2.2"])
def vae(request: pytest.FixtureRequest) -> WanVAE:
    made = WanVAE(VAE) if request.param == "Wan2.1" else WanVAE22(VAE22)
    return randomised(made).requires_grad_(False)  # type: ignore[return-value]


@pytest.fixture
def encoder() -> UMT5Encoder:
    return randomised(UMT5Encoder(TEXT)).requires_grad_(False)  # type: ignore[return-value]


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(batch: int = 2) -> Tensor:
    return randn(batch, 4, 3, 6, 10)


def texts(batch: int = 2) -> Tensor:
    text = randn(batch, 10, 12, seed=2)
    for row, length in zip(text, (7, 3), strict=False):
        row[length:] = 0
    return text


def same(a: Tensor, b: Tensor) -> None:
    """Bit for bit."""
    assert a.dtype == b.dtype and torch.equal(a, b)


def off(low: Tensor, full: Tensor) -> float:
    """Size of the difference relative to the size of what is right."""
    return float((low.float() - full).square().mean().sqrt() / full.square().mean().sqrt())


# --- the transformer: equal ways ---


def test_prepared_text_is_the_same_text(dit: WanDiT) -> None:
    x, text, t = latents(), texts(), torch.tensor([970, 31])
    states = dit.text_states(text)
    same(dit(x, t, states), dit(x, t, text))
    same(dit(x, t, states), dit(x, t, states))  # and it is not used up


def test_missing_text_rows_count_as_zero(dit: WanDiT) -> None:
    text, t = texts(1), torch.tensor([500])
    same(dit(latents(1), t, text[:, :7]), dit(latents(1), t, text))


def test_zero_text_rows_are_attended_to(dit: WanDiT) -> None:
    """They turn nonzero in the text embedding: more or fewer of them is another result."""
    text, t = texts(1), torch.tensor([500])
    shorter = WanDiT(DiTConfig(**{**vars(DIT), "text_len": 7}))
    shorter.load_state_dict(dit.state_dict())
    assert (
        off(shorter.requires_grad_(False)(latents(1), t, text[:, :7]), dit(latents(1), t, text))
        > 1e-2
    )


def test_two_branches_in_one_batch(dit: WanDiT) -> None:
    x, t = latents(1), torch.tensor([812.0])
    both = dit(x.expand(2, -1, -1, -1, -1), t.expand(2), texts())
    for branch in range(2):
        torch.testing.assert_close(
            both[branch : branch + 1], dit(x, t, texts()[branch : branch + 1]), **ROUNDING
        )


@pytest.mark.parametrize("times", [[999, 999], [3, 875.5]], ids=["one", "two"])
def test_timestep_per_token(dit: WanDiT, times: list[float]) -> None:
    x, text, t = latents(), texts(), torch.tensor(times)
    tokens = 3 * 3 * 5
    torch.testing.assert_close(
        dit(x, t[:, None].expand(-1, tokens), text), dit(x, t, text), **ROUNDING
    )


def test_timesteps_of_tokens_differ(dit: WanDiT) -> None:
    """Each token takes its own: changing one leaves the time rows of the others alone, and changes
    the output.
    """
    x, text, t = latents(1), texts(1), torch.full((1, 45), 600)
    changed = t.clone()
    changed[0, 7] = 0
    assert off(dit(x, changed, text), dit(x, t, text)) > 1e-3
    time, _, index = dit._time(changed, 1, 45)
    assert index is not None and time.shape == (1, 2, 48)
    assert index[0].tolist() == [0 if n == 7 else 1 for n in range(45)]


def test_trunk_is_handed_blocks_and_tokens(dit: WanDiT) -> None:
    """Block streaming passes a generator; the result is the same."""
    x, t = latents(), torch.tensor([5, 6])

    def streamed(
        blocks: Iterable[Block], head: Head, tokens: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return run_blocks((block for block in blocks), head, tokens, conditioning)

    same(dit(x, t, texts(), streamed), dit(x, t, texts()))


# --- the autoencoder: equal ways, and memory ---


@pytest.mark.parametrize("groups", [2, 3, 100])
@pytest.mark.parametrize("length", [1, 2, 5, 6])
def test_chunked_is_whole(vae: WanVAE, length: int, groups: int) -> None:
    latent = randn(2, 4, length, 3, 4)
    video = randn(2, 3, 4 * length - 3, 16, 32)
    torch.testing.assert_close(vae.decode(latent, groups), vae.decode(latent), **ROUNDING)
    torch.testing.assert_close(vae.encode(video, groups), vae.encode(video), **ROUNDING)


@pytest.mark.parametrize("strips", [100, 7, 2])
def test_strips_of_rows_are_the_whole(
    vae: WanVAE, monkeypatch: pytest.MonkeyPatch, strips: int
) -> None:
    """Where a convolution prepares some rows at a time, no row is missing, double or too old."""
    latent, video = randn(1, 4, 3, 3, 4), randn(1, 3, 9, 48, 32)
    whole = vae.decode(latent), vae.encode(video)
    heights = set()

    def noted(frames: list[Tensor], *args: Any) -> None:
        heights.add(frames[0].shape[2])
        convolve(frames, *args)

    convolve = autoencoder.conv_pairs
    monkeypatch.setattr(autoencoder, "conv_pairs", noted)
    monkeypatch.setattr(autoencoder, "LARGE", 0)
    monkeypatch.setattr(autoencoder, "STRIPS", strips)
    torch.testing.assert_close(vae.decode(latent), whole[0], **ROUNDING)
    torch.testing.assert_close(vae.encode(video), whole[1], **ROUNDING)
    assert heights and max(heights) <= -(-48 // strips) + 2  # one row more on each side


def test_no_frame_sees_the_future(vae: WanVAE) -> None:
    """A longer clip begins with the shorter one, bit for bit."""
    latent, video = randn(1, 4, 4, 3, 3), randn(1, 3, 13, 32, 16)
    same(vae.decode(latent)[:, :, :5], vae.decode(latent[:, :, :2]))
    same(vae.encode(video)[:, :, :2], vae.encode(video[:, :, :5]))


def test_a_call_leaves_nothing_behind(vae: WanVAE) -> None:
    latent = randn(1, 4, 3, 3, 3)
    first = vae.decode(latent)
    vae.decode(randn(1, 4, 2, 5, 4, seed=9))
    unfinished = vae.decode_frames(latent)
    next(unfinished)
    same(vae.decode(latent), first)


def test_input_is_not_changed(vae: WanVAE, dit: WanDiT) -> None:
    latent, video = randn(1, 4, 2, 2, 2), randn(1, 3, 5, 16, 16)
    kept = latent.clone(), video.clone()
    vae.decode(latent)
    vae.encode(video)
    dit(latent, torch.tensor([1]), texts(1))
    same(latent, kept[0])
    same(video, kept[1])


def test_gradient_mode_changes_nothing(vae: WanVAE) -> None:
    """Where no gradient is wanted, sums are in place and convolutions may go another way."""
    latent, video = randn(1, 4, 3, 3, 3), randn(1, 3, 9, 16, 16)
    with torch.no_grad():
        plain = vae.decode(latent), vae.encode(video)
    vae.requires_grad_(True)
    torch.testing.assert_close(vae.decode(latent).detach(), plain[0], **ROUNDING)
    torch.testing.assert_close(vae.encode(video).detach(), plain[1], **ROUNDING)


def test_frames_wait_while_they_are_small(vae: WanVAE) -> None:
    """After a doubling of time, two frames are enlarged and pass on before the next two are."""
    counts: list[int] = []
    for layer in vae.decoder.modules():
        if isinstance(layer, autoencoder.Upsample):
            layer.resample.register_forward_pre_hook(
                lambda _, args: counts.append(args[0].shape[2])
            )
    with torch.no_grad():
        vae.decode(randn(1, 4, 2, 9, 9))
    assert set(counts) == {1, 2}


def held(states: dict[nn.Module, Tensor]) -> tuple[int, int]:
    """Bytes of a decoder's memory: what is kept alive, and what is looked at."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in states.values()
    }
    return sum(storages.values()), sum(value.nbytes for value in states.values())


def decoder_memory(vae: WanVAE, frames: int, groups: int = 1) -> list[tuple[int, int]]:
    """`held` after each part that comes out."""
    parts = vae.decode_frames(randn(1, 4, frames, 4, 4), groups)
    return [held(parts.gi_frame.f_locals["state"]) for _ in parts]  # type: ignore[attr-defined]


def test_decoder_memory_stays_the_same(vae: WanVAE) -> None:
    with torch.no_grad():
        kept = decoder_memory(vae, 11)
    assert kept[3] == kept[4] == kept[10], kept
    assert kept[2][0] <= 1.3 * kept[1][0]  # time upsampling is filled by the third frame


def test_decoder_keeps_only_what_it_looks_at(vae: WanVAE) -> None:
    with torch.no_grad():
        for alive, needed in decoder_memory(vae, 5):
            assert alive <= needed * 1.05  # a view would keep the whole chunk it looks at


WATCH = """
import json, sys, torch
from helpers.memory import anonymous
from wanflow.config import VAE22Config, VAEConfig
from wanflow.models.vae import WanVAE
from wanflow.models.vae22 import WanVAE22

same = {"dim": 8, "z_dim": 4, "num_res_blocks": 1}
same |= {"latent_mean": (0.0,) * 4, "latent_std": (1.0,) * 4}
if sys.argv[1] == "Wan2.1":
    vae = WanVAE(VAEConfig(**same)).requires_grad_(False)
else:  # its last images are as large in channels, and half as large in pixels along each side
    vae = WanVAE22(VAE22Config(dec_dim=32, **same)).requires_grad_(False)

top = 0.0
kept = None

def watch(*told):
    global top
    top = max(top, anonymous())
    if kept is not None:
        kept.append(told[-1])

for module in vae.modules():  # every layer: between the parts that come out, most is free again
    module.register_forward_hook(watch)

def most(frames, leak=False):
    global top, kept
    top, kept = 0.0, [] if leak else None
    with torch.no_grad():
        for part in vae.decode_frames(torch.zeros(1, 4, frames, 12, 12)):
            watch(part)
    return top

most(2)  # one-off buffers of the kernels
print(json.dumps({"short": most(2), "long": most(11), "leaking": most(11, leak=True)}))
"""


@pytest.mark.slow
@measurable
@pytest.mark.parametrize("kind", ["Wan2.1", "Wan2.2"])
def test_resident_memory_does_not_grow_with_frames(kind: str) -> None:
    """41 frames against 5, in a process of its own; keeping what the layers make shows that growth
    would be seen.
    """
    # What is freed goes back at once.
    (top,) = measured(WATCH, kind, MALLOC_MMAP_THRESHOLD_="65536")
    frame_of_activations = 8 * 96 * 96 * 4  # bytes of one tensor of one frame at full size
    assert top["leaking"] - top["short"] > 60 * frame_of_activations, top
    assert top["long"] - top["short"] < 8 * frame_of_activations, top


# --- refusals ---

Call = Callable[[WanDiT, WanVAE], object]
REFUSED: dict[str, tuple[Call, str]] = {
    "latent_rank": (
        lambda dit, vae: dit(latents()[0], torch.tensor([1]), texts(1)),
        r"latent is \[4, 3, 6, 10\]",
    ),
    "latent_channels": (
        lambda dit, vae: dit(latents()[:, :3], torch.tensor([1, 2]), texts()),
        r"latent is .* not \[B, 4, T",
    ),
    "latent_odd": (
        lambda dit, vae: dit(latents()[..., :9], torch.tensor([1, 2]), texts()),
        "even W",
    ),
    "text_too_long": (
        lambda dit, vae: dit(latents(), torch.tensor([1, 2]), randn(2, 11, 12)),
        "at most 10, 12",
    ),
    "text_width": (
        lambda dit, vae: dit(latents(), torch.tensor([1, 2]), randn(2, 10, 11)),
        "at most 10, 12",
    ),
    "text_rank": (lambda dit, vae: dit.text_states(texts()[0]), r"text is \[10, 12\]"),
    "timestep_tokens": (
        lambda dit, vae: dit(latents(), torch.ones(2, 44), texts()),
        r"timestep is \[2, 44\], not .* \[2, 45\]",
    ),
    "video_frames": (
        lambda dit, vae: vae.encode(randn(1, 3, 4, 16, 16)),
        r"a video of 4 frames.*4n\+1",
    ),
    "video_none": (lambda dit, vae: vae.encode(randn(1, 3, 0, 16, 16)), r"video.*\b0\b"),
    "video_size": (
        lambda dit, vae: vae.encode(randn(1, 3, 1, 16, 20)),
        "a video of 1 frames, 20.16.*multiples of (8|16)",
    ),
}
SHAPES: dict[str, Call] = {
    "timestep_batch": lambda dit, vae: dit(latents(), torch.tensor([1, 2, 3]), texts()),
    "text_batch": lambda dit, vae: dit(latents(), torch.tensor([1, 2]), randn(3, 10, 12)),
    "video_rank": lambda dit, vae: vae.encode(randn(3, 1, 16, 16)),
    "video_channels": lambda dit, vae: vae.encode(randn(1, 4, 1, 16, 16)),
    "decode_rank": lambda dit, vae: vae.decode(randn(4, 1, 2, 2)),
    "decode_one_channel": lambda dit, vae: vae.decode(randn(1, 1, 1, 2, 2)),
    "decode_channels": lambda dit, vae: vae.decode(randn(1, 3, 1, 2, 2)),
    "decode_no_frames": lambda dit, vae: vae.decode(randn(1, 4, 0, 2, 2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_shapes_are_named(dit: WanDiT, vae: WanVAE, name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call(dit, vae)


@pytest.mark.parametrize("name", SHAPES)
def test_more_wrong_shapes_are_named(dit: WanDiT, vae: WanVAE, name: str) -> None:
    with pytest.raises(ValueError, match=r"\[.*\]"):
        SHAPES[name](dit, vae)


# --- the tokenizer ---


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_tokenizer(file)
    return file


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  a red\n\tcircle  ", "a red circle"),
        ("a &amp;amp; b &lt;c&gt;", "a & b <c>"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("一只　猫", "一只 猫"),
        ("", ""),
    ],
)
def test_clean(prompt: str, expected: str) -> None:
    assert clean(prompt) == expected


def test_tokenizer_pads_and_ends(tokenizer_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(open_tokenizer(tokenizer_file), 12)
    ids, mask = tokenizer(["a red circle", "", "a &lt;red&gt; circle moves left"])
    assert ids.shape == mask.shape == (3, 12) and ids.dtype == mask.dtype == torch.int64
    for row, marks in zip(ids.tolist(), mask.tolist(), strict=True):
        length = sum(marks)
        assert marks == [1] * length + [0] * (12 - length)
        assert row[length - 1] == tokenizer.end and row[length:] == [tokenizer.pad] * (12 - length)
    assert mask.sum(1).tolist()[:2] == [4, 1]
    same(tokenizer(["  a red \n circle "])[0], ids[:1])
    assert not caplog.records


def test_long_prompt_is_cut_with_a_warning(
    tokenizer_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer(open_tokenizer(tokenizer_file), 6)
    with caplog.at_level(logging.WARNING, logger="wanflow"):
        fits, _ = tokenizer(["a red circle moves left"])
        assert not caplog.records
        ids, mask = tokenizer(["a red circle moves left on a blue background"])
    (record,) = caplog.records
    assert (
        "10 tokens long and the model reads 6" in record.getMessage()
        and "on a blue background" in record.getMessage()
    )
    same(ids, fits)
    assert mask.sum() == 6 and ids[0, -1] == tokenizer.end


def test_warning_of_a_very_long_prompt_is_short(
    tokenizer_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Tokenizer(open_tokenizer(tokenizer_file), 4)(["red " * 5000])
    assert len(caplog.records[0].getMessage()) < 300


def test_bad_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is missing"):
        open_tokenizer(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(RequestError, match="not a readable tokenizer"):
        open_tokenizer(tmp_path / "bad.json")


# --- the text encoder ---


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, TEXT.vocab, (2, 9), generator=torch.Generator().manual_seed(3))
    return ids, (torch.arange(9) < torch.tensor([[9], [4]])).long()


def test_padding_is_not_read(encoder: UMT5Encoder) -> None:
    ids, mask = tokens()
    other = torch.where(mask.bool(), ids, (ids + 1) % TEXT.vocab)
    expected = encoder(ids, mask)
    same(encoder(other, mask)[mask.bool()], expected[mask.bool()])
    torch.testing.assert_close(encoder(ids[1:, :4], mask[1:, :4]), expected[1:, :4], **ROUNDING)
    same(encoder(ids, mask.bool()), expected)
    same(encoder(ids, mask.float()), expected)


# --- precision ---


def test_no_float64_leaks(dit: WanDiT, vae: WanVAE, encoder: UMT5Encoder) -> None:
    """Angles and tables are float64 inside; nothing of it comes out, whatever goes in."""
    for t in (
        torch.tensor([7, 9]),
        torch.tensor([7.5, 9]),
        torch.tensor([7.5, 9], dtype=torch.float64),
    ):
        for x, text in ((latents(), texts()), (latents().double(), texts().double())):
            assert dit(x, t, text).dtype == torch.float32
            assert dit(x, t[:, None].expand(-1, 45), text).dtype == torch.float32
    for x in (randn(1, 3, 5, 16, 16), randn(1, 3, 5, 16, 16).double()):
        assert vae.encode(x).dtype == torch.float32
    for x in (randn(1, 4, 2, 1, 1), randn(1, 4, 2, 1, 1).double()):
        assert vae.decode(x).dtype == torch.float32
    assert encoder(*tokens()).dtype == torch.float32
    for module in (dit, vae, encoder):
        assert not [
            name
            for name, value in (*module.named_parameters(), *module.named_buffers())
            if value.dtype != torch.float32
        ]


def test_transformer_in_bf16(dit: WanDiT) -> None:
    """All weights in bf16, and, as on a GPU, only those of matmuls: the residual stream and all
    that steers it stay float32.
    """
    x, t, text = latents(), torch.tensor([970, 31]), texts()
    full = dit(x, t, text)
    for module in dit.modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.bfloat16()
    mixed = dit(x, t, text)
    every = dit.bfloat16()(x, t, text)
    assert mixed.dtype == every.dtype == torch.float32
    assert 1e-4 < off(mixed, full) < BF16 and 1e-4 < off(every, full) < BF16


def test_autoencoder_in_bf16(vae: WanVAE) -> None:
    latent, video = randn(1, 4, 3, 4, 4), randn(1, 3, 9, 32, 32)
    decoded, encoded = vae.decode(latent), vae.encode(video)
    low = vae.bfloat16()
    assert low.decode(latent).dtype == torch.bfloat16
    assert off(low.decode(latent), decoded) < BF16 and off(low.encode(video), encoded) < BF16


def test_text_encoder_in_bf16(encoder: UMT5Encoder) -> None:
    ids, mask = tokens()
    full = encoder(ids, mask)
    low = encoder.bfloat16()(ids, mask)
    assert low.dtype == torch.bfloat16
    assert off(low[mask.bool()], full[mask.bool()]) < BF16


# --- gradients ---


def all_have_gradients(module: nn.Module) -> None:
    poor = [
        name
        for name, p in module.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert not poor, poor


def test_transformer_learns(dit: WanDiT) -> None:
    x = latents().requires_grad_(True)
    dit.requires_grad_(True)(x, torch.tensor([900, 20]), texts()).square().mean().backward()
    assert x.grad is not None and x.grad.any()
    all_have_gradients(dit)


def test_transformer_gradient_is_right(dit: WanDiT) -> None:
    """Along a random direction, against the difference quotient."""
    x, t, text, way = latents(1), torch.tensor([640]), texts(1), randn(1, 4, 3, 6, 10, seed=5)
    leaf = x.clone().requires_grad_(True)
    dit(leaf, t, text).square().mean().backward()
    assert leaf.grad is not None
    step = 1e-2
    quotient = (
        dit(x + step * way, t, text).square().mean() - dit(x - step * way, t, text).square().mean()
    ) / (2 * step)
    torch.testing.assert_close((leaf.grad * way).sum(), quotient, rtol=1e-2, atol=1e-4)


def test_text_encoder_learns(encoder: UMT5Encoder) -> None:
    encoder.requires_grad_(True)(*tokens()).square().mul(randn(2, 9, 24)).mean().backward()
    all_have_gradients(encoder)


def test_autoencoder_learns_the_same_in_chunks(vae: WanVAE) -> None:
    """Gradients flow through encode and decode, and through the memory between chunks."""
    video, gradients = randn(1, 3, 9, 16, 16), []
    vae.requires_grad_(True)
    for groups in (1, 2):
        vae.zero_grad()
        mean, log_variance = vae.moments(video, groups)
        loss = (vae.decode(mean, groups) - video).square().mean() + log_variance.square().mean()
        loss.backward()
        all_have_gradients(vae)
        gradients.append(
            {name: p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)
