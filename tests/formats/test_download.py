"""Downloads: the real client against a server on loopback that speaks the hub's API; whole, broken
off, damaged, refused, offline.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from helpers.hub import REPO, Hub

from wanflow import cli
from wanflow.checkpoint import published as catalogue
from wanflow.checkpoint.ledger import LEDGER
from wanflow.config import RequestError
from wanflow.download import fetch, hubs, transfer
from wanflow.screen import Screen

ROOT = Path(__file__).parents[2]
BIG, SMALL = (
    "high_noise_model/diffusion_pytorch_model-00001-of-00001.safetensors",
    "high_noise_model/config.json",
)
T5, VAE, TOKENIZER = (
    "models_t5_umt5-xxl-enc-bf16.pth",
    "Wan2.1_VAE.pth",
    "google/umt5-xxl/tokenizer.json",
)
FILES = {
    name: random.Random(name).randbytes(size)
    for name, size in {
        BIG: 400_000,
        BIG.replace("high", "low"): 300_000,
        SMALL: 250,
        SMALL.replace("high", "low"): 250,
        T5: 200_000,
        VAE: 100_000,
        TOKENIZER: 20_000,
        "README.md": 300,
        "assets/logo.png": 5_000,
    }.items()
}
WANTED = {name: data for name, data in FILES.items() if name != "assets/logo.png"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, no waiting for the disk, and nothing of this machine's settings."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(transfer, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(hubs, "PAUSES", (0.01, 0.01, 0.01))
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({REPO: dict(FILES)}) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def run(hub: Hub | str, folder: Path, *more: str) -> int:
    """`wanflow download`; its exit code."""
    url = hub if isinstance(hub, str) else hub.url
    return cli.main(["download", "--endpoint", url, "--local_dir", str(folder), *more])


def start(*argv: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    code = f"from wanflow.cli import entry; entry({['download', *argv]!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )


def inside(folder: Path) -> dict[str, bytes]:
    files = [
        file
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".wanflow")
    ]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def part(folder: Path, name: str, data: bytes) -> Path:
    return folder / f"{name}.{hashlib.sha256(data).hexdigest()[:12]}.part"


def wait_for(what: Path, size: int) -> None:
    end = time.monotonic() + 120
    while not (what.exists() and what.stat().st_size >= size):
        assert time.monotonic() < end, f"{what} never got {size} bytes"
        time.sleep(0.01)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed since the last look, as one line."""
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).split())


# it works


def test_everything_comes_once(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.page = 3  # a listing of several pages
    assert run(hub, folder) == 0
    assert inside(folder) == WANTED
    assert "every byte verified" in said(capsys)
    remembered = json.loads((folder / LEDGER).read_text())["files"]
    assert remembered.keys() == WANTED.keys()
    assert (
        remembered[BIG]["sha256"] == hashlib.sha256(FILES[BIG]).hexdigest()
        and remembered[BIG]["from"] == f"{REPO}@{hub.commit(REPO)}"
    )
    before = hub.downloads
    assert run(hub, folder) == 0
    assert hub.downloads == before == len(WANTED)
    assert "nothing had to be fetched" in said(capsys)


def test_files_come_side_by_side(hub: Hub, folder: Path) -> None:
    for name in (BIG, T5, VAE):
        hub.fault(name, "slow", 0.01)
    found = fetch.download("official", folder, hubs.HuggingFace(hub.url), workers=3)
    assert hub.most_busy == 3 and inside(folder) == WANTED
    assert len(found.missing) == len(WANTED) and found.total == sum(map(len, WANTED.values()))


def test_only_some_parts(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(hub, folder, "--only", "vae", "tokenizer") == 0
    assert inside(folder).keys() == {VAE, TOKENIZER}
    assert run(hub, folder, "--variant", "lightning", "--only", "vae") == 2
    assert "--only vae leaves nothing of lightning, which has high, low" in said(capsys)


def test_a_dry_run_writes_nothing(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hub, folder, "--dry_run") == 0
    assert not folder.exists() and hub.downloads == 0
    assert f"to fetch {BIG}" in said(capsys)
    folder.mkdir()
    (folder / VAE).write_bytes(FILES[VAE])
    assert run(hub, folder, "--dry_run") == 0
    assert f"here, not verified {VAE}" in said(capsys) and inside(folder).keys() == {VAE}


def test_what_another_program_brought_is_hashed_and_kept(hub: Hub, folder: Path) -> None:
    for name, data in WANTED.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / VAE).write_bytes(FILES[VAE][:-1] + b"?")
    assert run(hub, folder) == 0
    assert inside(folder) == WANTED and hub.downloads == 1


def test_the_official_client_agrees_with_the_server(hub: Hub, folder: Path) -> None:
    huggingface_hub.snapshot_download(REPO, local_dir=folder, endpoint=hub.url, token=False)
    assert {
        name: data for name, data in inside(folder).items() if not name.startswith(".cache")
    } == FILES


def test_any_repository(hub: Hub, in_tmp: Path) -> None:
    hub.repos["someone/loras"] = {"a/b.safetensors": b"x" * 2000, "empty": b""}
    assert cli.main(["download", "--repo", "someone/loras", "--endpoint", hub.url]) == 0
    assert inside(in_tmp / "loras") == hub.repos["someone/loras"]


def test_a_variant_of_several_repositories(hub: Hub, folder: Path) -> None:
    names = [
        f"diffusion_models/wan2.2_t2v_{which}_noise_14B_fp8_scaled.safetensors"
        for which in ("high", "low")
    ]
    names += ["text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "vae/wan_2.1_vae.safetensors"]
    hub.repos[catalogue.COMFY] = {
        f"split_files/{name}": name.encode() * 100
        for name in (*names, "vae/wan2.2_vae.safetensors")
    }
    assert run(hub, folder, "--variant", "comfy-fp8") == 0
    assert inside(folder) == {
        **{name: name.encode() * 100 for name in names},
        TOKENIZER: FILES[TOKENIZER],
    }


def test_the_script(hub: Hub, folder: Path) -> None:
    """download_T2V_A14B_weights.py from any folder, with the mirror in HF_ENDPOINT."""
    argv = [
        sys.executable,
        str(ROOT / "download_T2V_A14B_weights.py"),
        "--local_dir",
        str(folder),
        "--only",
        "high",
        "vae",
    ]
    done = subprocess.run(
        argv, env={**os.environ, "HF_ENDPOINT": hub.url}, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert inside(folder).keys() == {BIG, SMALL, VAE}


def test_the_script_without_wanflow(tmp_path: Path) -> None:
    shutil.copy(ROOT / "download_T2V_A14B_weights.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", str(tmp_path / "download_T2V_A14B_weights.py")],
        capture_output=True,
        text=True,
        env={},
    )
    assert done.returncode == 1
    assert (
        "wanflow is not installed; say `pip install .`" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_the_batch_file() -> None:
    """Not run here: what Windows needs of it that a test can see."""
    text = (ROOT / "download_T2V_A14B_weights.bat").read_bytes()
    assert text.isascii() and text.count(b"\n") == text.count(b"\r\n") > 20
    assert (
        b'"%PYTHON%" "%HERE%download_T2V_A14B_weights.py" %*' in text
        and b'set "HERE=%~dp0"' in text
    )


# broken off


@pytest.mark.skipif(os.name != "posix", reason="kills with signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_download_goes_on_where_it_stopped(
    hub: Hub, folder: Path, how: signal.Signals
) -> None:
    hub.fault(BIG, "hold", 1 << 17)  # the rest never comes: an end that waits for it is a hang
    process = start("--endpoint", hub.url, "--local_dir", str(folder), "--only", "high")
    wait_for(part(folder, BIG, FILES[BIG]), 100_000)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    hub.released.set()
    assert process.returncode == (130 if how == signal.SIGINT else -how), errors
    have = part(folder, BIG, FILES[BIG]).stat().st_size
    assert 100_000 <= have < 400_000 and BIG not in inside(folder)
    assert run(hub, folder, "--only", "high") == 0
    assert hub.asked(BIG)[-1].range == f"bytes={have}-"
    assert inside(folder) == {name: FILES[name] for name in (BIG, SMALL)}


def test_a_cut_connection_goes_on_by_itself(hub: Hub, folder: Path) -> None:
    for cut in (150_000, 60_000):
        hub.fault(BIG, "cut", cut)
    assert run(hub, folder) == 0
    assert [asked.range for asked in hub.asked(BIG)] == [None, "bytes=150000-", "bytes=210000-"]
    assert inside(folder) == WANTED


def test_a_busy_server_is_asked_again(hub: Hub, folder: Path) -> None:
    hub.fault(BIG, "status", 503, times=2)
    assert run(hub, folder) == 0 and inside(folder) == WANTED
    assert len(hub.asked(BIG)) == 3


def test_a_dead_network_keeps_what_came(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fault(BIG, "cut", 70_000)
    hub.fault(BIG, "status", 503, times=-1)
    assert run(hub, folder, "--workers", "1") == 1
    assert f"{BIG} stopped at 70,000 of 400,000 bytes after 4 attempts" in said(capsys)
    assert part(folder, BIG, FILES[BIG]).read_bytes() == FILES[BIG][:70_000]
    hub.faults.clear()
    assert run(hub, folder) == 0
    assert hub.asked(BIG)[-1].range == "bytes=70000-" and inside(folder) == WANTED


def test_a_server_without_ranges_starts_over(hub: Hub, folder: Path) -> None:
    hub.fault(BIG, "cut", 70_000)
    hub.fault(BIG, "no_ranges")
    assert run(hub, folder) == 0 and inside(folder) == WANTED


def test_a_part_longer_than_the_file_starts_over(hub: Hub, folder: Path) -> None:
    target = part(folder, BIG, FILES[BIG])
    target.parent.mkdir(parents=True)
    target.write_bytes(b"?" * 400_001)
    hub.fault(BIG, "longer")
    assert run(hub, folder) == 0 and inside(folder) == WANTED
    assert hub.asked(BIG)[0].range is None


def test_two_versions_are_never_glued_together(hub: Hub, folder: Path) -> None:
    hub.fault(BIG, "cut", 70_000)
    hub.fault(BIG, "status", 503, times=-1)
    assert run(hub, folder) == 1
    hub.faults.clear()
    hub.log.clear()
    hub.repos[REPO][BIG] = newer = FILES[BIG][::-1]
    assert run(hub, folder) == 0
    assert [asked.range for asked in hub.asked(BIG)] == [None] and inside(folder) == {
        **WANTED,
        BIG: newer,
    }


def test_two_downloads_into_one_folder(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir()
    with fetch.FileLock(folder / fetch.LOCK):
        assert run(hub, folder) == 2
    assert "another download into" in said(capsys)


# damaged


def test_a_damaged_file_is_fetched_again(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fault(VAE, "wrong")
    hub.fault(SMALL, "wrong")  # small files have git's hash only
    assert run(hub, folder) == 0
    assert inside(folder) == WANTED and len(hub.asked(VAE)) == len(hub.asked(SMALL)) == 2
    assert f"{VAE} arrived damaged (sha256" in said(capsys)


def test_a_file_that_stays_damaged_is_named(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fault(BIG, "wrong", times=-1)
    hub.fault(SMALL, "wrong", times=-1)
    assert run(hub, folder) == 1
    text = said(capsys)
    assert (
        f"{BIG} arrived damaged twice" in text
        and f"{SMALL} arrived damaged twice" in text
        and "Traceback" not in text
    )
    assert inside(folder) == {
        name: data for name, data in WANTED.items() if name not in (BIG, SMALL)
    }


def test_verify_finds_and_repairs(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hub, folder) == 0
    stat = (folder / T5).stat()
    (folder / T5).write_bytes(FILES[T5][:-1] + b"?")
    os.utime(
        folder / T5, ns=(stat.st_atime_ns, stat.st_mtime_ns)
    )  # a disk that rots does not set the time
    (folder / VAE).unlink()
    said(capsys)
    assert run(hub, folder, "--verify", "--dry_run") == 0
    assert (
        f"{T5} is damaged or of another version" in said(capsys)
        and len(inside(folder)) == len(WANTED) - 1
    )
    assert run(hub, folder, "--verify") == 0
    text = said(capsys)
    assert (
        f"{T5} is damaged or of another version; fetching it again" in text and "2 fetched" in text
    )
    assert inside(folder) == WANTED


def test_a_changed_file_is_noticed_without_verify(hub: Hub, folder: Path) -> None:
    assert run(hub, folder) == 0
    (folder / T5).write_bytes(FILES[T5][:-1] + b"?")
    (folder / VAE).write_bytes(FILES[VAE][:1000])
    assert run(hub, folder) == 0
    assert inside(folder) == WANTED and hub.downloads == len(WANTED) + 2


def test_verify_offline(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(hub, folder) == 0
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert run(nowhere, folder, "--verify") == 0
    assert "cannot be reached" in said(capsys)
    (folder / T5).write_bytes(b"?" + FILES[T5][1:])
    (folder / VAE).unlink()
    assert run(nowhere, folder, "--verify") == 1
    text = said(capsys)
    assert f"damaged: {T5}; gone: {VAE}; connect" in text
    # Brought by another program: what is published is still known.
    (folder / LEDGER).unlink()
    (folder / VAE).write_bytes(FILES[VAE])
    published = {
        VAE: hashlib.sha256(FILES[VAE]).hexdigest(),
        T5: hashlib.sha256(FILES[T5]).hexdigest(),
    }
    monkeypatch.setattr(catalogue, "known_hashes", lambda: published)
    assert run(nowhere, folder, "--verify") == 1
    assert f"damaged: {T5};" in said(capsys)
    assert run(nowhere, folder, "--verify", "--only", "high") == 2
    assert "has nothing that can be verified without a network" in said(capsys)


def test_a_broken_memory_is_only_slower(hub: Hub, folder: Path) -> None:
    assert run(hub, folder, "--only", "vae") == 0
    for text in ("", "{", "[]", '{"files": {"a": 1}}', '{"files": 7}'):
        (folder / LEDGER).write_text(text)
        assert run(hub, folder, "--only", "vae") == 0
    assert hub.downloads == 1


def test_another_content_than_the_published_is_told(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hub, folder, "--only", "vae") == 0
    assert f"has another {VAE} than the one wanflow was made with" in said(capsys)


# refused


def test_a_full_disk_is_refused_first(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    total, looked = sum(map(len, WANTED.values())), []

    def usage(place: Path) -> shutil._ntuple_diskusage:
        looked.append(place)
        return shutil._ntuple_diskusage(10**9, 10**9 - total + 1, total - 1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert run(hub, folder / "deep" / "er") == 2
    text = said(capsys)
    assert (
        f"({total:,} bytes)" in text and f"({total - 1:,} bytes)" in text and "--local_dir" in text
    )
    assert looked == [folder.parent.resolve()] and not folder.exists() and hub.downloads == 0
    # What is there, whole or in part, needs no room again.
    target = part(folder, BIG, FILES[BIG])
    target.parent.mkdir(parents=True)
    target.write_bytes(FILES[BIG][:1])
    assert run(hub, folder) == 0


def test_authorisation(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    assert run(hub, folder) == 2
    text = said(capsys)
    assert (
        "(401)" in text and "hf auth login" in text and "--token" in text and "secret" not in text
    )
    assert run(hub, folder, "--token", "wrong") == 2
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run(hub, folder) == 0 and inside(folder) == WANTED


def test_a_stored_login_is_not_sent_to_mirrors(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "stored")
    assert hubs.build_hf_headers(token=None)["authorization"] == "Bearer stored"
    assert run(hub, folder, "--only", "vae") == 0
    assert {asked.token for asked in hub.log} == {None}
    assert hubs.HuggingFace().auth is None


def test_the_token_stays_with_the_hub(hub: Hub, folder: Path) -> None:
    """Large files come from a storage host that must not see it; ranges work across the
    redirect.
    """
    with Hub({REPO: dict(FILES)}) as storage:
        hub.token, hub.storage = "secret", storage.url
        storage.fault(BIG, "cut", 70_000)
        storage.fault(VAE, "status", 403)  # a signed address that has run out
        assert run(hub, folder, "--token", "secret") == 0 and inside(folder) == WANTED
        assert [asked.range for asked in storage.asked(BIG)] == [None, "bytes=70000-"]
        assert {asked.token for asked in storage.log} == {None} and {
            asked.token for asked in hub.log
        } == {"secret"}


def test_a_gated_repository(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.gated = True
    assert run(hub, folder) == 2
    assert f"{hub.url}/{REPO} is gated (403): open that page, accept its terms" in said(capsys)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--repo", "no/such", "--token", "mine"], "/no/such does not have this (404)"),
        (["--repo", "no/such"], "/no/such does not exist or is not public (401)"),
        (["--revision", "v9"], "the revision v9"),
        (["--repo", "not a name"], "'not a name' is not the name of a repository"),
        (["--variant", "fp4"], "no variant 'fp4' of t2v-A14B; there are official,"),
        (["--variant", "gguf-q4", "--repo", "no/such"], "does not exist"),
        (
            ["--variant", "official-bf16"],
            "official-bf16 is published on ModelScope only; add --source modelscope",
        ),
        (["--endpoint", "huggingface.co"], "'huggingface.co' is not the address of a server"),
        (["--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_wrong_words(
    hub: Hub, folder: Path, more: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hub, folder, *more) == 2
    text = capsys.readouterr().err
    assert line in text and len(text.splitlines()) == 1
    assert not folder.exists()


def test_a_file_that_was_renamed(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del hub.repos[REPO][VAE]
    assert run(hub, folder) == 2
    assert f"{REPO} has no {VAE}: it was renamed or withdrawn" in said(capsys)


def test_a_file_that_goes_while_others_come(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fault(BIG, "status", 404)
    assert run(hub, folder) == 2
    assert f"{hub.url}/{REPO} does not have this (404)" in said(capsys)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_offline(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(f"http://127.0.0.1:{free_port()}", folder) == 2
    text = said(capsys)
    for word in (
        "cannot be reached",
        "HF_ENDPOINT=https://hf-mirror.com",
        "--source modelscope",
        "--verify works offline",
    ):
        assert word in text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("http://127.0.0.1:9", folder) == 2
    assert "HF_HUB_OFFLINE is set" in said(capsys) and not folder.exists()


def test_a_server_that_is_no_hub(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub({REPO: {}}) as hub:
        monkeypatch.setattr(
            "helpers.hub.Handler.json", lambda self, *_: self.head(200, {"Content-Length": "0"})
        )
        assert run(hub, folder) == 2
    assert "does not speak the hub's API" in said(capsys)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/outside",
        "a/../../outside",
        "a\\..\\outside",
        "a//b",
        ".",
        "c:outside",
        LEDGER,
    ],
)
def test_names_that_lead_out(
    hub: Hub, folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["bad/names"] = {"good": b"x", name: b"y"}
    assert run(hub, folder, "--repo", "bad/names") == 2
    assert "an unsafe file name; nothing was fetched" in said(capsys)
    assert not folder.exists() and hub.downloads == 0


def test_links_that_lead_out(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (folder / "high_noise_model").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert run(hub, folder) == 2
    assert "a link on the way leads out; link the folder itself" in said(capsys)
    assert not any((tmp_path / "elsewhere").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert run(hub, tmp_path / "link") == 0 and inside(tmp_path / "elsewhere") == WANTED


def test_odd_places(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_text("a file")
    assert run(hub, folder) == 2 and "is a file; give a folder" in said(capsys)
    folder.unlink()
    (folder / VAE).mkdir(parents=True)
    assert run(hub, folder) == 2 and "is not a file; move it away" in said(capsys)


def test_a_disk_that_fails_is_told(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(hub, folder) == 1
    assert "cannot be written: No space left on device; what arrived stays" in said(capsys)


# the rest


def test_the_catalogue() -> None:
    official = catalogue.VARIANTS["official"]
    assert round(official.bytes / 1e9) == 126 and round(official.bytes / 2**30, 1) == 117.5
    assert round(catalogue.VARIANTS["official-bf16"].bytes / 1e9) == 69
    for variant in catalogue.VARIANTS.values():
        assert {"high", "low"} <= {part.role for part in variant.parts}
        for part in variant.parts:
            assert part.bytes > 0 or part.role == "config"
            assert all(pattern.startswith(part.strip) for pattern in part.patterns)
    for sha256 in catalogue.known_hashes().values():
        assert len(bytes.fromhex(sha256)) == 32
    assert catalogue.known_sha256(f"anything/{VAE}") and catalogue.known_sha256(f"not{VAE}") is None


def test_the_catalogue_of_the_family() -> None:
    """The sizes and hashes are those of FAMILY.md, section 7; TI2V-5B's sum is FIELD's."""
    i2v, ti2v = catalogue.CATALOGUE["i2v-A14B"], catalogue.CATALOGUE["ti2v-5B"]
    small = ti2v["official"]
    wanted = small.bytes + 43  # configuration.json
    assert wanted == 34_201_521_212 and small.folder == "TI2V_5B_weights"
    assert not {"high", "low"} & {part.role for each in ti2v.values() for part in each.parts}
    assert {"lightning", "comfy-fp8"} <= set(i2v) - set(ti2v)
    sizes = {part.role: part.bytes for part in i2v["comfy-fp8"].parts}
    assert sizes["high"] == sizes["low"] == 14_294_742_832
    assert sizes["vae"] == 253_815_318
    sizes = {part.role: part.bytes for part in ti2v["comfy-fp16"].parts}
    assert (sizes["dit"], sizes["vae"]) == (9_999_658_848, 1_409_400_960)
    paths = {pattern for part in ti2v["comfy-fp16"].parts for pattern in part.patterns}
    assert "split_files/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors" in paths
    assert "split_files/vae/wan2.2_vae.safetensors" in paths
    names = {pattern for part in i2v["lightning"].parts for pattern in part.patterns}
    assert "split_files/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors" in names
    (dit,) = (part for part in small.parts if part.role == "dit")
    assert dit.local("config.json") and dit.local("diffusion_pytorch_model.safetensors.index.json")
    assert dit.local("Wan2.2_VAE.pth") is None
    # Both A14B models have shards of one name; only the repository tells which is meant.
    shard = "high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors"
    assert catalogue.known_sha256(shard) is None
    known = catalogue.known_sha256(f"Wan-AI/Wan2.2-I2V-A14B/{shard}")
    assert known and known.startswith("aeea563f")
    assert catalogue.known_sha256(f"Wan-AI/Wan2.2-T2V-A14B/{shard}") is None


def test_the_family_is_listed_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "--task", "ti2v-5B", "--list"]) == 0
    assert "34.2 GB" in capsys.readouterr().out
    with pytest.raises(RequestError, match="no variant 'lightning' of ti2v-5B"):
        catalogue.find("lightning", "ti2v-5B")
    for folder, words in (
        ("TI2V_5B_weights", "wanflow download --task ti2v-5B --local_dir"),
        ("I2V_A14B_comfy-fp8", "wanflow download --task i2v-A14B --variant comfy-fp8 --local_dir"),
    ):
        assert words in catalogue.how_to_get(tmp_path / folder)


def test_an_expert_by_the_name_of_a_blob(tmp_path: Path) -> None:
    sha256 = catalogue.known_hashes()["Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf"]
    (tmp_path / sha256).touch()
    (tmp_path / "model.gguf").symlink_to(tmp_path / sha256)
    assert catalogue.expert_by_hash(tmp_path / "model.gguf") == "low"
    assert catalogue.expert_by_hash(tmp_path / "other.gguf") is None


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(catalogue.VARIANTS)
    assert lines[1].split()[:3] == ["official", "126", "GB"]


def test_progress_in_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanflow.screen.EVERY", 0.0)
    with Screen() as screen:
        for done in (0, 10**9, 2 * 10**9):
            time.sleep(0.01)
            screen.progress("fetching", done, 4 * 10**9, "bytes")
    text = said(capsys)
    assert "1.0 GB of 4.0 GB" in text and "2.0 GB of 4.0 GB" in text
    assert "GB/s" in text and "ETA" in text


def test_cached(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fetch.cached(REPO) is None and fetch.cached("not a name") is None
    huggingface_hub.snapshot_download(REPO, endpoint=hub.url, token=False)
    home = fetch.cached(REPO)
    assert home is not None and inside(home) == FILES
    (home / VAE).unlink()
    assert fetch.cached(REPO) is None


# ModelScope, by a stand-in for its package


def test_modelscope_is_an_extra(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    monkeypatch.setitem(sys.modules, "modelscope_hub.api", None)
    assert cli.main(["download", "--source", "modelscope", "--local_dir", str(folder)]) == 2
    assert "pip install -U modelscope" in said(capsys)


def test_modelscope(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    class HubApi:
        def __init__(self, **_: object) -> None:
            pass

        def list_repo_files(
            self, repo: str, kind: str, *, revision: str, recursive: bool
        ) -> list[types.SimpleNamespace]:
            asked.append((repo, revision))
            sums = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
            files = [
                types.SimpleNamespace(
                    path=name, size=len(FILES[name]), sha256=sums[name], is_dir=False
                )
                for name in FILES
            ]
            return [
                types.SimpleNamespace(path="high_noise_model", size=0, sha256=None, is_dir=True),
                *files,
            ]

        def download_file(
            self, repo: str, kind: str, path: str, *, local_dir: Path, **_: object
        ) -> None:
            (local_dir / path).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / path).write_bytes(
                b"?" + FILES[path][1:] if path == broken else FILES[path]
            )

    errors = {
        name: type(name, (Exception,), {})
        for name in ("HubError", "NotExistError", "AuthenticationError", "PermissionDeniedError")
    }
    monkeypatch.setitem(sys.modules, "modelscope_hub", types.ModuleType("modelscope_hub"))
    monkeypatch.setitem(sys.modules, "modelscope_hub.api", types.SimpleNamespace(HubApi=HubApi))
    monkeypatch.setitem(sys.modules, "modelscope_hub.errors", types.SimpleNamespace(**errors))
    command = ["download", "--source", "modelscope", "--local_dir", str(folder), "--variant"]
    broken = VAE
    assert cli.main([*command, "official-bf16"]) == 1
    assert f"{VAE} arrived damaged" in said(capsys) and asked == [(REPO, "bf16")]
    broken = ""
    assert cli.main([*command, "official"]) == 0
    assert inside(folder) == WANTED
    assert cli.main([*command, "comfy-fp8"]) == 2
    assert "comfy-fp8 is not offered from ModelScope" in said(capsys)
    with pytest.raises(RequestError, match="there is no variant"):
        fetch.download("none", folder)
