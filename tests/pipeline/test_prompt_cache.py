"""Encoded prompts on disk: given back to the bit, and never the reason for a failure, whatever
happens to the folder.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.common import same_bits
from helpers.text_states import PROMPT, states
from safetensors.torch import load_file, save

from wanflow.checkpoint.checkpoint import text_fingerprint
from wanflow.checkpoint.load import load_text_encoder, load_tokenizer
from wanflow.config import RequestError
from wanflow.loaders import prompt_cache as text_cache
from wanflow.loaders.prompt_cache import TextCache, text_key
from wanflow.opening import resolve
from wanflow.presets import NANO_FOLDER

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 12])
def test_what_was_put_comes_back(tmp_path: Path, dtype: torch.dtype, tokens: int) -> None:
    value = states(tokens, dtype=dtype)
    TextCache(tmp_path, "k").put(PROMPT, value)
    assert same_bits(TextCache(tmp_path, "k").get(PROMPT), value)


def test_without_a_batch_and_with_negative_zeros(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "k")
    value = states()[0]
    cache.put(PROMPT, value)
    assert same_bits(cache.get(PROMPT), value)
    value[5:] = -0.0
    cache.put(PROMPT, value)
    assert same_bits(cache.get(PROMPT), value)


def test_of_an_encoder(tmp_path: Path) -> None:
    checkpoint = resolve("nano")
    ids, mask = load_tokenizer(checkpoint)([PROMPT])
    value = load_text_encoder(checkpoint, torch.bfloat16, CPU)(ids, mask).detach()
    cache = TextCache(tmp_path, text_key(checkpoint, torch.bfloat16, CPU))
    cache.put(PROMPT, value)
    assert same_bits(cache.get(PROMPT), value)


def test_another_prompt_or_encoder_has_its_own(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "k")
    assert cache.get(PROMPT) is None
    prompts = [PROMPT, PROMPT + " ", "", "色调艳丽", "\udc80"]
    for number, prompt in enumerate(prompts):
        cache.put(prompt, states(seed=number))
    assert all(
        same_bits(cache.get(prompt), states(seed=number)) for number, prompt in enumerate(prompts)
    )
    assert TextCache(tmp_path, "other").get(PROMPT) is None


def test_prompts_cannot_be_read_from_the_folder(tmp_path: Path) -> None:
    TextCache(tmp_path, "k").put(PROMPT, states())
    (file,) = tmp_path.iterdir()
    held = file.name.encode() + file.read_bytes()
    assert not any(word.encode() in held for word in PROMPT.split() if len(word) > 2)


def test_zero_rows_take_no_room(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "k")
    cache.put("short", states(2, rows=4096))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 1000


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    value = states()
    value[0, 0, 0] = float("nan")
    cache = TextCache(tmp_path, "k")
    cache.put(PROMPT, value)
    assert cache.get(PROMPT) is None


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-3],
    "longer": lambda data: data + b"x",
    "a value": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "header": lambda data: b"\xff" * 16 + data[16:],
    "rows": lambda data: data.replace(b'"rows":"12"', b'"rows":"-9"'),
    "rows without end": lambda data: data.replace(b'"rows":"12"', b'"rows":"xy"'),
    "no checksum": lambda data: data.replace(b'"sha256"', b'"sha257"'),
    "foreign": lambda data: b"something else",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_replaced(tmp_path: Path, name: str) -> None:
    cache = TextCache(tmp_path, "k")
    cache.put(PROMPT, states())
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    file.write_bytes(DAMAGES[name](before))
    assert file.read_bytes() != before
    assert cache.get(PROMPT) is None
    cache.put(PROMPT, states(seed=1))
    assert same_bits(cache.get(PROMPT), states(seed=1))


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Or it changes nothing, as in a name that nobody reads."""
    cache = TextCache(tmp_path, "k")
    cache.put(PROMPT, states(1))
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    for place in range(len(before)):
        file.write_bytes(before[:place] + bytes([before[place] ^ 0x11]) + before[place + 1 :])
        found = cache.get(PROMPT)
        assert found is None or same_bits(found, states(1)), place


def test_a_file_under_another_name_is_not_taken(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "k")
    cache.put(PROMPT, states())
    shutil.copy(cache._path(PROMPT), cache._path("another"))
    assert cache.get("another") is None


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_only_this_user_reads_and_writes_it(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = TextCache(folder, "k")
    cache.put(PROMPT, states())
    assert folder.stat().st_mode & 0o777 == 0o700
    path = cache._path(PROMPT)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o620)  # another may have written it
    assert cache.get(PROMPT) is None
    folder.chmod(0o755)  # as earlier versions made it
    cache.put(PROMPT, states(seed=1))
    assert (folder.stat().st_mode | path.stat().st_mode) & 0o077 == 0
    assert same_bits(cache.get(PROMPT), states(seed=1))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")
def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "cache", "k")
    cache.put(PROMPT, states())
    path = cache._path(PROMPT)
    mine = tmp_path / path.name
    path.rename(mine)
    path.symlink_to(mine)
    assert cache.get(PROMPT) is None
    cache.put(PROMPT, states(seed=1))  # in place of the link
    assert same_bits(cache.get(PROMPT), states(seed=1)) and not path.is_symlink()
    assert torch.equal(load_file(mine)["states"], states()[:, :5])
    path.unlink()
    os.mkfifo(path)
    assert cache.get(PROMPT) is None


@pytest.mark.parametrize(
    "forged",
    [states(dtype=torch.bfloat16), states(rows=13), states()[0], states() * float("nan")],
    ids=["dtype", "rows", "shape", "nan"],
)
def test_a_forged_entry_of_another_kind_is_not_taken(tmp_path: Path, forged: torch.Tensor) -> None:
    """Whoever forges one knows how its checksum is made."""
    path = TextCache(tmp_path, "k")._path(PROMPT)
    rows = forged.shape[-2]
    meta = {"sha256": text_cache._checksum(path, forged, rows), "rows": str(rows)}
    path.write_bytes(save({"states": forged}, metadata=meta))
    path.chmod(0o600)
    taken = TextCache(tmp_path, "k").get(PROMPT) is not None
    assert taken == bool(torch.isfinite(forged).all())
    assert TextCache(tmp_path, "k", like=((1, 12, 8), torch.float32)).get(PROMPT) is None


def test_the_oldest_go_first(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "k", files=3)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine too")
    for number in range(3):
        cache.put(str(number), states(seed=number))
        os.utime(cache._path(str(number)), (1000 + number, 1000 + number))
    assert cache.get("0") is not None  # which makes "1" the one not used for longest
    cache.put("3", states())
    assert [cache.get(str(number)) is not None for number in range(4)] == [True, False, True, True]
    assert {path.name for path in tmp_path.iterdir() if path.stem in ("notes", "model")} == {
        "notes.txt",
        "model.safetensors",
    }


def test_a_kept_prompt_is_not_its_own_victim(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "k", files=1)
    for number in range(3):
        cache.put(str(number), states(seed=number))
        assert same_bits(cache.get(str(number)), states(seed=number))
    assert len(list(tmp_path.iterdir())) == 1


KILLED = """
import os, sys, signal
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from helpers.text_states import PROMPT, states
from wanflow.loaders.prompt_cache import TextCache
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
TextCache(Path(sys.argv[1]), "k").put(PROMPT, states())
"""
TOGETHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from helpers.common import same_bits
from helpers.text_states import PROMPT, states
from wanflow.loaders.prompt_cache import TextCache
cache = TextCache(Path(sys.argv[1]), "k", files=3)
for number in range(200):
    cache.put(PROMPT, states())
    cache.put(str(number % 5), states(seed=number % 5))
    found = cache.get(PROMPT)
    assert found is None or same_bits(found, states())
    found = cache.get("3")
    assert found is None or same_bits(found, states(seed=3))
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", code, str(folder), str(Path(__file__).parents[1])]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_while_it_writes(tmp_path: Path) -> None:
    child = start(KILLED, tmp_path)
    _, told = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, told
    (part,) = tmp_path.iterdir()
    assert part.name.endswith(".part") and part.stat().st_size > 0
    cache = TextCache(tmp_path, "k")
    assert cache.get(PROMPT) is None
    cache.put(PROMPT, states())
    assert same_bits(cache.get(PROMPT), states())
    assert part.exists()  # it might still be written
    old = time.time() - text_cache.STALE - 1
    os.utime(part, (old, old))
    cache.put("another", states())
    assert not part.exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_processes_at_once(tmp_path: Path) -> None:
    children = [start(TOGETHER, tmp_path) for _ in range(2)]
    for child in children:
        _, told = child.communicate(timeout=120)
        assert child.returncode == 0 and not told, told
    assert not list(tmp_path.glob("*.part"))
    assert (
        1 <= len(list(tmp_path.iterdir())) <= 4
    )  # the two may each have left out the other's last


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = TextCache(tmp_path / "file" / "inside", "k")
    with caplog.at_level(logging.WARNING, "wanflow"):
        cache.put(PROMPT, states())
        cache.put("another", states())
    assert cache.get(PROMPT) is None
    assert len(caplog.records) == 1 and "cannot be stored in" in caplog.text


def test_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = TextCache(tmp_path, "k")
    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING, "wanflow"):
        cache.put(PROMPT, states())
    assert "No space left" in caplog.text
    assert cache.get(PROMPT) is None and not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TextCache(tmp_path, "k")
    cache._path(PROMPT).mkdir()
    assert cache.get(PROMPT) is None
    with caplog.at_level(logging.WARNING, "wanflow"):
        cache.put(PROMPT, states())
    assert "cannot be stored in" in caplog.text
    cache.put("another", states())
    assert same_bits(cache.get("another"), states())


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "k")
    cache.put(PROMPT, states())
    os.truncate(cache._path(PROMPT), text_cache.LARGEST + 1)
    assert cache.get(PROMPT) is None


def test_the_key_follows_all_that_matters(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(NANO_FOLDER, folder)
    checkpoint = resolve(folder)
    first = text_fingerprint(checkpoint)
    assert first == text_fingerprint(resolve("nano"))  # wherever it lies
    keys = {
        text_key(checkpoint, torch.float32, CPU),
        text_key(checkpoint, torch.bfloat16, CPU),
        text_key(checkpoint, torch.float32, torch.device("cuda", 1)),
        text_key(
            replace(
                checkpoint,
                spec=replace(checkpoint.spec, text=replace(checkpoint.spec.text, num_heads=2)),
            ),
            torch.float32,
            CPU,
        ),
    }
    assert len(keys) == 4
    assert text_key(checkpoint, torch.float32, torch.device("cuda", 0)) == text_key(
        checkpoint, torch.float32, torch.device("cuda", 1)
    )
    (folder / "Wan2.1_VAE.pth").write_bytes(b"another")
    assert text_fingerprint(checkpoint) == first
    for path in (checkpoint.paths["tokenizer"], checkpoint.paths["t5"]):
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        assert text_fingerprint(checkpoint) != first
        first = text_fingerprint(checkpoint)
    checkpoint.paths["t5"].unlink()
    with pytest.raises(RequestError, match="cannot be read"):
        text_fingerprint(checkpoint)
