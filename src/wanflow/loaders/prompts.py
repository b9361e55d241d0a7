"""Encode prompts with an encoder that stays resident, or one that is streamed and its cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import Report
from wanflow.checkpoint.load import load_text_encoder, load_tokenizer
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder


class PromptEncoder:
    """Encodes each prompt by itself, so that an encoding depends on nothing but its prompt.

    Args:
        checkpoint: where the encoder and its tokenizer are read from, when they are first needed.
        dtype: of the encoder.
        device: where it computes.
        resident: whether it stays in memory; otherwise each call streams it.
        cache: a folder for the encodings of a streamed encoder.
        report: called while weights are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        resident: bool,
        cache: str | None,
        report: Report | None,
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.resident, self.report = resident, report
        self._tokenizer: Tokenizer | None = None
        self._encoder: UMT5Encoder | None = None
        self._kept: dict[str, Tensor] = {}
        self._cache = None
        if cache is not None and not resident:
            from wanflow.loaders.prompt_cache import TextCache, text_key

            spec = checkpoint.spec
            like = (spec.dit.text_len, spec.text.dim), dtype
            self._cache = TextCache(Path(cache), text_key(checkpoint, dtype, device), like=like)

    def __call__(self, prompts: list[str], make_room: Callable[[], None]) -> list[Tensor]:
        """Return the states of each prompt, [text_len, D], zero past its end.

        Args:
            prompts: texts of any length.
            make_room: called before an encoder is streamed, and after.
        """
        known = {prompt: self._known(prompt) for prompt in prompts}
        missing = [prompt for prompt, states in known.items() if states is None]
        if missing and self.resident:
            known.update(zip(missing, self._encode(missing), strict=True))
        elif missing:
            make_room()
            known.update(zip(missing, self._stream(missing), strict=True))
            make_room()
        return [states for prompt in prompts if (states := known[prompt]) is not None]

    def remember(self, prompts: list[str], make_room: Callable[[], None]) -> None:
        """Encode prompts and keep their states in RAM, in place of those that were kept before."""
        states = self(prompts, make_room)
        self._kept = {prompt: one.cpu() for prompt, one in zip(prompts, states, strict=True)}

    def close(self) -> None:
        """Free the encoder, and what is remembered."""
        self._encoder, self._kept = None, {}

    def _known(self, prompt: str) -> Tensor | None:
        if prompt in self._kept:
            return self._kept[prompt].to(self.device)
        return self._cache.get(prompt) if self._cache else None

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint)
        return self._tokenizer(prompts)

    def _encode(self, prompts: list[str]) -> Tensor:
        """[B, text_len, D], without the padding, to which nothing attends."""
        ids, mask = self._tokens(prompts)
        if self._encoder is None:
            self._encoder = load_text_encoder(self.checkpoint, self.dtype, self.device, self.report)
        width = self.checkpoint.spec.text.dim
        states = torch.zeros(*ids.shape, width, dtype=self.dtype, device=self.device)
        for row, length in enumerate(mask.sum(1).tolist()):
            part = (slice(row, row + 1), slice(length))
            states[part] = self._encoder(ids[part].to(self.device), mask[part].to(self.device))
        return states

    def _stream(self, prompts: list[str]) -> Tensor:
        from wanflow.loaders.text_encoder import StreamedEncoder

        ids, mask = self._tokens(prompts)
        encoder = StreamedEncoder(self.checkpoint, self.dtype, self.device, self.report)
        states: Tensor = encoder(ids, mask)
        if self._cache is not None:
            for prompt, row in zip(prompts, states, strict=True):
                self._cache.put(prompt, row)
        return states
