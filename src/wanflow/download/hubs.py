"""The sources of weights: Hugging Face and its mirrors, and ModelScope.

`huggingface_hub` gives the session, with its proxies and settings, and the login. The listing is
asked for here, because that library follows any next page with the token, without a limit of time
or length.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urljoin

from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, validate_repo_id  # type: ignore[attr-defined]

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
from wanflow.untrusted import parse_json, printable
from wanflow.web import SlowError, check_url, read_bounded, same_server, within

HUGGINGFACE = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"
LISTING_BYTES = 32 << 20  # a file takes about 300 bytes
ANSWER_SECONDS = 60.0
MOST_PAGES, MOST_REDIRECTS = 100, 5
LONGEST_NAME = 200  # bytes of each folder and file; the names of parts are longer
COMMIT = re.compile(r"[!-~]{1,200}")
HARMLESS = ("user-agent", "accept-encoding")  # headers that any server may get
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
        check_url(self.endpoint, "--endpoint", f"{HUGGINGFACE} or {MIRROR}")
        if "huggingface" not in variant.sources:
            raise RequestError(
                f"{variant.name} is published on ModelScope only; add --source modelscope"
            )
        check_token(self.token)
        headers = {
            **build_hf_headers(token=self.auth, library_name="wanflow"),
            "Accept-Encoding": "identity",  # a short answer that unpacks to a long one is no use
        }
        trees = {}
        for repo in dict.fromkeys(part.repo for part in parts):
            main = repo == variant.parts[0].repo
            revision = (self.revision or variant.revision) if main else None
            _check_names(repo, revision)
            with self._hub_errors(repo, revision):
                trees[repo] = self._tree(repo, revision, headers)

        def remote(part: Part, name: str, path: str) -> RemoteFile:
            commit, tree = trees[part.repo]
            size, sha256, blob = tree[path]
            url = hf_hub_url(part.repo, path, revision=commit, endpoint=self.endpoint)
            return RemoteFile(name, path, f"{part.repo}@{commit}", size, sha256, blob, url, headers)

        return _select(parts, {repo: list(tree) for repo, (_, tree) in trees.items()}, remote)

    def download_file(
        self, remote: RemoteFile, folder: Path, stop: Event, on_bytes: OnBytes, say: Say
    ) -> str:
        return fetch_file(remote, folder, stop, on_bytes, say)

    def _tree(
        self, repo: str, revision: str | None, headers: dict[str, str]
    ) -> tuple[str, dict[str, _Entry]]:
        """Return a repository's commit, and its files by path."""
        api = f"{self.endpoint}/api/models/{repo}"
        about, _ = _ask(f"{api}/revision/{quote(revision, safe='')}" if revision else api, headers)
        commit = about.get("sha") or revision or "main" if isinstance(about, dict) else None
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise TypeError("no commit")
        entries: dict[str, _Entry] = {}
        url = f"{api}/tree/{quote(commit, safe='')}?recursive=true"
        for _ in range(MOST_PAGES):
            page, following = _ask(url, headers)
            entries |= dict(_read_entry(entry) for entry in page if entry["type"] == "file")
            if following is None:
                return commit, entries
            url = following
            if not same_server(url, self.endpoint):
                raise RequestError(
                    f"{self.endpoint} gives the next page of its listing as {printable(url)}, on"
                    " another server, which is not followed; try another --endpoint"
                )
        raise RequestError(f"{self.endpoint} lists {repo} in more than {MOST_PAGES} pages")

    @contextmanager
    def _hub_errors(self, repo: str, revision: str | None) -> Iterator[None]:
        """Turn what a listing can fail with into errors of one line."""
        try:
            yield
        except _StatusError as error:
            if error.status < 500 and error.status not in TRANSIENT:
                page = f"{self.endpoint}/{repo}"
                raise refusal(error.status, f"{repo}@{revision or ''}", page) from None
            raise DownloadError(
                f"{self.endpoint} answers {error.status} for {repo}; try again later, or another"
                " --endpoint"
            ) from None
        except (NETWORK_ERROR, SlowError, OfflineModeIsEnabled) as error:
            why = printable(error) or type(error).__name__
            if isinstance(error, OfflineModeIsEnabled):
                why = "HF_HUB_OFFLINE is set"
            raise OfflineError(
                f"{self.endpoint} cannot be reached ({why}): check"
                f" network and proxy, or use a mirror (HF_ENDPOINT={MIRROR}), or --source"
                " modelscope; --verify works offline"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(
                f"{self.endpoint} does not speak the hub's API ({printable(error)}); check"
                " --endpoint and HF_ENDPOINT"
            ) from None


def check_token(token: str | None) -> None:
    """Raise RequestError for a token that no request can carry; the message does not show it."""
    if token is not None and not re.fullmatch("[!-~]{1,4000}", token):
        raise RequestError(
            "--token (or HF_TOKEN) holds a space, a line break or a letter that no token has; copy"
            " it again"
        )


def _check_names(repo: str, revision: str | None) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise RequestError(
            f"{printable(repo)!r} is not the name of a repository, OWNER/NAME"
        ) from None
    if revision is not None and not (0 < len(revision) <= LONGEST_NAME and revision.isprintable()):
        raise RequestError(
            f"--revision {printable(revision, 60)!r} is not the name of a branch, tag or commit"
        )


_Entry = tuple[int, str | None, str | None]  # size, sha256 of a file in git lfs, git's own hash


def _read_entry(entry: dict[str, Any]) -> tuple[str, _Entry]:
    """Return the path and the facts of a file in a listing.

    Raises:
        KeyError, TypeError, ValueError: for a field that is missing or of another type.
    """
    lfs = entry.get("lfs")
    path, size, sha256 = entry["path"], entry["size"], lfs["oid"] if lfs else None
    if not isinstance(path, str) or isinstance(size, bool) or not isinstance(size, int):
        raise TypeError("path or size of a file")
    blob = entry["oid"]
    if not 0 <= size < 2**63 or not re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", blob):
        raise ValueError(f"size or hash of {path}")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256 of {path}")
    return path, (size, sha256, blob)


class _StatusError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the server answered {status}")
        self.status = status


def _ask(url: str, headers: dict[str, str]) -> tuple[Any, str | None]:
    """Return the JSON at an address and the address of its next page; ask a busy server again."""
    for pause in PAUSES:
        try:
            return within(ANSWER_SECONDS, lambda: _ask_once(url, headers))
        except _StatusError as error:
            if error.status not in TRANSIENT:
                raise
            time.sleep(pause)
    return within(ANSWER_SECONDS, lambda: _ask_once(url, headers))


def _ask_once(url: str, headers: dict[str, str]) -> tuple[Any, str | None]:
    """Ask once; a redirect to another server gets no secret."""
    for _ in range(MOST_REDIRECTS):
        with get_session().stream(
            "GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=False
        ) as response:
            if response.is_redirect:
                target = check_url(urljoin(url, response.headers["Location"]), "redirect", url)
                if not same_server(url, target):
                    headers = {key: headers[key] for key in headers if key.lower() in HARMLESS}
                url = target
                continue
            if response.status_code != 200:
                gated = response.headers.get("X-Error-Code") == "GatedRepo"
                raise _StatusError(403 if gated else response.status_code)
            body = read_bounded(response.iter_bytes(), LISTING_BYTES, ANSWER_SECONDS)
            link = response.links.get("next", {}).get("url")
            return parse_json(body, "its answer"), urljoin(url, link) if link else None
    raise ValueError(f"more than {MOST_REDIRECTS} redirects")


@dataclass(frozen=True)
class ModelScope:
    """ModelScope by its own package, which resumes and verifies; not run against the real site."""

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    revision: str | None = None

    def _api(self) -> Any:
        check_token(self.token)
        if self.endpoint is not None:
            check_url(self.endpoint, "--endpoint", "https://www.modelscope.cn")
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
            trees[repo] = dict(
                _modelscope_entry(repo, entry) for entry in entries if not entry.is_dir
            )

        def remote(part: Part, name: str, path: str) -> RemoteFile:
            if name != path:
                raise RequestError(f"{variant.name} is not offered from ModelScope")
            size, sha256, _ = trees[part.repo][path]
            known = known_sha256(f"{part.repo}/{path}")
            return RemoteFile(name, path, f"{part.repo}@{revision}", size, sha256 or known)

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


def _modelscope_entry(repo: str, entry: Any) -> tuple[str, _Entry]:
    lfs = {"oid": entry.sha256} if entry.sha256 else None
    facts = {"path": entry.path, "size": entry.size, "lfs": lfs, "oid": "0" * 40}
    try:
        return _read_entry(facts)
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"ModelScope lists {repo} in an unknown form ({error})") from None


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
            f"ModelScope refuses {repo}: {printable(error)}; check the name, or give --token"
        ) from None
    except errors.HubError as error:
        raise DownloadError(
            f"ModelScope failed with {repo}: {printable(error)}; run the same command to resume"
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
                or not name.isprintable()
                or max(len(step.encode("utf-8", "replace")) for step in steps) > LONGEST_NAME
            ):
                raise RequestError(
                    f"{part.repo} lists {printable(path)!r}, an unsafe file name; nothing was"
                    " fetched"
                )
            files[name] = remote(part, name, path)
    return list(files.values())
