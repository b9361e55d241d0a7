"""Every form of I2V-A14B and TI2V-5B gives what the official one gives."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sparse_checkpoint
from helpers.common import refusal
from helpers.memory import measurable, measured
from helpers.tiny import FAMILY, tiny_family
from safetensors.torch import load_file, save_file
from torch import Tensor

import wanflow
from wanflow.checkpoint import load
from wanflow.checkpoint.checkpoint import Checkpoint, open_checkpoint, published
from wanflow.checkpoint.key_maps import detect, from_official, to_official
from wanflow.checkpoint.published import known_sha256
from wanflow.checkpoint.structure import module_of
from wanflow.cli import main
from wanflow.config import VAE22Config
from wanflow.convert import configs
from wanflow.convert.convert import convert, open_model
from wanflow.convert.formats import options
from wanflow.inspect import inspect
from wanflow.presets import FAMILY as PUBLISHED
from wanflow.presets import I2V_A14B, NANO_FOLDER, T2V_A14B, TI2V_5B

KINDS = ("i2v", "ti2v")
Values = dict[str, dict[str, Tensor]]  # part -> tensors by official name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("family")
    return {kind: tiny_family(root / kind, kind) for kind in KINDS}


@pytest.fixture
def copies(models: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The same, to be changed."""
    return {kind: Path(shutil.copytree(model, tmp_path / kind)) for kind, model in models.items()}


def to(model: Path, form: str, out: Path) -> Path:
    return convert(open_model(model, {}), out, options(form), lambda text: None)


def values(checkpoint: Checkpoint) -> Values:
    return {
        part: {name: source.read(name) for name in source.tensors}
        for part, source in checkpoint.sources.items()
    }


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def same(one: Values, two: Values) -> None:
    assert one.keys() == two.keys()
    for part, tensors in one.items():
        assert tensors.keys() == two[part].keys()
        for name, value in tensors.items():
            assert torch.equal(value, two[part][name]), (part, name)


# Layouts


@pytest.mark.parametrize("kind", KINDS)
def test_the_official_folder(models: dict[str, Path], kind: str) -> None:
    found, spec = open_checkpoint(models[kind]), FAMILY[kind]
    sheet = json.loads((models[kind] / "wanflow.json").read_text())["defaults"]
    assert found.layout == "official" and not found.notes
    assert (found.spec.dit, found.spec.text, found.spec.vae) == (spec.dit, spec.text, spec.vae)
    assert found.spec.sample_steps == sheet["sample_steps"]
    same_as = ("boundary", "sample_shift", "cfg_high", "fps", "conditioning", "expert_names")
    for name in same_as:
        assert getattr(found.spec, name) == getattr(spec, name), name


@pytest.mark.parametrize("kind", KINDS)
def test_official_to_diffusers_and_back_is_the_same_to_the_bit(
    models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    theirs = to(models[kind], "diffusers", tmp_path / "theirs")
    back = to(theirs, "official", tmp_path / "back")
    expected = values(open_checkpoint(models[kind]))
    same(values(open_checkpoint(theirs)), expected)
    same(values(open_checkpoint(back)), expected)
    assert open_checkpoint(back).spec == open_checkpoint(models[kind]).spec
    stem = "Wan2.2_VAE.pth" if kind == "ti2v" else "Wan2.1_VAE.pth"
    assert (back / stem).is_file()
    config = json.loads(
        (back / ("." if kind == "ti2v" else "low_noise_model") / "config.json").read_text()
    )
    assert (config["model_type"], config["in_dim"]) == (kind, FAMILY[kind].dit.in_dim)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_itself_loads_what_was_converted(
    models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    theirs = to(models[kind], "diffusers", tmp_path / "theirs")
    ours = values(open_checkpoint(models[kind]))
    for name, part in (("transformer", "dit"), ("transformer_2", "dit"), ("vae", "vae")):
        if not (theirs / name).is_dir():
            assert (kind, name) == ("ti2v", "transformer_2")
            continue
        cls = AutoencoderKLWan if part == "vae" else WanTransformer3DModel
        module, info = cls.from_pretrained(theirs / name, output_loading_info=True)
        assert not any(info.values()), info
        state = module.state_dict()
        own = part if part in ours else {"transformer": "high", "transformer_2": "low"}[name]
        names = from_official(part, "diffusers", ours[own])  # type: ignore[arg-type]
        for official, value in ours[own].items():
            assert torch.equal(state[names[official]], value), official
    index = json.loads((theirs / "model_index.json").read_text())
    scheduler = json.loads((theirs / "scheduler/scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == 5.0 and scheduler["prediction_type"] == "flow_prediction"
    if kind == "ti2v":
        assert index["_class_name"] == "WanPipeline" and index["expand_timesteps"] is True
        assert index["transformer_2"] == [None, None] and index["boundary_ratio"] is None
        vae = json.loads((theirs / "vae/config.json").read_text())
        facts = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        facts |= {"decoder_base_dim": 4, "scale_factor_spatial": 16, "scale_factor_temporal": 4}
        assert facts.items() <= vae.items()
    else:
        assert index["_class_name"] == "WanImageToVideoPipeline" and not index["expand_timesteps"]
        assert index["boundary_ratio"] == 0.9 and index["image_encoder"] == [None, None]
        assert json.loads((theirs / "transformer/config.json").read_text())["in_channels"] == 36


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("null", [None, [None, None]])
def test_a_diffusers_folder_of_theirs(
    models: dict[str, Path], kind: str, null: Any, tmp_path: Path
) -> None:
    """Their shift may be another one, which is warned of; null says that nothing is there."""
    theirs = to(models[kind], "diffusers", tmp_path / "theirs")

    def as_theirs(index: dict[str, Any]) -> None:
        for name in ("transformer_2", "image_encoder", "image_processor"):
            if index.get(name) in (None, [None, None]):
                index[name] = null

    edit(theirs / "model_index.json", as_theirs)
    edit(theirs / "vae/config.json", lambda config: config.update(clip_output=False))
    edit(theirs / "scheduler/scheduler_config.json", lambda c: c.update(flow_shift=3.0))
    found = open_checkpoint(theirs)
    assert found.spec.sample_shift == 5.0 and "flow_shift 3; " in found.notes[0]
    edit(theirs / "scheduler/scheduler_config.json", lambda c: c.update(flow_shift=5.0))
    assert not open_checkpoint(theirs).notes
    edit(theirs / "model_index.json", lambda i: i.update(expand_timesteps=kind == "i2v"))
    (note,) = open_checkpoint(theirs).notes
    assert "expand_timesteps" in note


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["bf16", "fp8", "gguf-q8_0"])
def test_single_files(models: dict[str, Path], kind: str, form: str, tmp_path: Path) -> None:
    out = to(models[kind], form, tmp_path / "out")
    found = open_checkpoint(out)
    assert found.layout == "files" and found.spec.dit == FAMILY[kind].dit
    assert found.spec.conditioning == FAMILY[kind].conditioning
    exact = values(open_checkpoint(models[kind]))
    tolerance = {"bf16": 2**-8, "fp8": 2**-4, "gguf-q8_0": 2**-6}[form]
    for part in found.spec.expert_names:
        source = found.source(part)
        for name, value in exact[part].items():
            error = (source.read(name, torch.float32) - value).abs().max() / value.abs().max()
            assert error <= tolerance, name
    if form == "gguf-q8_0" and kind == "ti2v":  # as QuantStack names it, beside no HighNoise
        assert (out / "tiny-ti2v-Q8_0.gguf").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_files_named_by_hand(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Of a folder without a config: the official keys after ComfyUI's prefix."""
    model, given = open_checkpoint(models[kind]), {}
    for part in model.spec.expert_names:
        state = {
            f"model.diffusion_model.{name}": value for name, value in values(model)[part].items()
        }
        given[part] = tmp_path / f"{part}.safetensors"
        save_file(state, given[part])
    for part in ("t5", "vae", "tokenizer"):
        given[part] = model.paths[part]
    (tmp_path / "wanflow.json").write_text('{"dit": {"num_heads": 4, "text_len": 8}}')
    found = open_checkpoint(tmp_path, given)
    same(values(found), values(model))
    assert found.spec.dit == model.spec.dit


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_in_hugging_faces_cache(copies: dict[str, Path], kind: str) -> None:
    """Its files are links to blobs; the shards of TI2V-5B lie in the snapshot itself."""
    expected = values(open_checkpoint(copies[kind]))
    repository = copies[kind].parent / "models--Wan-AI--x"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots/abc"
    shutil.move(copies[kind], snapshot)
    for number, file in enumerate(sorted(snapshot.rglob("*.*"))):
        shutil.move(file, repository / f"blobs/{number}")
        file.symlink_to(repository / f"blobs/{number}")
    same(values(open_checkpoint(snapshot)), expected)
    shard = next(snapshot.rglob("*-of-00001.safetensors"))
    elsewhere = repository.parent / "elsewhere.safetensors"
    shutil.copy(shard, elsewhere)
    shard.unlink()
    shard.symlink_to(elsewhere)
    assert "is a link out of its folder" in refusal(lambda: open_checkpoint(snapshot))


def city96(path: Path, state: dict[str, Tensor]) -> None:
    """Write a GGUF file as QuantStack's are: five sides flat, and their true number beside."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "wan")
    for name, value in state.items():
        data, kind = value.numpy(), gguf.GGMLQuantizationType.F32
        if value.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in value.shape])
            data = data.reshape(value.shape[0], -1)
        elif value.ndim == 2 and name.endswith("weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_files_of_quantstack(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = open_checkpoint(models[kind])
    exact = values(model)
    name = {"i2v": "Wan2.2-I2V-A14B", "ti2v": "Wan2.2-TI2V-5B"}[kind]
    for part in model.spec.expert_names:
        side = f"{part.capitalize()}Noise"
        path = f"{side}/{name}-{side}-Q8_0.gguf" if kind == "i2v" else f"{name}-Q8_0.gguf"
        (tmp_path / path).parent.mkdir(exist_ok=True)
        city96(tmp_path / path, exact[part])
    (tmp_path / "VAE").mkdir()
    vae = "VAE/Wan2.2_VAE" if kind == "ti2v" else "VAE/Wan2.1_VAE"
    save_file(exact["vae"], tmp_path / f"{vae}.safetensors")
    save_file(exact["t5"], tmp_path / "umt5.safetensors")
    shutil.copytree(models[kind] / "google", tmp_path / "google")
    (tmp_path / "wanflow.json").write_text('{"dit": {"num_heads": 4, "text_len": 8}}')
    found = open_checkpoint(tmp_path)
    assert found.spec.dit == model.spec.dit and found.spec.vae == model.spec.vae
    part = found.spec.expert_names[-1]
    patches = found.source(part).read("patch_embedding.weight")
    assert torch.equal(patches, exact[part]["patch_embedding.weight"])
    for name, value in exact[part].items():
        error = (found.source(part).read(name, torch.float32) - value).abs().max()
        assert error <= value.abs().max() / 127, name


def test_a_part_alone_is_converted(models: dict[str, Path], tmp_path: Path) -> None:
    """A file, or the folder of the transformer alone; the whole folder is no part."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in models["ti2v"].iterdir():
        if file.name.startswith("diffusion") or file.name == "config.json":
            shutil.copy(file, alone)
    for source, name, row in (
        (alone, "x.safetensors", ("transformer", "dit")),
        (alone, "x.gguf", ("transformer", "dit")),
        (models["ti2v"] / "Wan2.2_VAE.pth", "vae.safetensors", ("VAE", "vae")),
        (models["i2v"] / "low_noise_model", "low_noise.safetensors", ("low-noise expert", "low")),
    ):
        form = "gguf-q8_0" if name.endswith("gguf") else "fp16"
        out = to(source, form, tmp_path / name)
        found = inspect(out)
        (part,) = found.parts
        assert found.complete is None and (part.what, part.part) == row and not part.error
    found = open_checkpoint(models["ti2v"], {"dit": tmp_path / "x.gguf"})
    assert found.source("dit").tensors["blocks.0.ffn.0.weight"].packing == "Q8_0"
    assert {*open_model(models["ti2v"], {}).sources} == {"dit", "t5", "vae"}


def test_parts_that_a_model_lacks(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(models["ti2v"]), str(tmp_path / "out"), "--to", "bf16", "--parts"]
    assert main([*command, "high,low"]) == 2
    assert "leaves nothing of tiny-ti2v, which has dit, t5, vae" in capsys.readouterr().err
    assert main([*command, "dit"]) == 0
    (file,) = (tmp_path / "out").rglob("*.safetensors")
    assert file.name == "tiny-ti2v_bf16.safetensors"


# The VAE


def test_the_names_of_the_vae_are_those_of_diffusers() -> None:
    """All 196 of the published one, and its shapes, both ways."""
    from diffusers import AutoencoderKLWan

    config = json.loads(configs.as_json(configs.autoencoder(TI2V_5B.vae)))
    with torch.device("meta"):
        their_vae = AutoencoderKLWan.from_config(config)
    theirs = {name: tuple(value.shape) for name, value in their_vae.state_dict().items()}
    ours = {name: tuple(value.shape) for name, value in module_of(TI2V_5B.vae).named_parameters()}
    names = from_official("vae", "diffusers", ours)
    assert len(ours) == 196 and {names[name]: shape for name, shape in ours.items()} == theirs
    back = to_official("vae", theirs)
    assert {back[name]: shape for name, shape in theirs.items()} == ours
    assert to_official("vae", ours) == {name: name for name in ours}
    assert (detect("vae", theirs), detect("vae", ours)) == ("diffusers", "official")
    for name in (
        "decoder.upsamples.0.upsamples.3.time_conv",
        "encoder.downsamples.1.downsamples.2",
    ):
        there = next(names[own] for own in ours if own.startswith(name))
        assert "sampler." in there and "samplers" not in there


@pytest.mark.parametrize("changes", [{"dim": 8}, {"num_res_blocks": 2, "dec_dim": 6}])
def test_a_vae_of_any_width(
    copies: dict[str, Path], changes: dict[str, int], tmp_path: Path
) -> None:
    config = replace(FAMILY["ti2v"].vae, **changes)  # type: ignore[arg-type]
    assert isinstance(config, VAE22Config)
    module = module_of(config).to_empty(device="cpu")
    state = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
    torch.save(state, copies["ti2v"] / "Wan2.2_VAE.pth")
    assert open_checkpoint(copies["ti2v"]).spec.vae == config
    assert open_checkpoint(to(copies["ti2v"], "diffusers", tmp_path / "x")).spec.vae == config


def test_a_vae_in_sixteen_bits_under_comfyuis_name(copies: dict[str, Path]) -> None:
    folder = copies["ti2v"]
    state = torch.load(folder / "Wan2.2_VAE.pth")
    (folder / "Wan2.2_VAE.pth").unlink()
    file = folder.parent / "wan2.2_vae.safetensors"
    save_file({name: value.half() for name, value in state.items()}, file)
    found = open_checkpoint(folder, {"vae": file})
    vae = load.load_vae(found)
    assert {value.dtype for value in vae.parameters()} == {torch.float32}
    (row,) = inspect(file).parts
    assert row.what == "VAE" and "Wan2.2 VAE" in str(row.model) and not row.missing


def test_the_vae_of_another_model_is_named(copies: dict[str, Path]) -> None:
    i2v, ti2v = copies["i2v"], copies["ti2v"]
    wrong = (
        "is the Wan2.2 VAE, with 48 channels",
        "I2V-A14B and T2V-A14B use wan_2.1_vae (Wan2.1_VAE.pth); wan2.2_vae belongs to TI2V-5B",
        "--vae",
    )
    for model in (i2v, NANO_FOLDER):
        told = refusal(lambda model=model: open_checkpoint(model, {"vae": ti2v / "Wan2.2_VAE.pth"}))  # type: ignore[misc]
        assert all(words in told for words in wrong)
    (i2v / "Wan2.1_VAE.pth").rename(ti2v / "Wan2.1_VAE.pth")
    (ti2v / "Wan2.2_VAE.pth").rename(i2v / "Wan2.2_VAE.pth")  # as people put it there
    assert all(words in refusal(lambda: open_checkpoint(i2v)) for words in wrong)
    assert wrong[1] in str(inspect(i2v).problem)
    told = refusal(lambda: open_checkpoint(ti2v))
    assert "is the Wan2.1 VAE, with 16 channels" in told
    assert "TI2V-5B uses wan2.2_vae (Wan2.2_VAE.pth), with 48" in told


# Which model, and which of its networks


def test_comfyuis_folder_of_both_models(models: dict[str, Path], tmp_path: Path) -> None:
    both = tmp_path / "models"
    for kind in KINDS:
        out = to(models[kind], "bf16", tmp_path / kind)
        shutil.copytree(out, both, dirs_exist_ok=True)
    (both / "text_encoders/tiny-i2v_t5_bf16.safetensors").unlink()
    (both / "wanflow.json").write_text('{"dit": {"num_heads": 4}}')
    told = refusal(lambda: open_checkpoint(both))
    assert "the transformer (TI2V-5B) or two experts (A14B)" in told and "--dit" in told
    unet = both / "diffusion_models"
    one = open_checkpoint(both, {"dit": unet / "tiny-ti2v_bf16.safetensors"})
    assert one.paths["vae"].name == "tiny-ti2v_vae.safetensors" and "high" not in one.paths
    two = {which: unet / f"tiny-i2v_{which}_noise_bf16.safetensors" for which in ("high", "low")}
    found = open_checkpoint(both, two)
    assert found.spec.conditioning == "channels" and "dit" not in found.paths
    assert found.paths["vae"].name == "tiny-i2v_vae.safetensors"


def test_networks_in_the_wrong_place(models: dict[str, Path]) -> None:
    i2v, ti2v = models["i2v"], models["ti2v"]
    high = i2v / "high_noise_model"
    for folder, given, words in (
        (ti2v, {"dit": high}, "has the channels of Wan2.2-I2V-A14B, which has two experts"),
        (i2v, {"high": ti2v}, "holds the transformer of Wan2.2-TI2V-5B, which has no experts"),
        (i2v, {"high": high, "dit": ti2v}, "the transformer (TI2V-5B) or two experts (A14B)"),
        (ti2v, {"high": high}, "lacks the low-noise expert"),
        (high, {}, "one network of the type i2v: Wan2.1, or one of two experts"),
    ):
        assert words in refusal(lambda f=folder, g=given: open_checkpoint(f, g))  # type: ignore[misc]
    told = refusal(lambda: open_checkpoint(i2v, {"low": NANO_FOLDER / "low_noise_model"}))
    assert "high-noise expert is of Wan2.2-I2V-A14B and the low-noise one of Wan2.2-T2V" in told


def test_clip_and_other_relatives_are_refused(copies: dict[str, Path]) -> None:
    file = copies["i2v"] / "high_noise_model/diffusion_pytorch_model-00001-of-00001.safetensors"
    state = load_file(file)
    for more, name in (
        ("img_emb.proj.0.weight", "Wan2.1-I2V (image to video, with CLIP)"),
        ("ref_conv.weight", "Wan Fun"),
        ("casual_audio_encoder.weight", "Wan2.2-S2V-14B"),
        ("face_adapter.x.weight", "Wan2.2-Animate-14B"),
    ):
        loose = copies["i2v"].parent / "x.safetensors"
        save_file(state | {more: torch.zeros(2)}, loose)
        assert name in refusal(lambda f=loose: open_checkpoint(copies["i2v"], {"high": f}))  # type: ignore[misc]
        assert inspect(loose).model and name in str(inspect(loose).model)


def test_a_config_must_agree(copies: dict[str, Path]) -> None:
    for folder, kind in (("i2v/high_noise_model", "i2v"), ("ti2v", "ti2v")):
        root = copies["i2v"].parent / folder
        model = copies[kind]
        edit(root / "config.json", lambda config: config.update(in_dim=16))
        assert "the config says in_dim 16" in refusal(lambda m=model: open_checkpoint(m))  # type: ignore[misc]
    edit(
        copies["i2v"] / "high_noise_model/config.json",
        lambda c: c.update(in_dim=36, model_type="t2v"),
    )
    assert "model_type t2v, the tensors say i2v" in refusal(lambda: open_checkpoint(copies["i2v"]))


def test_a_sheet_says_nothing_else_of_what_a_model_takes(copies: dict[str, Path]) -> None:
    def declare(value: str) -> None:
        edit(copies["ti2v"] / "wanflow.json", lambda s: s["defaults"].update(conditioning=value))

    declare("text")
    assert "conditioning 'text': the tensors say 'first_frame'" in refusal(
        lambda: open_checkpoint(copies["ti2v"])
    )
    declare("first_frame")
    assert open_checkpoint(copies["ti2v"]).spec.conditioning == "first_frame"


def test_what_is_missing_is_listed_with_the_models_command(copies: dict[str, Path]) -> None:
    (copies["ti2v"] / "Wan2.2_VAE.pth").unlink()
    (copies["ti2v"] / "diffusion_pytorch_model-00001-of-00001.safetensors").unlink()
    told = refusal(lambda: open_checkpoint(copies["ti2v"]))
    assert "diffusion_pytorch_model-00001-of-00001.safetensors" in told
    assert "Wan2.2_VAE.pth" in told and "wanflow download --task ti2v-5B --local_dir" in told
    found = inspect(copies["ti2v"])
    assert found.complete is False and {row.what for row in found.parts} > {"text encoder"}
    shutil.rmtree(copies["i2v"] / "low_noise_model")
    told = refusal(lambda: open_checkpoint(copies["i2v"]))
    assert "low_noise_model/config.json" in told and "--task i2v-A14B" in told


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_names_model_and_parts(models: dict[str, Path], kind: str) -> None:
    found = inspect(models[kind])
    whats = {row.what for row in found.parts}
    networks = {"transformer"} if kind == "ti2v" else {"high-noise expert", "low-noise expert"}
    assert found.complete and whats == networks | {"VAE", "text encoder", "tokenizer"}
    name = {"i2v": "Wan2.2-I2V-A14B", "ti2v": "Wan2.2-TI2V-5B"}[kind]
    network = next(row for row in found.parts if row.what in networks)
    assert network.model == f"another size of {name}: width 64, 3 blocks"


def test_without_the_files_a_published_model_has_its_sizes() -> None:
    expected = {T2V_A14B: 126.2, I2V_A14B: 126.2, TI2V_5B: 34.2}
    for spec in PUBLISHED:
        model = published(spec)
        assert [*model.sources] == [*spec.expert_names, "t5", "vae"]
        assert model.disk_bytes / 1e9 == pytest.approx(expected[spec], abs=0.03)
        assert configs.model_card(spec) is None


# Full size


@pytest.fixture(scope="module")
def full() -> Iterator[dict[str, Path]]:
    """Both published models, made of holes, in the official layout and as ComfyUI's files."""
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as name:
        found = {}
        for kind in KINDS:
            found[kind] = sparse_checkpoint.write_family(Path(name) / kind, kind)
            found[f"{kind} comfy"] = sparse_checkpoint.write_comfy(Path(name) / f"{kind}c", kind)
        for folder in found.values():
            shutil.copytree(NANO_FOLDER / "google", folder / "google")
        yield found


def test_full_size_modules_are_the_official_ones() -> None:
    """All names and shapes in the official order, parameters and bytes."""
    found = json.loads(sparse_checkpoint.FAMILY_SIZES.read_text())["modules"]
    modules = {
        "ti2v_5B": module_of(TI2V_5B.dit),
        "i2v_A14B_expert": module_of(I2V_A14B.dit),
        "wan2_2_vae": module_of(TI2V_5B.vae),
    }
    assert found.keys() == modules.keys()
    for name, module in modules.items():
        shapes = {key: list(value.shape) for key, value in module.named_parameters()}
        assert shapes == {key: info["shape"] for key, info in found[name]["state"].items()}
        parameters = sum(value.numel() for value in module.parameters())
        assert parameters == found[name]["parameters"] == found[name]["bytes_fp32"] // 4
        assert len(shapes) == found[name]["tensors"]


def test_full_size_files_are_the_published_ones(full: dict[str, Path]) -> None:
    """Bytes and hashes of FAMILY.md; only the order inside a header may differ by a few bytes."""

    def sha256(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def sizes(folder: Path) -> list[int]:
        return [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]

    folder = full["ti2v"]
    known = "Wan-AI/Wan2.2-TI2V-5B/"
    for name in ("config.json", "diffusion_pytorch_model.safetensors.index.json"):
        assert sha256(folder / name) == known_sha256(known + name)
    expected = [9_825_014_472, 9_995_661_736, 178_558_176]
    assert sizes(folder)[:3] == pytest.approx(expected, abs=8)
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert [*Counter(sorted(index["weight_map"].values())).values()] == [413, 407, 5]
    data = [9_994_100_736, 9_943_918_592, 9_943_959_552, 9_839_040_512, 9_839_040_512]
    for which in ("high", "low"):
        found = sizes(full["i2v"] / f"{which}_noise_model")
        assert found == pytest.approx([*data, 7_595_544_832], abs=20_000)
    file = full["ti2v comfy"] / "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors"
    assert file.stat().st_size == pytest.approx(9_999_658_848, abs=64)


@pytest.mark.parametrize(
    "name",
    ["i2v", "ti2v", *(pytest.param(f"{kind} comfy", marks=pytest.mark.slow) for kind in KINDS)],
)
def test_full_size_folders_are_the_published_models(
    full: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"i2v": I2V_A14B, "ti2v": TI2V_5B}[name.split()[0]]
    assert open_checkpoint(full[name]).spec == spec
    found = inspect(full[name])
    assert found.complete and found.model == spec.name
    assert found.parameters["published"] == ("5B" if spec is TI2V_5B else "27B total, 14B active")
    if name == "ti2v":
        assert main(["inspect", str(full[name])]) == 0
        line = "5B (transformer 4,999,787,712; 11,385,386,716 with all parts)"
        assert line in capsys.readouterr().out
    vae = next(row for row in found.parts if row.part == "vae")
    assert vae.model == ("the Wan2.2 VAE" if spec is TI2V_5B else "the Wan2.1 VAE")


@pytest.mark.slow
def test_a_full_size_folder_is_planned(
    full: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--ckpt_dir", str(full["ti2v comfy"]), "--gpu", "rtx4090", "--ram", "128"]
    assert main([*command, "--frame_num", "17", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] and document["model"]["name"] == TI2V_5B.name
    assert document["model"]["parameters"] == {
        "dit": 4_999_787_712,
        "t5": 5_680_910_336,
        "vae": 704_688_668,
    }


MEASURE = """
import json, sys
from pathlib import Path
from helpers.memory import Peak
from wanflow.checkpoint.checkpoint import open_checkpoint

peak = Peak()
for folder in sys.argv[1:]:
    model = open_checkpoint(Path(folder))
    for part in (model.spec.expert_names[0], "vae"):
        source = model.source(part)
        last = f"blocks.{model.spec.dit.num_layers - 1}."
        peak.reset()
        for name in source.tensors:
            if "blocks" not in name or name.startswith(last):
                tensor = source.read(name)
                peak.look()
                del tensor
        largest = max(info.nbytes for info in source.tensors.values())
        print(json.dumps({"peak": peak.look(), "largest": largest}))
"""


@pytest.mark.slow
@measurable
def test_full_size_parts_take_the_memory_of_one_tensor(full: dict[str, Path]) -> None:
    """The last block, and all that stands outside the blocks; the VAE whole.

    What is freed goes back to the system, or the heap would keep tensors of several megabytes.
    """
    folders = full["ti2v"], full["i2v comfy"]
    for found in measured(MEASURE, *folders, MALLOC_MMAP_THRESHOLD_="65536"):
        assert found["peak"] < found["largest"] + (16 << 20)


# LoRAs

LORA_CASES = (("ti2v", "fused"), ("i2v", "live"), ("i2v", "fused"))


@pytest.mark.parametrize(
    ("kind", "how"),
    [("ti2v", "live"), *(pytest.param(*case, marks=pytest.mark.slow) for case in LORA_CASES)],
)
def test_a_lora_is_the_changed_weights(
    models: dict[str, Path], kind: str, how: str, tmp_path: Path
) -> None:
    """Also of the patch embedding, with the channels of its model."""
    model, spec = open_checkpoint(models[kind]), FAMILY[kind]
    shapes = {name: value.shape for name, value in module_of(spec.dit).named_parameters()}
    generator, factors = torch.Generator().manual_seed(0), dict[str, Tensor]()
    changed = values(model)
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0", "patch_embedding"):
        out, *rest = shapes[f"{name}.weight"]
        up = torch.randn(out, 2, *[1] * (len(rest) - 1), generator=generator) / 8
        down = torch.randn(2, *rest, generator=generator) / 8
        factors[f"diffusion_model.{name}.lora_up.weight"] = up
        factors[f"diffusion_model.{name}.lora_down.weight"] = down
        delta = (up.flatten(1) @ down.flatten(1)).reshape(out, *rest)
        for part in spec.expert_names:
            changed[part][f"{name}.weight"] = changed[part][f"{name}.weight"] + 0.5 * delta
    save_file(factors, tmp_path / "style.safetensors")
    merged = Path(shutil.copytree(models[kind], tmp_path / "merged"))
    for part, folder in spec.expert_folders:
        file = merged / folder / "diffusion_pytorch_model-00001-of-00001.safetensors"
        save_file(changed[part], file)
    picture = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    asked: dict[str, Any] = {"image": picture, "seed": 1, "sample_steps": 2}
    settings: dict[str, Any] = {"progress": False, "dtype": "float32"}
    pipe = wanflow.load(models[kind], lora=how, **settings)  # type: ignore[arg-type]
    plain = pipe.generate("a red circle", **asked).frames
    found = pipe.generate("a red circle", lora=f"{tmp_path}/style.safetensors@0.5", **asked).frames
    expected = wanflow.load(merged, **settings).generate("a red circle", **asked).frames
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.abs(found.astype(int) - plain).mean() > 0.1
    if kind == "ti2v":
        one = f"{tmp_path}/style.safetensors@high=1,low=0"
        told = refusal(lambda: pipe.generate("a red circle", lora=one, **asked))
        assert "no two experts" in told
