"""A PostgreSQL server of our own, from whatever the machine has."""

import os
import shutil
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SETTINGS = ("-c fsync=off", "-c synchronous_commit=off", "-c full_page_writes=off", "-c max_connections=200")


@contextmanager
def own_postgres(address: str = "127.0.0.1") -> Iterator[str]:
    """Start a server on an address of this machine; where there is none to start, skip by name.

    The machine's own PostgreSQL, else the one of the package pgserver.
    """
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL: neither initdb and pg_ctl nor the package pgserver are on this machine")
    # PostgreSQL refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    # Not below pytest's own folder, which every session that starts closes to other users again.
    with tempfile.TemporaryDirectory(prefix="postgres-") as name, _running(programs, Path(name), user, address) as url:
        yield url


@contextmanager
def _running(programs: Path, folder: Path, user: str | None, address: str) -> Iterator[str]:
    if user is not None:
        shutil.chown(folder, user)
    port = _free_port(address)

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *arguments]
        done = subprocess.run(command, check=False, user=user, cwd=folder, stdout=subprocess.DEVNULL)
        assert done.returncode == 0, (program, _log(folder))

    run("initdb", "--username=tests", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
    with (folder / "data/pg_hba.conf").open("a") as file:
        file.write(f"host all all {address}/24 trust\n")
    options = f"-p {port} -c listen_addresses={address} -c unix_socket_directories={folder} {' '.join(SETTINGS)}"
    run("pg_ctl", "-w", "-t", "120", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql+psycopg://tests@{address}:{port}/postgres"
    finally:
        run("pg_ctl", "-w", "-m", "immediate", "stop")


def _programs() -> Path | None:
    """The folder of a server's programs."""
    on_path = shutil.which("initdb")
    folders = [] if on_path is None else [Path(on_path).resolve().parent]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    try:
        with warnings.catch_warnings(action="ignore"):  # where it would put its files
            import pgserver
    except ImportError:
        pass
    else:
        folders.append(Path(pgserver.__file__).parent / "pginstall/bin")
    return next((path for path in folders if (path / "initdb").exists() and (path / "pg_ctl").exists()), None)


def _log(folder: Path) -> str:
    path = folder / "log"
    return path.read_text(errors="replace")[-2000:] if path.exists() else "no log"


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
