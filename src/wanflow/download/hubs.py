"""The sources of weights: Hugging Face and its mirrors, and ModelScope.

`huggingface_hub` lists and authorises, so a hub gets only requests of its own library; only the
bytes come by `transfer`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported lazily

from wanflow.checkpoint.published import Part, Variant, known_sha256
from wanflow.config import RequestError
from wanflow.download.transfer import (
    NETWORK_ERROR,
    PAUSES,
    TIMEOUT,
    TRANSIENT,
    DamagedError,
    DownloadError,
    Hasher,
    OnBytes,
    RemoteFile,
    Say,
    fetch_file,
    hash_file,
    refusal,
)

HUGGINGFACE = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"
NOT_IN_NAMES = set('\\:*?"<>|') | {chr(code) for code in range(32)}
T = TypeVar("T")


class OfflineError(RequestError):
    """The hub cannot be reached."""


class Hub(Protocol):
    """A server with files: Hugging Face or one of its mirrors, or ModelScope."""

    def listing(self, variant: Variant, parts: Sequence[Part]) -> list[RemoteFile]:
        """List every file of these parts, at one commit.

        Raises:
            RequestError: when the hub does not have them.
        """

    def download_file(
        self, remote: RemoteFile, folder: Path, stop: Event, on_bytes: OnBytes, say: Say
    ) -> str:
        """Put one verified file into the folder; return its sha256."""


@dataclass(frozen=True)
class HuggingFace:
    """Hugging Face, or a mirror that speaks its API."""

    endpoint: str = HUGGINGFACE
    token: str | None = field(default=None, repr=False)
    revision: str | None = None  # of the variant's main repository

    @property
    def auth(self) -> str | bool | None:
        """The token for huggingface_hub; a mirror never gets the one `hf auth login` stored."""
        return self.token or (None if self.endpoint == HUGGINGFACE else False)

    def listing(self, variant: Variant, parts: Sequence[Part]) -> list[RemoteFile]:
        if (
            urlsplit(self.endpoint).scheme not in ("http", "https")
            or not urlsplit(self.endpoint).netloc
        ):
            raise RequestError(
                f"{self.endpoint!r} is not the address of a hub; give one like {HUGGINGFACE} or"
                f" {MIRROR}"
            )
        if "huggingface" not in variant.sources:
            raise RequestError(
                f"{variant.name} is published on ModelScope only; add --source modelscope"
            )
        headers = build_hf_headers(token=self.auth, library_name="wanflow")
        trees = {}
        for repo in dict.fromkeys(part.repo for part in parts):
            main = repo == variant.parts[0].repo
            trees[repo] = self._tree(repo, (self.revision or variant.revision) if main else None)

        def remote(part: Part, name: str, path: str) -> RemoteFile:
            commit, tree = trees[part.repo]
            entry = tree[path]
            url = hf_hub_url(part.repo, path, revision=commit, endpoint=self.endpoint)
            sha256 = entry.lfs.sha256 if entry.lfs else None
            return RemoteFile(
                name, path, f"{part.repo}@{commit}", entry.size, sha256, entry.blob_id, url, headers
            )

        return _select(parts, {repo: list(tree) for repo, (_, tree) in trees.items()}, remote)

    def download_file(
        self, remote: RemoteFile, folder: Path, stop: Event, on_bytes: OnBytes, say: Say
    ) -> str:
        return fetch_file(remote, folder, stop, on_bytes, say)

    def _tree(self, repo: str, revision: str | None) -> tuple[str, dict[str, RepoFile]]:
        """Return a repository's commit, and its files by path."""
        api = HfApi(endpoint=self.endpoint, token=self.auth)
        try:
            commit = (
                _patiently(lambda: api.repo_info(repo, revision=revision, timeout=TIMEOUT)).sha
                or revision
                or "main"
            )
            entries = api.list_repo_tree(repo, recursive=True, revision=commit)
            return commit, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        except HFValidationError:
            raise RequestError(f"{repo!r} is not the name of a repository, OWNER/NAME") from None
        except HfHubHTTPError as error:
            status = 403 if isinstance(error, GatedRepoError) else error.response.status_code
            if status < 500 and status not in TRANSIENT:
                raise refusal(
                    status, f"{repo}@{revision or ''}", f"{self.endpoint}/{repo}"
                ) from None
            raise DownloadError(
                f"{self.endpoint} answers {status} for {repo}; try again later, or another"
                " --endpoint"
            ) from None
        except (NETWORK_ERROR, OfflineModeIsEnabled) as error:
            why = (
                "HF_HUB_OFFLINE is set"
                if isinstance(error, OfflineModeIsEnabled)
                else str(error) or type(error).__name__
            )
            raise OfflineError(
                f"{self.endpoint} cannot be reached ({why}): check network and proxy, or use a"
                f" mirror (HF_ENDPOINT={MIRROR}), or --source modelscope; --verify works offline"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            what = type(error).__name__
            raise RequestError(
                f"{self.endpoint} does not speak the hub's API ({what}); check --endpoint and"
                " HF_ENDPOINT"
            ) from None


def _patiently(ask: Callable[[], T]) -> T:
    """Repeat a request, after pauses, while the server is busy."""
    for pause in PAUSES:
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT:
                raise
            time.sleep(pause)
    return ask()


@dataclass(frozen=True)
class ModelScope:
    """ModelScope by its own package, which resumes and verifies; not run against the real site."""

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    revision: str | None = None

    def _api(self) -> Any:
        try:
            return importlib.import_module("modelscope_hub.api").HubApi(
                endpoint=self.endpoint, token=self.token
            )
        except ModuleNotFoundError:
            raise RequestError(
                "--source modelscope needs ModelScope's package: pip install -U modelscope"
            ) from None

    def listing(self, variant: Variant, parts: Sequence[Part]) -> list[RemoteFile]:
        if "modelscope" not in variant.sources:
            raise RequestError(
                f"{variant.name} is not offered from ModelScope; --list shows what is"
            )
        api, revision = self._api(), self.revision or variant.revision or "master"
        trees = {}
        for repo in dict.fromkeys(part.repo for part in parts):
            with _modelscope_errors(repo):
                entries = api.list_repo_files(repo, "model", revision=revision, recursive=True)
            trees[repo] = {entry.path: entry for entry in entries if not entry.is_dir}

        def remote(part: Part, name: str, path: str) -> RemoteFile:
            if name != path:
                raise RequestError(f"{variant.name} is not offered from ModelScope")
            entry = trees[part.repo][path]
            return RemoteFile(
                name,
                path,
                f"{part.repo}@{revision}",
                entry.size,
                entry.sha256 or known_sha256(path),
            )

        return _select(parts, {repo: list(tree) for repo, tree in trees.items()}, remote)

    def download_file(
        self, remote: RemoteFile, folder: Path, stop: Event, on_bytes: OnBytes, say: Say
    ) -> str:
        repo, _, revision = remote.origin.partition("@")
        checks = {"local_dir": folder, "expected_sha256": remote.sha256, "file_size": remote.size}
        with _modelscope_errors(repo):
            self._api().download_file(repo, "model", remote.path, revision=revision, **checks)
        hasher = Hasher(remote)
        with (folder / remote.name).open("rb") as file:
            hash_file(file, hasher, stop, on_bytes)
        if hasher.mismatch:
            raise DamagedError(f"{remote.name} arrived damaged ({hasher.mismatch})")
        return hasher.sha256


@contextmanager
def _modelscope_errors(repo: str) -> Iterator[None]:
    errors = importlib.import_module("modelscope_hub.errors")
    try:
        yield
    except (
        errors.NotExistError,
        errors.AuthenticationError,
        errors.PermissionDeniedError,
    ) as error:
        raise RequestError(
            f"ModelScope refuses {repo}: {error}; check the name, or give --token"
        ) from None
    except errors.HubError as error:
        raise DownloadError(
            f"ModelScope failed with {repo}: {error}; run the same command to resume"
        ) from None


def _select(
    parts: Sequence[Part],
    paths: dict[str, list[str]],
    remote: Callable[[Part, str, str], RemoteFile],
) -> list[RemoteFile]:
    """Return the files that the parts name, each once.

    Raises:
        RequestError: for a part without files, or a name that leads out of a folder.
    """
    files: dict[str, RemoteFile] = {}
    for part in parts:
        found = {name: path for path in paths[part.repo] if (name := part.local(path)) is not None}
        if not found and not part.optional:
            raise RequestError(
                f"{part.repo} has no {' or '.join(part.patterns)}: it was renamed or withdrawn;"
                " --list shows other variants"
            )
        for name, path in found.items():
            steps = name.split("/")
            if (
                {"", ".", ".."} & set(steps)
                or NOT_IN_NAMES & set(name)
                or name.startswith(".wanflow-download")
            ):
                raise RequestError(
                    f"{part.repo} lists {path!r}, an unsafe file name; nothing was fetched"
                )
            files[name] = remote(part, name, path)
    return list(files.values())
