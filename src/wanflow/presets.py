"""Tables of the published models: experts, shapes, latent statistics, defaults, step presets.

Sources: the official configurations of Wan2.2 (defaults, boundaries, negative prompt), its model
    and VAE files (shapes, latent statistics). Guidance is by name, high and low: the official pair
    is written (low, high).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wanflow.config import TRAIN_STEPS, DiTConfig, Solver, TextConfig, VAE22Config, VAEConfig

Expert = str  # the name of an expert of a `ModelSpec`
ONLY: Expert = "dit"  # the name of the one network of a model without two experts
# What a model takes besides text: nothing; a picture in further channels of its input; a picture as
# the first latent frame.
Conditions = Literal["text", "channels", "first_frame"]


def title(expert: Expert) -> str:
    """Return what messages call an expert."""
    return "transformer" if expert == ONLY else f"{expert}-noise expert"


@dataclass(frozen=True)
class ExpertSpec:
    """One expert: its name, its folder in the official layout, the lowest timestep it denoises."""

    name: Expert
    folder: str
    from_timestep: float


@dataclass(frozen=True)
class ModelSpec:
    """A model's experts and shapes, with the defaults its authors publish.

    boundary: where the first of two experts hands over, as a fraction of the timesteps; 0 where
        there is one.
    expert_folders: (name, folder) of each expert, in the order in which they denoise.
    """

    name: str
    task: str
    dit: DiTConfig
    text: TextConfig
    vae: VAEConfig
    boundary: float
    sample_shift: float
    sample_steps: int
    cfg_high: float
    cfg_low: float
    size: tuple[int, int]
    frame_num: int
    fps: int
    negative_prompt: str
    sample_solver: Solver = "unipc"
    expert_folders: tuple[tuple[Expert, str], ...] = (
        ("high", "high_noise_model"),
        ("low", "low_noise_model"),
    )
    conditioning: Conditions = "text"

    @property
    def expert_names(self) -> tuple[Expert, ...]:
        return tuple(name for name, _ in self.expert_folders)

    @property
    def experts(self) -> tuple[ExpertSpec, ...]:
        """The experts in the order in which they denoise; the last goes down to timestep 0."""
        return self.experts_at(self.boundary)

    def experts_at(self, boundary: float) -> tuple[ExpertSpec, ...]:
        """Return the experts, with the boundary of a request in place of the model's own."""
        starts = (boundary * TRAIN_STEPS, 0.0)[-len(self.expert_folders) :]
        return tuple(
            ExpertSpec(name, folder, start)
            for (name, folder), start in zip(self.expert_folders, starts, strict=True)
        )


# One mean and one standard deviation for each of the 16 latent channels of the Wan2.1 VAE.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# The same for the 48 channels of the Wan2.2 VAE, which only TI2V-5B has.
LATENT_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

# What the model was tuned with; it names, in Chinese, over-exposure, stillness, subtitles,
# malformed hands and the like.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)

T2V_A14B = ModelSpec(
    name="Wan2.2-T2V-A14B",
    task="t2v-A14B",
    dit=DiTConfig(),
    text=TextConfig(),
    vae=VAEConfig(latent_mean=LATENT_MEAN, latent_std=LATENT_STD),
    boundary=0.875,
    sample_shift=12.0,
    sample_steps=40,
    cfg_high=4.0,
    cfg_low=3.0,
    size=(1280, 720),
    frame_num=81,
    fps=16,
    negative_prompt=NEGATIVE_PROMPT,
)

I2V_A14B = replace(
    T2V_A14B,
    name="Wan2.2-I2V-A14B",
    task="i2v-A14B",
    dit=DiTConfig(in_dim=36, model_type="i2v"),
    boundary=0.9,
    sample_shift=5.0,
    cfg_high=3.5,
    cfg_low=3.5,
    conditioning="channels",
)
TI2V_5B = replace(
    T2V_A14B,
    name="Wan2.2-TI2V-5B",
    task="ti2v-5B",
    dit=DiTConfig(
        dim=3072,
        ffn_dim=14336,
        num_heads=24,
        num_layers=30,
        in_dim=48,
        out_dim=48,
        model_type="ti2v",
    ),
    vae=VAE22Config(latent_mean=LATENT_MEAN_22, latent_std=LATENT_STD_22),
    boundary=0.0,
    sample_shift=5.0,
    sample_steps=50,
    cfg_high=5.0,
    cfg_low=5.0,
    size=(1280, 704),
    frame_num=121,
    fps=24,
    expert_folders=((ONLY, "."),),
    conditioning="first_frame",
)
FAMILY = (T2V_A14B, I2V_A14B, TI2V_5B)

# The miniature inside the package. `wanflow.json` next to its weights has its latent statistics,
# which come from training.
NANO_FOLDER = Path(__file__).parent / "assets" / "nano"  # its weights, in the package
NANO = ModelSpec(
    name="nano",
    task="t2v-nano",
    dit=DiTConfig(
        dim=160, ffn_dim=640, num_heads=5, num_layers=6, text_dim=128, text_len=32, freq_dim=64
    ),
    text=TextConfig(vocab=480, dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=3),
    vae=VAEConfig(dim=16, num_res_blocks=1),
    boundary=0.875,
    sample_shift=5.0,
    sample_steps=20,
    cfg_high=4.0,
    cfg_low=3.0,
    size=(64, 64),
    frame_num=17,
    fps=8,
    negative_prompt="",
)

NANO_I2V_FOLDER = NANO_FOLDER.parent / "nano-i2v"  # its experts; the rest is nano's
NANO_I2V = replace(
    NANO,
    name="nano-i2v",
    task="i2v-nano",
    dit=replace(NANO.dit, in_dim=36, model_type="i2v"),
    boundary=0.9,
    cfg_high=2.0,  # more guidance moves the first frame away from its picture
    cfg_low=1.5,
    conditioning="channels",
)
EMBEDDED = {NANO.name: NANO_FOLDER, NANO_I2V.name: NANO_I2V_FOLDER}
LENT = {NANO_I2V_FOLDER: NANO_FOLDER}  # whose text encoder, VAE and tokenizer a folder has

# Step presets: values for the fields that a request leaves open. The Lightning LoRAs (rank 64, one
# for each expert) were distilled for Euler at shift 5 without guidance; the timesteps of four steps
# are then 1000, 937.5, 833.3 and 625.
LIGHTNING: dict[str, Any] = {
    "sample_solver": "euler",
    "sample_shift": 5.0,
    "cfg_high": 1.0,
    "cfg_low": 1.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lightning4": {**LIGHTNING, "sample_steps": 4},
    "lightning8": {**LIGHTNING, "sample_steps": 8},
    # Three phases, since distillation costs motion: two steps without LoRAs, then with them on the
    # high-noise expert, then on the low-noise one.
    "lightning-motion": {
        **LIGHTNING,
        "sample_steps": 8,
        "cfg_start": 3.5,
        "cfg_start_steps": 2,
        "lora_from": 3,
    },
}
