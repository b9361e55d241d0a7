"""The parts of a model: names, kinds, and what messages call them. Imports no torch."""

from __future__ import annotations

from wanflow.checkpoint.key_maps import Kind
from wanflow.presets import T2V_A14B

Part = str  # the name of an expert, "t5", "vae" or "tokenizer"

EXPERTS = T2V_A14B.expert_names
WEIGHTS: tuple[Part, ...] = (*EXPERTS, "t5", "vae")
PARTS: tuple[Part, ...] = (*WEIGHTS, "tokenizer")
KINDS: dict[Part, Kind] = {**dict.fromkeys(EXPERTS, "dit"), "t5": "t5", "vae": "vae"}
WORDS: dict[Part, str] = {
    **{expert: f"the {expert}-noise expert" for expert in EXPERTS},
    "t5": "the text encoder",
    "vae": "the VAE",
    "tokenizer": "the tokenizer",
}
FLAGS = ", ".join(f"--{part}" for part in WEIGHTS)


def kind_of(part: Part) -> Kind:
    """Return the kind of model that a part is; KeyError for the tokenizer."""
    return KINDS[part]
