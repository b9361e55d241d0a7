"""The LoRAs of a run: check the files, then apply them to each expert, live or fused.

A file is read once a run, when the request begins: one that does not fit fails before any weights
are read. The deltas of an expert are then held in RAM until that expert takes them (float32, 1.2 GB
for rank 64 on Wan2.2-A14B), and freed. An expert that is loaded again reads its files again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.lora.find import lora_fingerprints
from wanflow.lora.keys import EXPERTS
from wanflow.lora.reader import read_adapter
from wanflow.presets import Expert
from wanflow.request import Lora
from wanflow.transforms.block_streaming import Streaming
from wanflow.transforms.deltas import WeightDelta, changed
from wanflow.transforms.lora import Adapters

logger = logging.getLogger("wanflow")

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # of an expert's parameters, by official name
Deltas: TypeAlias = Mapping[str, WeightDelta]  # one file's, for one expert, by parameter
Merged: TypeAlias = tuple[tuple[str, float], ...]  # names and strengths of fused LoRAs


def shapes_of(model: nn.Module) -> Shapes:
    """Return the parameters' shapes of a model with no LoRA on it and no packed weights."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


class LoraStack:
    """The LoRAs in use, in order, and those that are attached to each loaded expert.

    Args:
        shapes: of an expert's parameters.
        live: whether LoRAs are computed next to the weights (`apply`) or merged into them while an
            expert loads (`fused`).
        experts: the names of the model's experts, or of its one network.
    """

    def __init__(self, shapes: Shapes, live: bool, experts: tuple[Expert, ...] = EXPERTS) -> None:
        self.shapes, self.live, self.experts = shapes, live, experts
        # By path, content and repetition: a file may be given twice, or change between two runs.
        self._loras: dict[str, Lora] = {}
        self._held: dict[str, dict[Expert, Deltas]] = {}  # what no expert has taken yet
        self._adapters: dict[Expert, Adapters] = {}

    def use(self, loras: tuple[Lora, ...], recorded: Mapping[str, str] | None = None) -> None:
        """Make these the LoRAs of the steps that follow; new files are read and reported.

        Args:
            recorded: fingerprints that the run began with, by path.

        Raises:
            RequestError: for a file that changed since, that is broken, or that does not fit the
                model. The LoRAs in use stay as they were.
        """
        fingerprints = lora_fingerprints(loras)
        for path, before in (recorded or {}).items():
            if fingerprints.get(path, before) != before:
                raise RequestError(
                    f"lora {path}: this is another file than the run began with; put that one back"
                )
        named: dict[str, Lora] = {}
        for index, lora in enumerate(loras):
            repetition = sum(before.path == lora.path for before in loras[:index])
            named[f"{lora.path} {fingerprints[lora.path]} {repetition}"] = lora
        new = {name: lora for name, lora in named.items() if name not in self._loras}
        read = {}
        for path in dict.fromkeys(lora.path for lora in new.values()):
            adapter = read_adapter(Path(path), self.shapes, self.experts)
            logger.info("lora %s: %s", Path(path).name, adapter.report())
            read[path] = adapter.changes
        self._held = {name: held for name, held in self._held.items() if name in named}
        self._held |= {name: _used(lora, read[lora.path]) for name, lora in new.items()}
        self._loras = named

    def apply(
        self, model: nn.Module | Streaming, expert: Expert, strengths: tuple[float, ...]
    ) -> None:
        """Set the live LoRAs of an expert to those in use, at these strengths.

        Call it at every step: only a change costs time. No strengths: no LoRAs.
        """
        loras = self._loras if strengths else {}
        if not self.live or not (loras or expert in self._adapters):
            return
        if expert not in self._adapters:
            plain = model.model if isinstance(model, Streaming) else model
            self._adapters[expert] = Adapters(plain)
        adapters = self._adapters[expert]
        for name in adapters.names:
            if name not in loras:
                adapters.remove(name)
        for name, strength in zip(loras, strengths, strict=True):
            if name in adapters.names:
                adapters.set_strength(name, strength)
            elif strength:
                # Also a file with nothing for this expert, or each step would read it again.
                adapters.attach(name, self._take(name, expert), strength)

    def merged(self, strengths: tuple[float, ...]) -> Merged:
        """Return which LoRAs an expert must hold fused at these strengths; () where they are live.

        An expert with an equal value needs no reloading.
        """
        if self.live or not strengths:
            return ()
        pairs = zip(self._loras, strengths, strict=True)
        return tuple((name, strength) for name, strength in pairs if strength)

    def fused(
        self, expert: Expert, merged: Merged
    ) -> dict[str, Callable[[str, Tensor], Tensor]] | None:
        """Return what the loader does to each weight: {parameter: (name, float32) -> float32}.

        The deltas are read here, on the caller's thread. None where `merged` is empty.
        """
        if not merged:
            return None
        deltas: dict[str, list[tuple[WeightDelta, float]]] = {}
        for name, strength in merged:
            for parameter, delta in self._take(name, expert).items():
                deltas.setdefault(parameter, []).append((delta, strength))

        def merge(parameter: str, weight: Tensor) -> Tensor:
            for delta, strength in deltas[parameter]:
                weight = changed(weight, delta, strength)
            return weight

        return dict.fromkeys(deltas, merge)

    def forget(self, expert: Expert) -> None:
        """Drop what is known of an expert whose weights are freed."""
        self._adapters.pop(expert, None)

    def release(self) -> None:
        """Free the deltas that no expert has taken; an expert that needs them reads the file."""
        self._held.clear()

    def _take(self, name: str, expert: Expert) -> Deltas:
        """The deltas of a LoRA for an expert, which are held here no longer."""
        held = self._held.get(name, {})
        if expert not in held:
            lora = self._loras[name]
            changes = read_adapter(Path(lora.path), self.shapes, self.experts).changes
            held = self._held[name] = {**_used(lora, changes), expert: changes[expert]}
        return held.pop(expert)


def _used(lora: Lora, changes: Mapping[Expert, Deltas]) -> dict[Expert, Deltas]:
    """The deltas of those experts on which the LoRA has a strength."""
    first = lora.first or 1
    return {expert: deltas for expert, deltas in changes.items() if lora.strength(expert, first)}
