"""Read UMT5's tokenizer: `tokenizer.json`, a sentencepiece model, or inside a T5 file.

T5 files of ComfyUI and GGUF carry it. All forms become the same engine of the `tokenizers` library:
a unigram model over pieces with scores, behind sentencepiece's own normalisation. Source of the
format: sentencepiece's `sentencepiece_model.proto`.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from wanflow.checkpoint.containers import AGAIN, TensorSource, opened_raw, refuse_unreadable
from wanflow.checkpoint.source import EMBEDDED, open_source
from wanflow.config import RequestError
from wanflow.untrusted import parse_json, printable, read_bytes

if TYPE_CHECKING:
    from wanflow.checkpoint.gguf import GGUFFile

LIMIT = 20 << 20  # bytes of a tokenizer; the published ones have 5 and 17 MB
MOST_PIECES = 1 << 20  # UMT5 has 256,384
MOST_GROWTH = 64  # times that cleaning may lengthen a text; T5's own makes 18 letters of one
LONGEST_STEP = 1000  # characters that a step of cleaning puts somewhere, and of a piece
TRIAL = "a Ａ, 日\U0010ffff"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # sentencepiece's types of pieces


@dataclass(frozen=True)
class Pieces:
    """The contents of a sentencepiece unigram model."""

    pieces: list[tuple[str, float]]
    types: list[int]
    charsmap: bytes
    add_prefix: bool = True
    fold_spaces: bool = True


def open_tokenizer(path: Path, source: TensorSource | None = None) -> Tokenizer:
    """Read the tokenizer in a file of any form.

    `source` is the file, where it is a T5 file that is open.

    Raises:
        RequestError: naming the file, when it is missing or damaged, or holds no T5 tokenizer.
    """
    engine = _open(path) if source is None else _inside(source)
    try:
        engine.encode(TRIAL, add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # faults that loading misses; a panic there is no Exception
        raise RequestError(f"{path}: its tokenizer is damaged ({error}); {AGAIN}") from None
    lacking = [word for word in ("<pad>", "</s>") if engine.token_to_id(word) is None]
    if lacking:
        raise RequestError(
            f"{path}: the tokenizer has no {' and no '.join(lacking)}, so it is not T5's; name"
            " another with --tokenizer"
        )
    return engine


def _open(path: Path) -> Tokenizer:
    size = refuse_unreadable(path)
    with opened_raw(path) as file:
        start = file.read(16)
    if start.lstrip()[:1] == b"{":
        if size > LIMIT:
            raise RequestError(f"{path} is too large for a tokenizer; {AGAIN}")
        return _from_json(read_bytes(path, LIMIT), path)
    # The first field of a sentencepiece model is a piece.
    if start[:1] == b"\n" and size <= LIMIT:
        return build(_parse(read_bytes(path, LIMIT), path), path)
    return _inside(open_source(path))


def _inside(source: TensorSource) -> Tokenizer:
    """Read the tokenizer in a T5 file."""
    from wanflow.checkpoint.gguf import GGUFFile

    path = source.path
    if isinstance(source, GGUFFile):
        return build(_from_gguf(source), path)
    held = _embedded(source)
    info = None if held is None else source.tensors[held]
    if held is None or info is None or info.nbytes > LIMIT or info.dtype.itemsize != 1:
        raise RequestError(
            f"{path} holds no tokenizer; name one with --tokenizer (tokenizer.json or spiece.model"
            " of google/umt5-xxl)"
        )
    return build(_parse(source.read(held).numpy().tobytes(), path), path)


def carries_tokenizer(source: TensorSource) -> bool:
    """Return whether a T5 file carries its tokenizer."""
    return "tokenizer.ggml.tokens" in source.metadata or _embedded(source) is not None


def _embedded(source: TensorSource) -> str | None:
    """Return the tensor that holds a tokenizer's bytes."""
    return next((name for name in source.tensors if name.split(".")[-1] == EMBEDDED), None)


def build(model: Pieces, path: Path) -> Tokenizer:
    """Return the engine for a sentencepiece unigram model, with sentencepiece's own ids."""
    check_charsmap(model.charsmap, path)
    unknown = next((index for index, kind in enumerate(model.types) if kind == UNKNOWN), None)
    if unknown is None:
        raise RequestError(f"{path}: its tokenizer has no unknown piece; {AGAIN}")
    try:
        _refuse_long(piece for piece, _ in model.pieces)
        # A model that falls back to bytes has a piece for every byte.
        bytewise = model.types.count(BYTE) == 256
        engine = Tokenizer(Unigram(model.pieces, unk_id=unknown, byte_fallback=bytewise))
        steps: list[normalizers.Normalizer] = []
        if model.charsmap:
            steps.append(normalizers.Precompiled(model.charsmap))
        if model.fold_spaces:
            steps.append(normalizers.Strip(left=True, right=True))
            steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        engine.normalizer = normalizers.Sequence(steps)
        prepend: Literal["always", "never"] = "always" if model.add_prefix else "never"
        engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
        engine.decoder = decoders.Metaspace(prepend_scheme=prepend)
        typed = [(piece, kind) for (piece, _), kind in zip(model.pieces, model.types, strict=True)]
        marks = [piece for piece, kind in typed if kind == CONTROL]
        own = [piece for piece, kind in typed if kind == USER_DEFINED]
        engine.add_special_tokens(
            [AddedToken(piece, special=True, normalized=False) for piece in marks]
        )
        engine.add_tokens([AddedToken(piece, normalized=False) for piece in own])
    except Exception as error:  # the library raises bare Exception for a malformed model
        raise RequestError(f"{path}: its tokenizer is damaged ({error}); {AGAIN}") from None
    return engine


def _refuse_long(pieces: Iterable[str]) -> None:
    """Raise a ValueError for a piece on which the library's tree recurses beyond its stack."""
    longest = max(map(len, pieces), default=0)
    if longest > LONGEST_STEP:
        raise ValueError(f"a piece of {longest:,} letters")


def check_charsmap(data: bytes, path: Path) -> None:
    """Raise a RequestError for a table of sentencepiece's normaliser that leads outside itself.

    The library trusts it. It is the size of a trie, the trie (darts-clone's units of 32 bits), and
    the UTF-8 strings that the trie leads to, each with a zero at its end.
    """
    if data and not _closed(data):
        raise RequestError(
            f"{path}: its tokenizer is damaged (the table of its normaliser leads outside itself);"
            f" {AGAIN}"
        )


def _closed(data: bytes) -> bool:
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or not 0 < size <= len(data) - 4 or size % 1024:  # blocks of 256 units
        return False
    units = np.frombuffer(data[4 : 4 + size], "<u4").astype(np.int64)
    texts = data[4 + size :]
    inner = np.flatnonzero(units >> 31 == 0)  # the others are leaves
    children = inner ^ ((units[inner] >> 10) << ((units[inner] & 512) >> 6))
    if not (children < len(units)).all():
        return False
    try:
        texts.decode()
    except UnicodeDecodeError:
        return False
    if max(map(len, texts.split(b"\0"))) > MOST_GROWTH:  # of what one letter becomes
        return False
    # No string begins after the end, or within a character.
    starts = np.unique(units[children[units[inner] & 256 != 0]] & 0x7FFFFFFF).tolist()
    return all(start < len(texts) and texts[start] & 0xC0 != 0x80 for start in starts)


def _from_json(data: bytes, path: Path) -> Tokenizer:
    """Return the engine of a `tokenizer.json`, of which only what T5's tokenizers have is kept.

    What the library gets is written from what was checked, so that no second reading differs.
    """
    parsed = parse_json(data, path, LIMIT)
    try:
        growth, added = _growth(parsed.get("normalizer"), path)
        more = _growth(parsed.get("pre_tokenizer"), path)
        if growth * more[0] > MOST_GROWTH or added + more[1] > LONGEST_STEP:
            raise ValueError(f"its cleaning makes a text more than {MOST_GROWTH} times as long")
        if not isinstance(parsed["model"], dict):
            raise ValueError("its model is no object")
        vocabulary = parsed["model"].get("vocab", ())
        _refuse_long(piece if isinstance(vocabulary, dict) else piece[0] for piece in vocabulary)
        # wanflow pads, cuts and ends prompts itself.
        parsed |= {"padding": None, "truncation": None, "post_processor": None}
        if _growth(parsed.get("decoder"), path)[0] > MOST_GROWTH:
            parsed["decoder"] = None
        return Tokenizer.from_str(json.dumps(parsed, ensure_ascii=False))
    except (KeyboardInterrupt, SystemExit, RequestError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise RequestError(
            f"{path} is not a readable tokenizer: {printable(error)}; {AGAIN}"
        ) from None


# Steps that leave a text's length as it is, or at most double it.
PLAIN_STEPS = {
    **dict.fromkeys(("Strip", "StripAccents", "Lowercase", "Nmt", "NFC", "BertNormalizer"), 1),
    **dict.fromkeys(("NFD", "NFKC", "NFKD", "ByteLevel"), 2),
    **dict.fromkeys(("Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"), 2),
    **dict.fromkeys(("BertPreTokenizer", "UnicodeScripts", "FixedLength"), 1),
    **dict.fromkeys(("ByteFallback", "Fuse", "WordPiece", "CTC", "BPEDecoder"), 2),
}


def _growth(step: Any, path: Path) -> tuple[int, int]:
    """Return how many times longer a step of cleaning makes a text, and by how many letters more.

    Raises:
        ValueError: for an unknown step, or a pattern that may take for ever.
        RequestError: for a table that leads outside itself.
    """
    if step is None:
        return 1, 0
    kind = step["type"]
    if kind == "Sequence":
        (steps,) = (step[key] for key in STEP_LISTS if key in step)
        times, more = 1, 0
        for one in steps:
            factor, letters = _growth(one, path)
            times, more = times * factor, more + letters
            if times > MOST_GROWTH or more > LONGEST_STEP:
                break
        return times, more
    if kind == "Precompiled":
        table = base64.b64decode(step["precompiled_charsmap"], validate=True)
        check_charsmap(table, path)
        return 1, 0
    if kind == "Prepend":
        return 1, len(step["prepend"])
    if kind in ("Replace", "Split"):
        shortest = _shortest(step["pattern"])
        content = len(step.get("content", ""))
        return max(1, -(-content // shortest)), 0
    return PLAIN_STEPS[kind], 0


STEP_LISTS = ("normalizers", "pretokenizers", "decoders")


def _shortest(pattern: Any) -> int:
    """Return the least length that a pattern of a step matches.

    A regular expression has no group, no choice and one repetition at most: others take for ever
    on some texts.
    """
    ((kind, text),) = pattern.items()
    if not isinstance(text, str) or not text:
        raise ValueError("a step without a pattern")
    if kind == "String":
        return len(text)
    if set(text) & set("(|") or sum(text.count(sign) for sign in "*+?{") > 1:
        raise ValueError(f"the pattern {printable(text)!r}")
    return 1


def _from_gguf(source: GGUFFile) -> Pieces:
    meta = source.metadata
    if meta.get("tokenizer.ggml.model") != "t5":
        raise RequestError(
            f"{source.path} holds no T5 tokenizer ({meta.get('tokenizer.ggml.model')!r}); name one"
            " with --tokenizer"
        )
    tokens, scores, types = (
        list(source.array(f"tokenizer.ggml.{key}")) for key in ("tokens", "scores", "token_type")
    )
    if not len(tokens) == len(scores) == len(types):
        raise RequestError(
            f"{source.path}: its tokenizer has {len(tokens)} pieces, {len(scores)} scores,"
            f" {len(types)} types; {AGAIN}"
        )
    charsmap = "tokenizer.ggml.precompiled_charsmap"
    table = source.array(charsmap) if charsmap in meta else []
    if not all(isinstance(value, int) for value in table):
        raise RequestError(f"{source.path}: its normaliser's table holds no bytes; {AGAIN}")
    raw = bytes(value & 255 for value in table)
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    fold = meta.get("tokenizer.ggml.remove_extra_whitespaces", True)
    return Pieces(list(zip(tokens, scores, strict=True)), types, raw, bool(prefix), bool(fold))


# sentencepiece's protobuf, of which three fields matter


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of each field of a protobuf message; ValueError for other bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if place + size > len(data):
            raise ValueError("it breaks off")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError("it breaks off")
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _parse(data: bytes, path: Path) -> Pieces:
    """Parse a ModelProto.

    Field 1: the pieces (1 text, 2 score, 3 type). Field 3: the normaliser (2 table, 3 dummy prefix,
    4 extra spaces).
    """
    pieces: list[tuple[str, float]] = []
    types: list[int] = []
    normaliser: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                parts = dict(_fields(value))
                text, score, kind = parts.get(1, b""), parts.get(2, b"\0\0\0\0"), parts.get(3, 1)
                if not (
                    isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)
                ):
                    raise ValueError("a piece is malformed")
                pieces.append((text.decode(), struct.unpack("<f", score)[0]))
                if len(pieces) > MOST_PIECES:
                    raise ValueError(f"it has more than {MOST_PIECES:,} pieces")
                types.append(kind)
            elif number == 3 and isinstance(value, bytes):
                normaliser = dict(_fields(value))
        charsmap = normaliser.get(2, b"")
        if not pieces or not isinstance(charsmap, bytes):
            raise ValueError("it has no pieces")
    except (ValueError, struct.error) as error:
        raise RequestError(
            f"{path}: its tokenizer is not a sentencepiece model, or damaged ({error}); {AGAIN}"
        ) from None
    return Pieces(pieces, types, charsmap, bool(normaliser.get(3, 1)), bool(normaliser.get(4, 1)))
