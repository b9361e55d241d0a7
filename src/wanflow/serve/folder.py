"""Name the files of the data folder, which HTTP, worker and gang share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wanflow.files import remove
from wanflow.serve.jobs import Job

BESIDE = {"thumbnail": ".thumbnail.webp", "spritesheet": ".spritesheet.webp"}


@dataclass(frozen=True)
class DataFolder:
    """Where the files of jobs are; with several machines, storage that they share.

    A video is named for its attempt. It becomes the job's result only when the store says that the
    attempt owns the job, so a worker that wakes up late never replaces the video of another.
    """

    path: Path

    def video(self, job: Job, frames: int) -> Path:
        """Return where an attempt writes its video, or its picture of one frame."""
        suffix = ".png" if frames == 1 else ".mp4"
        return self.path / "videos" / f"{job.id}.{job.attempts}{suffix}"

    def beside(self, video: Path, variant: str) -> Path:
        """Return where the thumbnail or the spritesheet of a video is."""
        return video.with_name(video.stem + BESIDE[variant])

    def state(self, id: str) -> Path:
        """Return where the saved run of a job is; every attempt goes on from it."""
        return self.path / "states" / f"{id}.latent.safetensors"

    def preview(self, id: str) -> Path:
        """Return where the newest preview of a job is."""
        return self.path / "previews" / f"{id}.webp"

    def picture(self, sha256: str) -> Path:
        """Return where a picture that a client sent is."""
        return self.path / "pictures" / f"{sha256}.png"

    def drop(self, job: Job) -> None:
        """Delete what one attempt wrote, and nothing of another."""
        for file in (self.path / "videos").glob(f"{job.id}.{job.attempts}.*"):
            remove(file)

    def forget(self, id: str, keep: str = "") -> None:
        """Delete what belongs to a job, but for the video of one name and what is beside it."""
        for folder in ("videos", "states", "previews"):
            for file in (self.path / folder).glob(f"{id}.*"):
                if not keep or not file.name.startswith(f"{Path(keep).stem}."):
                    remove(file)
