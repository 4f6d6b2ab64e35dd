"""The processes of a service: found by what they call themselves, below whoever started them. Linux only."""

import ctypes
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_ACTORS = {"Rank": "Rank", "Coordinator": "Coordinator", "ProxyActor": "Proxy", "ServeController": "Controller"}
_REPLICA = "ServeReplica:pusa:"
_PROGRAMS = ("raylet", "gcs_server")


def adopt_orphans() -> None:
    """Become the parent of whatever loses its parent below this process, so that nothing gets away."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "orphans cannot be adopted")


def role_of(command: Sequence[str]) -> str | None:
    """The role of a process of the service by its command line; None: it has none of its own."""
    if not command or not command[0]:
        return None
    if Path(command[0]).name in _PROGRAMS:
        return Path(command[0]).name
    if not command[0].startswith("ray::"):
        return None
    # Such as ray::ServeReplica:pusa:Vae, or ray::Rank.step while it is in a call.
    title = command[0].removeprefix("ray::")
    if title.startswith(_REPLICA):
        return title.removeprefix(_REPLICA).partition(".")[0].partition(":")[0].partition("#")[0]
    return _ACTORS.get(title.partition(".")[0].partition(":")[0])


def roles(ancestor: int) -> dict[str, list[int]]:
    """Process ids by role, of all below ``ancestor``."""
    found: dict[str, list[int]] = {}
    for pid in descendants(ancestor):
        role = role_of(command_of(pid))
        if role is not None:
            found.setdefault(role, []).append(pid)
    return found


def command_of(pid: int) -> list[str]:
    """Its command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(ancestor: int) -> list[int]:
    """Process ids below a process, at whatever depth; those that have ended and were not waited for, too."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended, and was waited for, since the folder was listed
        children.setdefault(parent, []).append(int(folder.name))
    found, waiting = [], [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return sorted(found)


def resident_mib(pid: int) -> float:
    """Memory of a process without what it shares with others (the object store); 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest}
    return (sizes.get("VmRSS", 0) - sizes.get("RssShmem", 0)) / 1024


def memory(by_role: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """MiB of the largest process of every role."""
    return {role: max(resident_mib(pid) for pid in pids) for role, pids in by_role.items()}


def kill_all(ancestor: int, timeout_s: float = 30.0) -> None:
    """SIGKILL everything below a process that adopts orphans, and wait until nothing is left.

    Raises:
        RuntimeError: something is left after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while pids := descendants(ancestor):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended since it was listed, which is all that is wanted
        reap()
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes that cannot be killed: {[(pid, command_of(pid)[:1]) for pid in pids]}")
        time.sleep(0.05)


def reap() -> None:
    """Take note of the ends of our own and of adopted children."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass  # no child is left
