"""The package as a user installs it: a wheel that works from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Run a command without this checkout on its path, and return its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout by the installed build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w", str(folder))
    run(*pip, *build, cwd=folder)
    (file,) = folder.glob("wanflow-*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "src" / "wanflow"
    expected = {
        f"wanflow/{file.relative_to(package).as_posix()}"
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())


@pytest.mark.slow
def test_an_installed_package_makes_a_video_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel), cwd=work)
    place = run(
        sys.executable, "-c", "import wanflow; print(wanflow.__file__)", cwd=work, path=site
    )
    assert Path(place.strip()).is_relative_to(site)
    prompt = "a red circle moves left on a blue background"
    few = ("--sample_steps", "2", "--frame_num", "5", "--save_file", "clip.mp4")
    command = (str(site / "bin" / "wanflow"), "generate", "--ckpt_dir", "nano", "--prompt", prompt)
    run(sys.executable, *command, *few, cwd=work, path=site)
    assert (work / "clip.mp4").stat().st_size > 1000
