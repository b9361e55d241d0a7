"""A real Postgres server for tests: started, stopped, killed and started again at will."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

PASSWORD = "p@ss/w:rd 100%"  # what a URL must spell otherwise


def _binary(name: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    path = str(found[-1]) if found else shutil.which(name)
    assert path, f"no {name} on this machine; try: make services"
    return path


class Postgres:
    """A server with its data in a folder of its own; the account has a password."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wanflow-postgres-", dir="/tmp"))
        self.process: subprocess.Popen[bytes] | None = None
        # Postgres refuses to run as root.
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(self.folder, self.user, self.user)
        password = self.folder / "password"
        password.write_text(PASSWORD)
        data = f"--pgdata={self.folder / 'data'}"
        login = ("--username=wan", "--auth=scram-sha-256", f"--pwfile={password}")
        self._call([_binary("initdb"), "--no-sync", "--no-locale", "--encoding=UTF8", *login, data])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def _options(self) -> dict[str, object]:
        own = {"user": self.user, "group": self.user, "extra_groups": []} if self.user else {}
        return {**own, "cwd": self.folder, "stdin": subprocess.DEVNULL}

    def _call(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, **self._options())  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr

    def url(self, database: str) -> str:
        return f"postgresql://wan:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/{database}"

    def schema(self) -> str:
        """Make a schema, which is a database to a client and a hundred times as cheap."""
        name = f"s{secrets.token_hex(4)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return f"{self.url('postgres')}?options=-csearch_path%3D{name}"

    def create(self, database: str) -> str:
        """Make a database; return its URL."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"'.encode())
        return self.url(database)

    def copy(self, table: str, source: str, target: str) -> None:
        """Copy a table with its rows from one database to another."""
        dump = subprocess.run(
            [_binary("pg_dump"), f"--dbname={source}", f"--table={table}"], stdout=subprocess.PIPE
        ).stdout
        load = [_binary("psql"), f"--dbname={target}", "--quiet", "--set=ON_ERROR_STOP=1"]
        subprocess.run(load, input=dump, check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        """Start the server, and return when it answers; also after `kill`."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self.process is None or self.process.poll() is not None:
                # The end of a process, which tests play, loses nothing without fsync.
                settings = {"fsync": "off", "listen_addresses": "127.0.0.1", "port": self.port}
                settings["unix_socket_directories"] = self.folder
                words = [f"--{key}={value}" for key, value in settings.items()]
                with (self.folder / "log").open("ab") as log:
                    self.process = subprocess.Popen(  # type: ignore[call-overload]
                        [_binary("postgres"), "-D", str(self.folder / "data"), *words],
                        stdout=log,
                        stderr=log,
                        **self._options(),
                    )
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT breaks every connection in order, SIGKILL without."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def freeze(self, how: signal.Signals = signal.SIGSTOP) -> None:
        """Let the server and its connections stand still, or go on with SIGCONT."""
        assert self.process is not None
        every = subprocess.run(
            ["pgrep", "--parent", str(self.process.pid)], capture_output=True, text=True
        ).stdout.split()
        for number in (self.process.pid, *map(int, every)):
            with suppress(ProcessLookupError):
                os.kill(number, how)

    def close(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.close()
