"""Conversion: what is lossless comes back to the bit, what rounds does so as its format says, and
other programs read the result.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sparse_checkpoint
from helpers.common import open_part, refusal
from helpers.memory import measurable, measured
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import wanflow
from wanflow.api import Pipeline
from wanflow.checkpoint import tokenizers as tokens
from wanflow.checkpoint.checkpoint import open_checkpoint
from wanflow.checkpoint.containers import VALUES, TensorInfo
from wanflow.checkpoint.key_maps import Kind
from wanflow.checkpoint.load import load_expert, load_text_encoder, load_tokenizer, load_vae
from wanflow.checkpoint.parts import Part, kind_of
from wanflow.checkpoint.published import T2V_FP8, T5_FP8
from wanflow.checkpoint.source import OfficialSource, open_source
from wanflow.checkpoint.structure import build
from wanflow.cli import convert as command
from wanflow.cli import main
from wanflow.config import DiTConfig
from wanflow.convert import configs, formats, write_gguf
from wanflow.convert.convert import convert, open_model
from wanflow.convert.encode import entries, storage_dtype
from wanflow.convert.formats import TARGETS, Options, options
from wanflow.convert.write import TensorSpec, write_torch
from wanflow.models.dit import WanDiT
from wanflow.models.umt5 import UMT5Encoder
from wanflow.presets import I2V_A14B, T2V_A14B, TI2V_5B
from wanflow.transforms.packed import Packed

HERE = Path(__file__).parents[1]
NANO = Path(wanflow.__file__).parent / "assets" / "nano"
PROMPT = "a red circle moves left on a blue background"
LOSSLESS = ("official", "diffusers", "bf16", "gguf-bf16")  # of nano, whose weights are bfloat16
PARTS: tuple[Part, ...] = ("high", "low", "t5", "vae")


def run(source: Path | str, out: Path, to: str, **how: Any) -> Path:
    given, say = how.pop("given", {}), how.pop("say", lambda text: None)
    return convert(
        open_model(Path(source), given), out, options(to, how.pop("dtype", None), **how), say
    )


def sources(folder: Path) -> dict[Part, OfficialSource]:
    found = open_checkpoint(folder)
    paths: dict[Part, Path] = {
        "high": found.paths["high"],
        "low": found.paths["low"],
        "t5": found.paths["t5"],
        "vae": found.paths["vae"],
    }
    return {part: open_part(kind_of(part), path) for part, path in paths.items()}


def values(source: OfficialSource) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.tensors}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of nano's shapes, in the official layout, with random float32 weights that no shorter format
    holds.
    """
    root = Path(shutil.copytree(NANO, tmp_path_factory.mktemp("exact") / "model"))
    generator = torch.Generator().manual_seed(5)
    for part, source in sources(NANO).items():
        state = {
            name: torch.randn(info.shape, generator=generator) * 0.05
            for name, info in source.tensors.items()
        }
        if kind_of(part) == "dit":
            save_file(state, root / f"{part}_noise_model" / "diffusion_pytorch_model.safetensors")
        else:
            torch.save(
                state,
                root / ("Wan2.1_VAE.pth" if part == "vae" else "models_t5_umt5-xxl-enc-bf16.pth"),
            )
    return root


@pytest.fixture(scope="module")
def expert(exact: Path) -> Path:
    return exact / "high_noise_model" / "diffusion_pytorch_model.safetensors"


# lossless


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_to_diffusers_and_back_is_the_same_to_the_bit(
    exact: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    word = str(dtype).removeprefix("torch.")
    there = run(exact, tmp_path / "there", "diffusers", dtype=word, shard=2_000_000)
    assert (
        len(list((there / "transformer").glob("*.safetensors"))) > 2
    )  # in shards, behind an index
    back = run(there, tmp_path / "back", "official", shard=3_000_000)
    before, after = sources(exact), sources(back)
    for part in PARTS:
        told = values(after[part])
        assert told.keys() == before[part].tensors.keys()
        assert all(
            torch.equal(told[name], value.to(dtype)) and told[name].dtype == dtype
            for name, value in values(before[part]).items()
        )
    assert (back / "google/umt5-xxl/tokenizer.json").exists() and open_checkpoint(
        back
    ).spec == open_checkpoint(exact).spec


def test_official_to_single_files_in_bf16_and_back_is_the_bf16_rounding(
    exact: Path, tmp_path: Path
) -> None:
    there = run(exact, tmp_path / "there", "bf16")
    assert sorted(file.relative_to(there).as_posix() for file in there.rglob("*.safetensors")) == [
        "diffusion_models/nano_high_noise_bf16.safetensors",
        "diffusion_models/nano_low_noise_bf16.safetensors",
        "text_encoders/nano_t5_bf16.safetensors",
        "vae/nano_vae.safetensors",
    ]
    after = sources(run(there, tmp_path / "back", "official", dtype="float32"))
    for part, source in sources(exact).items():
        told = values(after[part])
        assert all(
            torch.equal(told[name], value.bfloat16().float())
            for name, value in values(source).items()
        )


def test_a_file_of_torch_is_as_torch_itself_writes_it(exact: Path, tmp_path: Path) -> None:
    out = run(exact / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "t5.pth", "official")
    state = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        **torch.load(exact / "models_t5_umt5-xxl-enc-bf16.pth"),
    }
    read = torch.load(out, weights_only=True)
    assert list(read) == list(state)[2:] and all(
        torch.equal(read[name], state[name]) for name in read
    )
    assert zipfile.ZipFile(out).testzip() is None
    torch.save(state, tmp_path / "theirs.pth")
    made = [
        TensorSpec(name, tuple(value.shape), "F32", lambda value=value: iter([value]))
        for name, value in state.items()
    ]
    write_torch(tmp_path / "ours.pth", made, lambda count: None)
    assert all(
        torch.equal(value, state[name])
        for name, value in torch.load(tmp_path / "ours.pth", mmap=True, weights_only=True).items()
    )
    assert (
        abs((tmp_path / "ours.pth").stat().st_size - (tmp_path / "theirs.pth").stat().st_size)
        < 20_000
    )
    for entry in zipfile.ZipFile(tmp_path / "ours.pth").infolist():
        if "/data/" in entry.filename:
            with (tmp_path / "ours.pth").open("rb") as file:
                file.seek(entry.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            assert (entry.header_offset + 30 + name + extra) % 64 == 0


# what rounds, by its format's own rounding


def linears(kind: Kind, source: OfficialSource) -> set[str]:
    """The weights of all Linear layers, of the module itself."""
    preset = open_checkpoint(NANO).spec
    module = build(
        {"dit": WanDiT, "t5": UMT5Encoder}[kind], preset.dit if kind == "dit" else preset.text
    )
    return {
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }


@pytest.mark.parametrize("part", ["high", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_every_linear_over_its_largest_value(
    exact: Path, tmp_path: Path, part: Part, dtype: torch.dtype
) -> None:
    before = sources(exact)[part]
    if dtype != torch.float32:
        before = open_part(kind_of(part), run(before.path, tmp_path / "before.safetensors", "bf16"))
    out = run(before.path, tmp_path / "x.safetensors", "fp8")
    scaled = linears(kind_of(part), before)
    after = open_part(kind_of(part), out)
    with safe_open(
        out, framework="pt"
    ) as file:  # the library's own reader, which needs aligned tensors
        raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert raw["scaled_fp8"].dtype == torch.float8_e4m3fn
    assert raw["scaled_fp8"].shape == ((2,) if part == "high" else (0,))
    assert sum(name.endswith(".scale_weight") for name in raw) == len(scaled) > 20
    for name, value in ((name, value.float()) for name, value in values(before).items()):
        told = after.read(name, torch.float32)
        if name in scaled:
            scale = value.abs().max() / 448
            assert after.packed(name).scale == scale
            assert torch.equal(told, (value / scale).to(torch.float8_e4m3fn).float() * scale)
            assert (
                told - value
            ).abs().max() <= value.abs().max() / 27.9  # half a step at the top: 16 of 448
        else:
            assert torch.equal(told, value.bfloat16().float())
    if part == "high":
        assert scaled == {
            name for name in raw if f"{name.removesuffix('.weight')}.scale_weight" in raw
        }


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
@pytest.mark.parametrize("part", ["high", "t5"])
def test_gguf_blocks_are_those_of_the_gguf_package(
    exact: Path, tmp_path: Path, part: Part, kind: str
) -> None:
    gguf = pytest.importorskip("gguf")
    before = sources(exact)[part]
    out = run(before.path, tmp_path / "x.gguf", f"gguf-{kind}")
    after, quant = open_part(kind_of(part), out), gguf.GGMLQuantizationType[kind.upper()]
    reader = gguf.GGUFReader(out)
    assert not any("orig_shape" in key for key in reader.fields)
    assert reader.fields["general.architecture"].contents() == (
        "wan" if part == "high" else "t5encoder"
    )
    assert {tensor.name for tensor in reader.tensors} == set(after.names.values())
    rounded = 0
    for name, value in values(before).items():
        told, packing = after.read(name, torch.float32), after.tensors[name].packing
        assert told.shape == value.shape
        if packing:
            blocks = gguf.quants.quantize(value.numpy(), quant)
            assert packing == quant.name and torch.equal(
                told, torch.from_numpy(gguf.quants.dequantize(blocks, quant))
            )
            rounded += 1
        elif (
            value.ndim in (1, 3, 5)
            or name.startswith(("time_embedding", "head"))
            or "pos_embedding" in name
        ):
            assert torch.equal(told, value)
        else:
            assert torch.equal(told, value.half().float())
    assert rounded == (60 if part == "high" else 22)


def test_rows_that_are_not_whole_blocks_stay_in_sixteen_bits() -> None:
    coding = TARGETS["gguf-q4_0"].coding

    def chosen(name: str, *shape: int) -> str:
        return storage_dtype("dit", name, TensorInfo(shape, torch.float32), coding)

    assert chosen("blocks.0.ffn.0.weight", 64, 64) == "Q4_0"
    assert chosen("blocks.0.ffn.0.weight", 64, 48) == "F16"
    assert chosen("patch_embedding.weight", 64, 16, 1, 2, 2) == "F32"


def test_what_is_packed_already_is_not_rounded_again(
    exact: Path, expert: Path, tmp_path: Path
) -> None:
    for to, ending in (("gguf-q4_0", "gguf"), ("fp8", "safetensors")):
        once = run(expert, tmp_path / f"once.{ending}", to)
        twice = run(once, tmp_path / f"twice.{ending}", to)
        assert once.read_bytes() == twice.read_bytes()
        back = open_part(
            "dit",
            run(once, tmp_path / "back.safetensors", "official", dtype="float32", overwrite=True),
        )
        assert all(
            torch.equal(back.read(name), value.float())
            for name, value in values(open_part("dit", once)).items()
        )
        half = open_part(
            "dit", run(once, tmp_path / "half.safetensors", "diffusers", overwrite=True)
        )
        assert {
            info.dtype
            for name, info in half.tensors.items()
            if open_part("dit", once).tensors[name].packing
        } == {torch.bfloat16}


def test_pieces_are_the_tensor(
    exact: Path, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanflow.checkpoint.containers.VALUES", 1024)
    files = [
        expert,
        exact / "Wan2.1_VAE.pth",
        run(expert, tmp_path / "a.gguf", "gguf-q5_0"),
        run(expert, tmp_path / "a.safetensors", "fp8"),
    ]
    for file in files:
        source = open_source(file)
        for name in source.tensors:
            told = [piece.float().clone() for piece in source.stream(name)]
            assert torch.equal(torch.cat(told), source.read(name, torch.float32).flatten())
            assert all(len(piece) <= 1024 for piece in told)
    rows = torch.randn(6, 8).to(torch.float8_e4m3fn)
    for scale in (torch.rand(6, 1), torch.rand(6, 2, 1), torch.tensor(2.0), None):
        packed = Packed("F8_E4M3", (6, 8), rows, scale)
        assert torch.equal(torch.cat(list(packed.stream(VALUES))), packed.dense().flatten())


# every form of nano opens, and makes a video


def latents(pipe: Pipeline) -> Tensor:
    seen: list[Tensor] = []
    pipe.generate(
        PROMPT, seed=7, frame_num=5, sample_steps=2, on_step=lambda told: seen.append(told.latents)
    )
    return seen[-1]


@pytest.fixture(scope="module")
def expected(nano: Pipeline) -> Tensor:
    return latents(nano)


@pytest.mark.slow
@pytest.mark.parametrize("to", list(TARGETS))
def test_a_converted_nano_generates(to: str, expected: Tensor, tmp_path: Path) -> None:
    out = run(NANO, tmp_path / "model", to)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    pipe = wanflow.load(out, device="cpu")
    assert open_checkpoint(out).spec == open_checkpoint(NANO).spec
    assert open_checkpoint(out).vocabulary == open_checkpoint(NANO).vocabulary
    found = latents(pipe)
    assert found.isfinite().all()
    error = float((found - expected).norm() / expected.norm())
    limits = {
        **dict.fromkeys(LOSSLESS, 1e-6),
        "fp16": 1e-3,
        "gguf-f16": 1e-3,
        "gguf-q8_0": 0.02,
        "fp8": 0.1,
    }
    assert error < limits.get(to, 0.3), error


def test_without_a_sheet_where_the_model_is_the_published_one() -> None:
    assert configs.model_card(T2V_A14B) is None
    preset = open_checkpoint(NANO).spec
    assert json.loads(configs.as_json(configs.model_card(preset, ("red",)) or {}))[
        "vocabulary"
    ] == ["red"]


def test_names_of_the_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that a full-size model becomes are called as the published ones are."""
    from dataclasses import replace

    from wanflow.convert.targets import plan

    model = replace(open_model(NANO, {}), spec=T2V_A14B, vocabulary=())
    fp8 = plan(model, options("fp8"), "x")
    assert [output.path for output in fp8.outputs] == [
        "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "vae/wan_2.1_vae.safetensors",
    ]
    gguf = plan(model, options("gguf-q4_0"), "x")
    assert (
        gguf.outputs[0].path == "HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_0.gguf"
        and "wanflow.json" not in gguf.files
    )
    assert any("Q8_0" in note for note in gguf.notes)
    for spec, names in (
        (I2V_A14B, ["wan2.2_i2v_high_noise_14B", "wan2.2_i2v_low_noise_14B", "wan_2.1_vae"]),
        (TI2V_5B, ["wan2.2_ti2v_5B", "wan2.2_vae"]),
    ):
        sources = dict(zip(spec.expert_names, model.sources.values(), strict=False))
        sources |= {part: model.sources[part] for part in ("t5", "vae")}
        other = plan(replace(model, spec=spec, sources=sources), options("fp16"), "x")
        stems = [Path(output.path).stem.removesuffix("_fp16") for output in other.outputs]
        assert [stem for stem in stems if "umt5" not in stem] == names
        assert "wanflow.json" not in other.files
    sources = {"dit": sources["dit"]}
    packed = plan(replace(model, spec=TI2V_5B, sources=sources), options("gguf-q8_0"), "x")
    assert [output.path for output in packed.outputs] == ["Wan2.2-TI2V-5B-Q8_0.gguf"]


def test_at_full_size_fp8_takes_what_the_published_files_take() -> None:
    """To their headers: so they, too, have every Linear in fp8, and the rest in 16 bits."""

    def size(kind: Kind, module: torch.nn.Module) -> int:
        infos = {
            name: TensorInfo(tuple(value.shape), torch.float32)
            for name, value in module.named_parameters()
        }
        inner = open_source(NANO / "Wan2.1_VAE.pth")
        source = OfficialSource(inner.path, infos, inner, {name: name for name in infos})
        return sum(
            entry.nbytes for entry in entries(kind, source, options("fp8").coding(kind), "official")
        )

    spiece = 4_548_313
    i2v = 14_294_742_832  # of FAMILY.md
    assert 0 < T2V_FP8 - size("dit", build(WanDiT, T2V_A14B.dit)) < 200_000
    assert 0 < i2v - size("dit", build(WanDiT, I2V_A14B.dit)) < 200_000
    assert 0 < T5_FP8 - spiece - size("t5", build(UMT5Encoder, T2V_A14B.text)) < 60_000


# diffusers and transformers read what is written for them


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(NANO, tmp_path_factory.mktemp("diffusers") / "nano", "diffusers", dtype="float32")


def test_diffusers_loads_the_whole_pipeline(theirs: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.WanPipeline.from_pretrained(theirs, local_files_only=True)
    assert (
        pipe.config.boundary_ratio == 0.875
        and pipe.scheduler.config.flow_shift == open_checkpoint(NANO).spec.sample_shift
    )
    ours = open_checkpoint(NANO)
    generator = torch.Generator().manual_seed(1)
    latent, text = (
        torch.randn(1, 16, 2, 4, 4, generator=generator),
        torch.randn(1, 32, 128, generator=generator),
    )
    with torch.no_grad():
        for which, part in (("high", pipe.transformer), ("low", pipe.transformer_2)):
            wanted = load_expert(ours, "high" if which == "high" else "low", torch.float32, "cpu")(
                latent, torch.tensor([700.0]), text
            )
            found = part(latent, torch.tensor([700.0]), text).sample
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        vae = load_vae(ours)
        mean, std = (
            torch.tensor(getattr(pipe.vae.config, f"latents_{name}")).view(1, 16, 1, 1, 1)
            for name in ("mean", "std")
        )
        torch.testing.assert_close(
            pipe.vae.decode(latent * std + mean).sample,
            vae.decode(latent).clamp(-1, 1),
            rtol=1e-3,
            atol=1e-3,
        )
        ids, mask = load_tokenizer(ours)([PROMPT])
        batch = pipe.tokenizer(
            [PROMPT], padding="max_length", max_length=32, truncation=True, return_tensors="pt"
        )
        assert torch.equal(batch.input_ids, ids) and torch.equal(batch.attention_mask, mask)
        encoded = pipe.text_encoder(ids, mask).last_hidden_state
        wanted = load_text_encoder(ours, torch.float32, "cpu")(ids, mask)
        torch.testing.assert_close(encoded[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["bf16", "gguf-q8_0", "gguf-bf16"])
def test_diffusers_loads_single_files(theirs: Path, tmp_path: Path, to: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    out = run(
        NANO / "low_noise_model", tmp_path / f"x.{'gguf' if 'gguf' in to else 'safetensors'}", to
    )
    how = (
        {"quantization_config": diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)}
        if "gguf" in to
        else {}
    )
    model = diffusers.WanTransformer3DModel.from_single_file(
        out, config=str(theirs / "transformer"), torch_dtype=torch.float32, **how
    )
    generator = torch.Generator().manual_seed(1)
    latent, text = (
        torch.randn(1, 16, 2, 4, 4, generator=generator),
        torch.randn(1, 32, 128, generator=generator),
    )
    with torch.no_grad():
        wanted = load_expert(open_checkpoint(NANO), "low", torch.float32, "cpu")(
            latent, torch.tensor([700.0]), text
        )
        found = model(latent, torch.tensor([700.0]), text).sample
    assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if "bf16" in to else 0.02)


# tokenizers


def unigram() -> tokens.Pieces:
    words = ["<pad>", "</s>", "<unk>", "▁red", "▁circle", "▁", "r", "e", "d", "<mine>"]
    return tokens.Pieces(
        [(word, -float(n)) for n, word in enumerate(words)], [3, 3, 2, *[1] * 6, 4], b""
    )


def with_tokenizer(root: Path, text: str) -> Path:
    folder = Path(shutil.copytree(NANO, root))
    (folder / "google/umt5-xxl/tokenizer.json").write_text(text)
    return folder


def test_a_tokenizer_that_sentencepiece_could_have_written_goes_into_the_gguf_file(
    tmp_path: Path,
) -> None:
    engine = tokens.build(unigram(), tmp_path / "x")
    model = with_tokenizer(tmp_path / "model", engine.to_str())
    out = run(model, tmp_path / "out", "gguf-q8_0")
    shutil.rmtree(out / "google")
    (held,) = (out / "text_encoders").iterdir()
    assert open_checkpoint(out).paths["tokenizer"] == held
    inside = tokens.open_tokenizer(held)
    for text in ("red circle", "  red   circle ", "dear", "red<mine>circle", ""):
        assert (
            inside.encode(text, add_special_tokens=False).ids
            == engine.encode(text, add_special_tokens=False).ids
        )
    # And out of it again, into a folder that needs a file.
    back = run(out, tmp_path / "back", "diffusers")
    assert (
        tokens.open_tokenizer(back / "tokenizer/tokenizer.json")
        .encode("red circle", add_special_tokens=False)
        .ids
        == inside.encode("red circle", add_special_tokens=False).ids
    )


def test_nanos_tokenizer_lies_beside_and_that_is_said(tmp_path: Path) -> None:
    assert write_gguf.pieces_in((NANO / "google/umt5-xxl/tokenizer.json").read_bytes()) is None
    told: list[str] = []
    run(NANO, tmp_path / "out", "gguf-q8_0", say=told.append)
    assert any("GGUF" in text and "tokenizer" in text for text in told)
    assert (tmp_path / "out/google/umt5-xxl/tokenizer.json").read_bytes() == (
        NANO / "google/umt5-xxl/tokenizer.json"
    ).read_bytes()


def test_comfyui_text_encoders_carry_the_sentencepiece_model(tmp_path: Path) -> None:
    model = Path(shutil.copytree(NANO, tmp_path / "model"))
    (model / "google/umt5-xxl/spiece.model").write_bytes(b"\n\x05pieces")
    out = run(model, tmp_path / "out", "fp8", parts=("t5",))
    (held,) = (out / "text_encoders").iterdir()
    with safe_open(held, framework="pt") as file:
        assert bytes(file.get_tensor("spiece_model").tolist()) == b"\n\x05pieces"
        assert "encoder.block.0.layer.0.SelfAttention.q.scale_weight" in file.keys()  # noqa: SIM118
    assert (out / "google/umt5-xxl/spiece.model").exists() and not (out / "vae").exists()


# parts


def test_parts_named_by_hand_and_parts_left_out(exact: Path, expert: Path, tmp_path: Path) -> None:
    out = run(
        NANO,
        tmp_path / "out",
        "official",
        given={"low": exact / "high_noise_model"},
        parts=("low", "vae"),
    )
    assert sorted(file.name for file in out.iterdir()) == [
        "Wan2.1_VAE.pth",
        "google",
        "low_noise_model",
        "wanflow.json",
    ]
    read = open_part("dit", out / "low_noise_model")
    assert all(
        torch.equal(read.read(name), value)
        for name, value in values(open_part("dit", expert)).items()
    )


def test_a_part_alone_becomes_a_file_that_keeps_its_name(exact: Path, tmp_path: Path) -> None:
    assert (
        run(exact / "high_noise_model", tmp_path / "folder", "fp8").name
        == "high_noise_model-fp8.safetensors"
    )
    assert (
        run(exact / "Wan2.1_VAE.pth", tmp_path / "folder", "official").name
        == "Wan2.1_VAE-official.pth"
    )
    assert (
        open_part("vae", run(exact / "Wan2.1_VAE.pth", tmp_path / "vae.safetensors", "fp16"))
        .tensors["conv1.weight"]
        .dtype
        == torch.float16
    )
    shard = run(exact, tmp_path / "shards", "diffusers", shard=1_000_000) / "transformer"
    assert run(shard, tmp_path / "folder", "gguf-q8_0").name == "transformer-gguf-q8_0.gguf"


# refusals, each before anything is written


def test_what_is_refused(
    exact: Path, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file(
        {
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 160),
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(160, 4),
        },
        lora,
    )
    out = tmp_path / "out"
    assert "is a LoRA" in refusal(lambda: run(lora, out, "bf16"))
    assert "is missing" in refusal(lambda: run(tmp_path / "none", out, "bf16"))
    assert "overlap" in refusal(lambda: run(exact, exact, "bf16", overwrite=True))
    assert "overlap" in refusal(lambda: run(exact, exact / "sub", "bf16"))
    assert "overlap" in refusal(lambda: run(exact, exact.parent, "bf16", overwrite=True))
    assert "overlap" in refusal(lambda: run(expert, expert, "bf16", overwrite=True))
    assert "VAE in GGUF" in refusal(lambda: run(exact / "Wan2.1_VAE.pth", out, "gguf-q8_0"))
    assert "writes .gguf" in refusal(lambda: run(expert, tmp_path / "x.safetensors", "gguf-q8_0"))
    assert "--dtype" in refusal(lambda: options("bf16", "float16"))
    assert "--dtype" in refusal(lambda: options("gguf-f16", "float32"))
    assert "name its folder" in refusal(lambda: run(expert, out, "bf16", given={"low": expert}))
    assert "official, diffusers" in refusal(lambda: options("q9"))
    assert "choose of float32" in refusal(lambda: options("fp8", "int8"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9_000_000, 1_000_000))
    assert "the conversion needs 34.5 MB, and the disk has 1.0 MB free" in refusal(
        lambda: run(exact, out, "official")
    )
    assert not out.exists()
    monkeypatch.setattr(
        formats, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name))
    )
    assert "pip install" in refusal(lambda: options("gguf-q8_0"))


def test_a_place_that_is_taken(exact: Path, expert: Path, tmp_path: Path) -> None:
    out = run(NANO, tmp_path / "out", "official", parts=("high",))
    assert "exists; name another place" in refusal(lambda: run(exact, out, "bf16"))
    run(exact, out, "bf16", overwrite=True, parts=("high",))
    assert (
        not (out / "high_noise_model").exists() and (out / "diffusion_models").exists()
    )  # replaced, not mixed
    (out / "thesis.docx").write_text("years of work")
    assert "thesis.docx" in refusal(lambda: run(exact, out, "bf16", overwrite=True))
    file = run(expert, tmp_path / "x.safetensors", "bf16")
    assert "exists" in refusal(lambda: run(expert, file, "bf16"))
    run(expert, file, "fp16", overwrite=True)
    assert "is a file" in refusal(lambda: run(exact, file, "fp16", overwrite=True))
    (tmp_path / "empty").mkdir()
    run(NANO, tmp_path / "empty", "official", parts=("vae",))
    (tmp_path / "new.0123abcd.part").mkdir()
    assert "is left over" in refusal(lambda: run(NANO, tmp_path / "new", "official"))
    run(NANO, tmp_path / "new", "official", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty",
        "new",
        "out",
        "x.safetensors",
    ]


def when_halfway(act: Callable[[], object]) -> Callable[[int, int], None]:
    """Return a report of progress that acts once, in the middle."""
    todo = [act]

    def report(done: int, total: int) -> None:
        if done > total // 2 and todo:
            todo.pop()()

    return report


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_what_appears_meanwhile_is_kept_and_so_is_the_result(
    exact: Path, expert: Path, tmp_path: Path, single: bool, overwrite: bool
) -> None:
    """Also with --overwrite, which replaces what was there at the start."""
    out = tmp_path / ("x.safetensors" if single else "out")

    def appear() -> None:
        if single:
            out.write_text("my thesis")
        else:
            out.mkdir()
            (out / "thesis.tex").write_text("my thesis")

    with pytest.raises(FileExistsError, match=r"appeared meanwhile; the result is .*-2"):
        convert(
            open_model(expert if single else exact, {}),
            out,
            options("bf16", overwrite=overwrite),
            lambda text: None,
            when_halfway(appear),
        )
    assert (out if single else out / "thesis.tex").read_text() == "my thesis"
    spare = tmp_path / ("x-2.safetensors" if single else "out-2")
    assert sorted(tmp_path.iterdir()) == sorted([out, spare])
    open_model(spare, {})


def test_overwrite_keeps_what_came_into_the_folder_meanwhile(exact: Path, tmp_path: Path) -> None:
    out = run(NANO, tmp_path / "out", "official", parts=("vae",))
    report = when_halfway(lambda: (out / "thesis.tex").write_text("my thesis"))
    how = options("bf16", overwrite=True)
    assert "thesis.tex" in refusal(
        lambda: convert(open_model(exact, {}), out, how, lambda text: None, report)
    )
    assert (out / "Wan2.1_VAE.pth").exists() and (out / "thesis.tex").exists()


def test_a_target_without_a_name_is_refused(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for place in (".", "..", ""):
        again = partial(run, exact, Path(place), "bf16", overwrite=True)
        assert "no name of a new" in refusal(again)
    for name in ("x" * 999, "x" * 250):
        assert "too long" in refusal(lambda name=name: run(exact, tmp_path / name, "bf16"))
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_two_conversions_never_make_one_folder(exact: Path, tmp_path: Path) -> None:
    said: list[str] = []
    model = open_model(exact, {})

    def second() -> None:
        for overwrite in (False, True):
            said.append(refusal(lambda: run(exact, tmp_path / "out", "fp8", overwrite=overwrite)))  # noqa: B023

    convert(model, tmp_path / "out", options("bf16"), lambda text: None, when_halfway(second))
    assert len(said) == 2 and all("is being made by another run" in words for words in said)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_values_that_the_format_cannot_hold(expert: Path, tmp_path: Path) -> None:
    source = open_source(expert)
    state = {name: source.read(name) for name in source.tensors}
    for value, to, expected in (
        (math.nan, "fp8", "NaN"),
        (math.inf, "gguf-q4_0", "NaN"),
        (math.nan, "official", "NaN"),
        (7e4, "fp16", "cannot hold"),
    ):
        state["blocks.1.ffn.0.weight"][3, 5] = value
        save_file(state, tmp_path / "bad.safetensors")
        told = refusal(
            lambda to=to: run(
                tmp_path / "bad.safetensors",
                tmp_path / ("x.gguf" if "gguf" in to else "x.safetensors"),
                to,
            )
        )
        assert expected in told and "blocks.1.ffn.0.weight" in told
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]
    del state["blocks.1.ffn.0.weight"]
    save_file(state, tmp_path / "bad.safetensors")
    assert "1 missing" in refusal(
        lambda: run(tmp_path / "bad.safetensors", tmp_path / "x.safetensors", "fp16")
    )


@pytest.mark.parametrize("to", ["official", "gguf-q8_0"])
def test_an_interruption_leaves_what_was_there(to: str, exact: Path, tmp_path: Path) -> None:
    model = open_model(exact, {})

    def stop(done: int, total: int) -> None:
        assert total > 1_000_000
        if done > total // 2:
            raise KeyboardInterrupt

    for overwrite in (False, True):
        with pytest.raises(KeyboardInterrupt):
            convert(
                model, tmp_path / "out", options(to, overwrite=overwrite), lambda text: None, stop
            )
        assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
        if not overwrite:
            run(NANO, tmp_path / "out", "official", parts=("vae",))
    assert (tmp_path / "out/Wan2.1_VAE.pth").exists()


def test_progress_ends_at_the_whole(exact: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = convert(
        open_model(exact, {}),
        tmp_path / "out",
        Options("fp8"),
        lambda text: None,
        lambda done, total: told.append((done, total)),
    )
    assert told[-1][0] == told[-1][1] and [done for done, _ in told] == sorted(
        done for done, _ in told
    )
    assert (
        0
        < sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) - told[-1][1]
        < 200_000
    )  # headers


# the command


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "nano", str(tmp_path / "out"), "--to", "fp8"]
    assert main([*words, "--parts", "vae,high", "--max_shard_size", "1GiB"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "diffusion_models",
        "google",
        "vae",
        "wanflow.json",
    ]
    assert "the VAE stays as it is" in capsys.readouterr().err
    assert TARGETS is command.TARGETS
    assert command.size("1.5GB") == 1_500_000_000 and command.size("2MiB") == 2 << 20
    words[2] = str(tmp_path / "another")
    assert main([*words, "--parts", "head"]) == 2
    assert "none of high, low" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["ten", "0", "100000000000000000000", "9" * 400, "1" * 5000, "1e9999GB", "-1", "nan"]
)
def test_a_shard_size_that_is_none(text: str) -> None:
    assert "--max_shard_size must be a size" in refusal(lambda: command.size(text))


# memory

MEASURE = """
import json, sys
from pathlib import Path
from helpers.memory import Peak
from wanflow.convert import convert, formats

root, out = Path(sys.argv[1]), Path(sys.argv[2])
peak = Peak()
for to in sys.argv[3:]:
    model, options = convert.open_model(root / "x.safetensors", {}), formats.options(to)
    peak.reset()
    made = convert.convert(model, out / to, options, print)
    print(json.dumps({"to": to, "peak": peak.look(), "bytes": made.stat().st_size}))
    made.unlink()
"""


@pytest.fixture(scope="module")
def sparse() -> Iterator[Path]:
    """An expert of one block and half the published width, made of holes, in memory's own file
    system where there is one.
    """
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as name:
        model = build(WanDiT, DiTConfig(dim=2560, ffn_dim=6912, num_heads=20, num_layers=1))
        sparse_checkpoint.write_safetensors(
            Path(name) / "x.safetensors",
            {key: list(value.shape) for key, value in model.state_dict().items()},
            "F32",
        )
        yield Path(name)


@pytest.mark.slow
@measurable
def test_memory_does_not_grow_with_the_tensors(sparse: Path, tmp_path: Path) -> None:
    """The largest tensor of this expert is 157 MB; no form takes a third of it. By hand, a full
    expert of 57 GB to fp8: 20 MB.
    """
    found = measured(MEASURE, sparse, tmp_path, "fp8", "gguf-q4_0")
    assert [one["to"] for one in found] == ["fp8", "gguf-q4_0"]
    assert all(one["peak"] < 48 << 20 and one["bytes"] > 80_000_000 for one in found), found
