"""Damage to files, from a seed: bytes of any kind, JSON, and the structure of each container that
wanflow reads.

Every function takes a random generator and the bytes of a good file, and returns the bytes of a bad
one. Some only bend a file, so that it is whole and says something else; most break it.
"""

from __future__ import annotations

import io
import itertools
import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Damage = Callable[[Random, bytes], bytes]

NUMBERS = (
    0,
    1,
    2,
    7,
    127,
    255,
    256,
    65535,
    1 << 20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
HUGE = "1" * 5000  # more digits than Python reads
NAMES = (
    "",
    " ",
    ".",
    "..",
    "x",
    "\0",
    "a\nb",
    "a\r\nb",
    "\x1b[31mred",
    "\u202egnp",
    "\u2028",
    "é",
    "e\u0301",
    "日本",
    "\U0001f600",
    "\ud800",
    "٣",
    "../x",
    "/etc/passwd",
    "C:\\x",
    "CON",
    "%s%n",
    "{0}",
    "${HOME}",
    "__class__",
    "__metadata__",
    "x" * 300,
    "x" * 5000,
    "a." * 500,
)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    -1,
    -(2**63),
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    True,
    False,
    None,
    "@huge@",
    [],
    {},
    [[]],
    [None],
    [0],
    [-1],
    {"": 0},
    [1] * 300,
    [1] * 70,
    [0, 8],
    "F32",
    "U8",
    "F8_E4M3",
)
CODE = b"cio\nopen\n(V%s\nVw\ntR."  # a pickle that leaves a file behind, if it is run
CODE_MARK = "@code@"  # replaced by the path of that file


# bytes


def of_bytes(rng: Random, data: bytes, first: int = 0) -> bytes:
    """One to three changes anywhere, most of them near `first` or in the first bytes after it."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not out:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
        at = (
            rng.randrange(len(out))
            if rng.random() < 0.4
            else min(len(out) - 1, first + int(rng.expovariate(1 / 200)))
        )
        size = min(len(out) - at, rng.choice((1, 2, 4, 8, 16, 100, 1000)))
        match rng.randrange(11):
            case 0 | 1:
                for _ in range(rng.randint(1, 8)):
                    out[rng.randrange(at, at + size)] ^= 1 << rng.randrange(8)
            case 2:
                del out[at:]
            case 3:
                out += rng.choice(
                    (
                        bytes(rng.randint(1, 5000)),
                        rng.randbytes(rng.randint(1, 500)),
                        bytes(out[:at]),
                    )
                )
            case 4:
                out[at:at] = out[at : at + size]
            case 5:
                del out[at : at + size]
            case 6:
                other = rng.randrange(len(out))
                out[at : at + size] = out[other : other + size]
            case 7:
                out[at : at + size] = bytes(size)
            case 8:
                out[at : at + size] = rng.randbytes(size)
            case _:
                width = rng.choice((1, 2, 4, 8))
                out[at : at + width] = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(
                    width, rng.choice(("little", "little", "big"))
                )
    return bytes(out)


def text(rng: Random, value: str) -> str:
    """A string like another: with other digits, other letters, longer, shorter, or a wholly odd
    one.
    """
    digits = [found.span() for found in re.finditer(r"\d+", value)]
    choice = rng.randrange(9)
    if digits and choice < 3:
        start, stop = rng.choice(digits)
        number = rng.choice(
            (
                "0",
                "1",
                "9",
                "39",
                "255",
                "256",
                "257",
                "4096",
                "99999999",
                "9" * 30,
                HUGE,
                "-1",
                "1e9",
                "٣",
                "007",
            )
        )
        return value[:start] + number + value[stop:]
    at = rng.randrange(len(value) + 1)
    return {
        3: value[:at] + rng.choice(NAMES) + value[at:],
        4: value[:at],
        5: value[at:],
        6: value + rng.choice((".weight", ".alpha", "s", ".")),
        7: (
            rng.choice(
                (
                    "model.",
                    "diffusion_model.",
                    "text_encoders.umt5xxl.transformer.",
                    "vae.",
                    "lora_unet_",
                )
            )
            + value
        ),
    }.get(choice, rng.choice(NAMES))


# JSON


def nested(depth: int, kind: type = list) -> Any:
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def of_value(rng: Random, value: Any) -> Any:
    """A copy of a JSON value in which one thing is otherwise."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _of_object(rng, value)
    if isinstance(value, list) and value and rng.random() < 0.85:
        items, at = list(value), rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                del items[at]
            case 1:
                items.insert(at, items[rng.randrange(len(items))])
            case 2:
                rng.shuffle(items)
            case _:
                items[at] = of_value(rng, items[at])
        return items
    if isinstance(value, str) and rng.random() < 0.6:
        return text(rng, value)
    if isinstance(value, int | float) and rng.random() < 0.5:
        small = value if abs(value) < 1e300 else 0.5
        return rng.choice(
            (
                value + 1,
                value - 1,
                -value,
                value * 2,
                value * 1000,
                float(small),
                str(small),
                [value],
                small / 3,
            )
        )
    return rng.choice((*VALUES, *NAMES, nested(20), nested(20, dict)))


def _of_object(rng: Random, value: dict[str, Any]) -> dict[str, Any]:
    items, at = list(value.items()), rng.randrange(len(value))
    key, held = items[at]
    match rng.randrange(8):
        case 0:
            del items[at]
        case 1:
            items[at] = text(rng, key), held
        case 2:
            items.append((text(rng, key), held))
        case 3:
            other = rng.randrange(len(items))
            items[at], items[other] = (key, items[other][1]), (items[other][0], held)
        case _:
            items[at] = key, of_value(rng, held)
    return dict(items)


def dump(rng: Random, value: Any) -> bytes:
    """JSON that may be odd as text, too: a key twice, deep nesting, another encoding."""
    said = json.dumps(value, ensure_ascii=rng.random() < 0.5).replace('"@huge@"', HUGE)
    keys = list(re.finditer(r'"[^"\\]*": ("[^"\\]*"|[-\d.]+|\[[^\[\]]*\])', said))
    match rng.randrange(16):
        case 0 if keys:
            found = rng.choice(keys)
            said = f"{said[: found.start()]}{found[0]}, {said[found.start() :]}"
        case 1:
            at, depth = rng.randrange(len(said) + 1), rng.choice((100, 2000, 200_000))
            said = said[:at] + rng.choice(("[", '{"a":', "[" * 3 + "]")) * depth + said[at:]
        case 2:
            said += rng.choice((" ", "\n", "{}", "\0", "//", "]"))
        case 3:
            return said.encode(
                rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")), "surrogatepass"
            )
        case 4:
            at = rng.randrange(len(said) + 1)
            said = said[:at] + rng.choice((*NAMES, '"', ",", "-", "e9", "9" * 400)) + said[at:]
    return said.encode("utf-8", "surrogatepass")


def of_json(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return of_bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = of_value(rng, value)
    return dump(rng, value)


# safetensors

WIDTHS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
ODD_DTYPES = ("F4", "U16", "F8_E8M0", "C64", "f32", "", "Q8_0")
ENDS = (
    ".lora_A.weight",
    ".lora_up.weight",
    ".lora_down.weight",
    ".alpha",
    ".diff",
    ".diff_b",
    ".dora_scale",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w2",
    ".set_weight",
    ".lora_mid.weight",
    ".lora_magnitude_vector",
    ".scale_weight",
    ".weight_scale",
    ".weight_scale_2",
    ".alpha",
    ".comfy_quant",
    ".scale_input",
    ".bias",
)


def of_safetensors(rng: Random, data: bytes) -> bytes:
    """Bytes; the header; or a whole file that says something else."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    choice = rng.random()
    if choice < 0.3:
        return of_bytes(rng, data)
    if choice < 0.6:
        for _ in range(rng.choice((1, 1, 2))):
            header = of_value(rng, header)
        said = dump(rng, header)
        return (
            struct.pack("<Q", len(said) if rng.random() < 0.9 else rng.choice(NUMBERS))
            + said
            + body
        )
    return _bent(rng, header, body)


def _bent(rng: Random, header: dict[str, Any], body: bytes) -> bytes:
    """A file whose header and data agree, with some tensors renamed, lost, doubled, or of another
    shape, dtype or content.
    """
    metadata = header.pop("__metadata__", None)
    held = {
        name: (said["dtype"], said["shape"], body[slice(*said["data_offsets"])])
        for name, said in header.items()
    }
    for _ in range(rng.randint(1, 3)):
        if not held:
            break
        name = rng.choice(list(held))
        kind, shape, values = held[name]
        match rng.randrange(11):
            case 0:
                held[text(rng, name)] = held.pop(name)
            case 10:
                held[text(rng, name)] = held[name]
            case 1:
                del held[name]
            case 2:
                stem = name.rpartition(".")[0]
                held[stem + rng.choice(ENDS)] = held[rng.choice(list(held))]
            case 3:
                held[name] = rng.choice([(other, shape, b"") for other in (*WIDTHS, *ODD_DTYPES)])
            case 4 | 5:
                sides = rng.choice(
                    (
                        shape[::-1],
                        [*shape, 1],
                        [1, *shape],
                        shape[:-1],
                        [],
                        [0],
                        [0, 1 << 40],
                        [1] * 70,
                        [*shape, 0],
                        [2, 2],
                    )
                )
                held[name] = kind, sides, b""
            case 6:
                word = {"F32": 4, "F64": 8}.get(kind, 2)
                held[name] = (
                    kind,
                    shape,
                    rng.choice((b"\xff" * word, bytes(word), b"\x80\x7f" * word, b"\x7f" * word))
                    * 4,
                )
            case 7 if re.search(r"\d", name):
                for number in range(rng.choice((3, 40, 300))):
                    held[re.sub(r"\d+", str(number), name, count=1)] = kind, [1], b""
            case 8 if metadata:
                metadata = of_value(rng, metadata)
            case _ if isinstance(metadata, dict) and metadata:
                key = rng.choice(list(metadata))
                if isinstance(metadata[key], str) and metadata[key].startswith("{"):
                    metadata[key] = _of_said(rng, metadata[key])
    said: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    out = bytearray()
    for name, (kind, shape, values) in held.items():
        size = WIDTHS.get(kind, 1)
        for side in shape:
            size *= side
        size = min(size, 1 << 20)
        said[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(out), len(out) + size]}
        out += (
            values * (size // max(1, len(values)) + 1)
            if values
            else bytes(range(256)) * (size // 256 + 1)
        )[:size]
    header_text = json.dumps(said).replace('"@huge@"', HUGE).encode()
    return struct.pack("<Q", len(header_text)) + header_text + bytes(out)


def _of_said(rng: Random, said: str) -> str:
    """JSON within JSON."""
    try:
        return of_json(rng, said.encode()).decode("utf-8", "replace")
    except ValueError:  # bent before
        return said[: rng.randrange(len(said))]


def of_metadata(rng: Random, data: bytes) -> bytes:
    """What a file says of its quantisation: JSON in its header, or in tensors of bytes."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    key, notes = (
        "_quantization_metadata",
        [name for name in header if name.endswith(".comfy_quant")],
    )
    if not notes:
        said = header["__metadata__"]
        if rng.random() < 0.1:
            header["__metadata__"] = of_value(rng, said)
        else:
            said[key] = _of_said(rng, said[key])
        return _whole(header, body)
    name = rng.choice(notes)
    start, stop = header[name]["data_offsets"]
    return (
        _exchanged(header, body, name, of_json(rng, body[start:stop]))
        if rng.random() < 0.8
        else _bent(rng, header, body)
    )


def of_embedded(rng: Random, data: bytes) -> bytes:
    """A tokenizer in a tensor of bytes, or the file around it."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.5:
        return of_safetensors(rng, data)
    start, stop = header["spiece_model"]["data_offsets"]
    return _exchanged(header, body, "spiece_model", of_sentencepiece(rng, body[start:stop]))


def _whole(header: dict[str, Any], body: bytes) -> bytes:
    said = json.dumps(header).encode()
    return struct.pack("<Q", len(said)) + said + body


def _exchanged(header: dict[str, Any], body: bytes, name: str, new: bytes) -> bytes:
    """A whole file in which one tensor of bytes is another."""
    start, stop = header[name]["data_offsets"]
    more = len(new) - (stop - start)
    for other, said in header.items():
        if other != "__metadata__" and said["data_offsets"][0] >= stop:
            said["data_offsets"] = [place + more for place in said["data_offsets"]]
    header[name] = {"dtype": "U8", "shape": [len(new)], "data_offsets": [start, start + len(new)]}
    return _whole(header, body[:start] + new + body[stop:])


# torch zips

GLOBALS = (
    b"torch ComplexFloatStorage",
    b"torch QInt8Storage",
    b"torch QUInt2x4Storage",
    b"torch BoolStorage",
    b"torch.storage UntypedStorage",
    b"torch.storage TypedStorage",
    b"torch._utils _rebuild_sparse_tensor",
    b"torch._utils _rebuild_qtensor",
    b"torch._utils _rebuild_parameter",
    b"torch._utils _rebuild_nested_tensor",
    b"torch._utils _rebuild_meta_tensor_no_storage",
    b"torch._utils _rebuild_wrapper_subclass",
    b"torch._tensor _rebuild_from_type_v2",
    b"torch FloatTensor",
    b"torch.cuda FloatStorage",
    b"torch Size",
    b"torch device",
    b"torch float32",
    b"collections Counter",
    b"builtins set",
    b"builtins bytearray",
    b"builtins eval",
    b"os system",
    b"posix system",
    b"torch load",
    b"wanflow x",
)
OPCODES = (
    b"\x8a\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 8,
    b"B\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x7f",
    b"j\xff\xff\xff\x7f",
    b"Q",
    b"P0\n",
    b"\x82\x01",
    b"\x93",
    b"\x81",
    b"b",
    b"R",
    b"0",
    b"2",
    b"(",
    b"1",
    b"t",
    b"}",
    b"]",
    b"N",
    b"s",
    b"u",
    b"e",
    b"\x96" + b"\xff" * 8,
    b"cbuiltins\nbytearray\nK\x01\x85R",
    b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x04\x85R",
    b"ctorch\nFloatTensor\n\x8a\x05\x00\x00\x00\x00\x01\x85R",
)


def of_pickle(rng: Random, data: bytes) -> bytes:
    """Opcodes lost, doubled, exchanged, given other arguments; and code."""
    if rng.random() < 0.15:
        return of_bytes(rng, data)
    ops = list(pickletools.genops(data))
    spans = [(start[2] or 0, stop[2] or 0) for start, stop in itertools.pairwise(ops)]
    parts = [data[start:stop] for start, stop in spans]
    tail = data[spans[-1][1] :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(parts))
        op, part = ops[at][0].name if at < len(ops) else "", parts[at]
        numbers = [n for n, held in enumerate(parts) if held[:1] in (b"J", b"K", b"M")]
        if numbers and rng.random() < 0.4:
            number = rng.choice((*NUMBERS, -1))
            parts[rng.choice(numbers)] = b"\x8a\x09" + number.to_bytes(9, "little", signed=True)
            continue
        globals_ = [n for n, held in enumerate(parts) if held[:1] == b"c"]
        match rng.randrange(9):
            case 0 if globals_:
                parts[rng.choice(globals_)] = (
                    b"c" + rng.choice(GLOBALS).replace(b" ", b"\n") + b"\n"
                )
            case 1:
                parts[at] = rng.choice(OPCODES)
            case 2:
                parts.insert(at, rng.choice(OPCODES))
            case 3:
                parts.insert(at, CODE.replace(b"%s", CODE_MARK.encode())[: rng.choice((-1, None))])
            case 4:
                del parts[at]
            case 5:
                parts.insert(at, part)
            case 6:
                parts[at] = parts[rng.randrange(len(parts))]
            case _ if op == "BINUNICODE" or part[:1] == b"X":
                new = text(rng, part[5:].decode("utf-8", "replace")).encode(
                    "utf-8", "surrogatepass"
                )
                parts[at] = b"X" + struct.pack("<I", len(new)) + new
        if not parts:
            break
    return b"".join(parts) + tail


def of_zip(rng: Random, data: bytes) -> bytes:
    """Bytes; numbers of the directory; records changed, lost, doubled, compressed, blown up."""
    choice = rng.random()
    if choice < 0.15:
        return of_bytes(rng, data)
    if choice < 0.4:
        return _directory(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    packed, pickle = (
        -1,
        next((n for n, (name, _) in enumerate(records) if name.endswith("data.pkl")), 0),
    )
    at = rng.randrange(len(records))
    name, content = records[at]
    match rng.randrange(16):
        case 0:
            records[at] = text(rng, name).replace("\ud800", "?"), content
        case 1:
            del records[at]
        case 2:
            records.append((name, of_bytes(rng, content)))
        case 3:
            packed = at
        case 4:
            packed, records[at] = at, (name, bytes(rng.choice((1 << 20, 40 << 20))))  # a bomb
        case 5:
            records[at] = name, of_bytes(rng, content)
        case 6:
            records.append(
                (
                    name.partition("/")[0]
                    + rng.choice(
                        (
                            "/constants.pkl",
                            "/code/a.py",
                            "/data/../x",
                            "/byteorder",
                            "/.format_version",
                        )
                    ),
                    b"x",
                )
            )
        case _:
            records[pickle] = records[pickle][0], of_pickle(rng, records[pickle][1])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number, (name, content) in enumerate(records):
            archive.writestr(
                zipfile.ZipInfo(name),
                content,
                zipfile.ZIP_DEFLATED if number == packed else zipfile.ZIP_STORED,
            )
    return out.getvalue() if rng.random() < 0.9 else _directory(rng, out.getvalue())


# Widths of what follows the mark of a record, of its place in the directory, and of the directory's
# end.
FIELDS = {
    b"PK\3\4": (2, 2, 2, 2, 2, 4, 4, 4, 2, 2),
    b"PK\1\2": (2, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2, 2, 2, 2, 4, 4),
    b"PK\5\6": (2, 2, 2, 2, 4, 4, 2),
}


def _directory(rng: Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        mark = rng.choice((b"PK\3\4", b"PK\1\2", b"PK\1\2", b"PK\1\2", b"PK\5\6"))
        places = [found.start() for found in re.finditer(re.escape(mark), data)]
        if not places:
            continue
        widths = FIELDS[mark]
        field = rng.randrange(len(widths))
        at, width = rng.choice(places) + 4 + sum(widths[:field]), widths[field]
        old = int.from_bytes(out[at : at + width], "little")
        new = rng.choice((*NUMBERS, old + 1, old * 2, old - 1, 1 << 30)) % (1 << 8 * width)
        out[at : at + width] = new.to_bytes(width, "little")
    return bytes(out)


# GGUF

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def of_gguf(rng: Random, data: bytes) -> bytes:
    """Bytes; or any of the fields, counts and tables."""
    if rng.random() < 0.25:
        return of_bytes(rng, data)
    keys, tensors, first = read_gguf(data)
    version, counts, body = 3, [len(tensors), len(keys)], data[first:]
    for _ in range(rng.choice((1, 1, 2, 3))):
        choice = rng.randrange(12)
        if choice < 4 and keys:
            _of_key(rng, keys)
        elif choice < 9 and tensors:
            _of_tensor(rng, tensors)
        elif choice == 9:
            counts = [
                rng.choice((*NUMBERS, counts[0] + 1, max(0, counts[0] - 1))),
                rng.choice((counts[1], counts[1] + 1, *NUMBERS)),
            ]
        elif choice == 10:
            keys.append(
                [
                    rng.choice((b"general.alignment", b"comfy.gguf.orig_shape.x", b"k")),
                    rng.randrange(14),
                    rng.randbytes(rng.randrange(20)),
                ]
            )
            counts[1] += 1
        else:
            version = rng.choice((*NUMBERS, 3 << 24)) % (1 << 32)
    out = b"GGUF" + struct.pack("<IQQ", version, *counts)
    out += b"".join(
        struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
        for key, kind, value in keys
    )
    for name, sides, kind, place in tensors:
        out += (
            struct.pack("<Q", len(name))
            + name
            + struct.pack(f"<I{len(sides)}Q", len(sides), *sides)
            + struct.pack("<IQ", kind % 2**32, place)
        )
    return out + bytes(-len(out) % 32) + body


def _of_key(rng: Random, keys: list[list[Any]]) -> None:
    one = rng.choice(keys)
    match rng.randrange(6):
        case 0:
            one[0] = text(rng, one[0].decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
        case 1:
            one[1] = rng.choice((*range(14), 2**31))
        case 2:
            keys.append(list(one))
        case 3:
            keys.remove(one)
        case 4 if one[1] == 9:  # the type of a list's items, or their count
            value = (
                struct.pack("<I", rng.randrange(14)) + one[2][4:] if rng.random() < 0.5 else one[2]
            )
            one[2] = (
                value
                if rng.random() < 0.5
                else value[:4] + struct.pack("<Q", rng.choice(NUMBERS)) + value[12:]
            )
        case _:
            one[2] = of_bytes(rng, one[2], 12 if one[1] == 9 else 0)


def _of_tensor(rng: Random, tensors: list[list[Any]]) -> None:
    one = rng.choice(tensors)
    match rng.randrange(9):
        case 0:
            one[0] = text(rng, one[0].decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
        case 1 | 2:
            one[1] = list(one[1])
            one[1][rng.randrange(len(one[1]))] = rng.choice(NUMBERS)
        case 3:
            one[1] = rng.choice(
                (
                    [],
                    [0],
                    [1] * 4,
                    [32],
                    [*one[1], 1],
                    [0, 1 << 40],
                    list(one[1])[::-1],
                    [2] * 9,
                    [1] * 8,
                )
            )
        case 4 | 5:
            one[2] = rng.choice((*range(45), 2**31))
        case 6:
            one[3] = rng.choice((*NUMBERS, one[3] + 32, max(0, one[3] - 32), one[3] + 1))
        case 7:
            tensors.append(list(one))
        case _:
            tensors.remove(one)


def read_gguf(data: bytes) -> tuple[list[list[Any]], list[list[Any]], int]:
    """(keys as [name, type, bytes], tensors as [name, sides as they lie, type, place], first byte
    of the data) of a good file.
    """
    at = 24

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return data[at - count : at]

    def number(width: int) -> int:
        return int.from_bytes(take(width), "little")

    def skip(kind: int) -> None:
        if kind == 8:
            take(number(8))
        elif kind == 9:
            inner, count = number(4), number(8)
            for _ in range(count):
                skip(inner)
        else:
            take(SCALARS[kind])

    tensor_count, key_count = struct.unpack_from("<QQ", data, 8)
    keys, tensors = [], []
    for _ in range(key_count):
        name, kind = take(number(8)), number(4)
        start = at
        skip(kind)
        keys.append([name, kind, data[start:at]])
    for _ in range(tensor_count):
        name = take(number(8))
        sides = [number(8) for _ in range(number(4))]
        tensors.append([name, sides, number(4), number(8)])
    return keys, tensors, at + -at % 32


# sentencepiece: a protobuf


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: bytes | int | float) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return (
        _varint(number << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, float)
        else _varint(number << 3) + _varint(value)
    )


def fields(data: bytes) -> list[tuple[int, bytes | int | float]]:
    """The fields of a good message."""
    found: list[tuple[int, bytes | int | float]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            found.append((key >> 3, varint()))
            continue
        size = varint() if key & 7 == 2 else 4
        held = data[at : at + size]
        found.append((key >> 3, held if key & 7 == 2 else struct.unpack("<f", held)[0]))
        at += size
    return found


def of_sentencepiece(rng: Random, data: bytes) -> bytes:
    """Bytes; or fields lost, doubled, of another number or kind, and in them the same."""
    if rng.random() < 0.25:
        return of_bytes(rng, data)
    held = fields(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not held:
            break
        at = rng.randrange(len(held)) if rng.random() < 0.6 else len(held) - 1
        number, value = held[at]
        match rng.randrange(8):
            case 0:
                del held[at]
            case 1:
                held.insert(at, held[rng.randrange(len(held))])
            case 2:
                held[at] = rng.choice((0, 1, 2, 3, 4, 5, 15, 16, 1 << 28)), value
            case 3:
                held[at] = (
                    number,
                    rng.choice(
                        (
                            b"",
                            b"\xff",
                            rng.choice(NUMBERS),
                            float("nan"),
                            float("-inf"),
                            1e30,
                            "日".encode() * 50,
                        )
                    ),
                )
            case _ if isinstance(value, bytes):
                held[at] = number, _of_message(rng, value)
    return b"".join(field(number, value) for number, value in held)


def _of_message(rng: Random, data: bytes) -> bytes:
    try:
        inner = fields(data)
        at = rng.randrange(len(inner))
    except (IndexError, ValueError, struct.error):  # bent before, or never a message
        return of_bytes(rng, data)
    number, value = inner[at]
    if isinstance(value, bytes):
        inner[at] = number, of_bytes(rng, value, rng.randrange(max(1, len(value))))
    elif isinstance(value, float):
        inner[at] = (
            number,
            rng.choice((float("nan"), float("inf"), float("-inf"), 0.0, 1e30, -value)),
        )
    else:
        inner[at] = number, rng.choice((*range(8), *NUMBERS))
    return b"".join(field(number, value) for number, value in inner)
