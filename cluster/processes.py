"""The processes of a service on this machine, by role, and the memory they hold, as Linux tells it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_REPLICA = "ray::ServeReplica:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One of them."""

    pid: int
    role: str
    """A deployment's or actor's name, or the program's."""
    resident: int
    """Bytes of its own and of mapped files. Shared memory is left out: the object store is sized, not grown."""


def processes(ancestor: int) -> list[Process]:
    """A process and all below it; those that end meanwhile are left out. Ray's spare workers are no role."""
    found = []
    for pid in (ancestor, *_below(ancestor)):
        try:
            role, resident = _role(pid), _resident(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if role is not None:
            found.append(Process(pid=pid, role=role, resident=resident))
    return found


def role_of(command: str) -> str | None:
    """The role that a command line spells; None: a worker of Ray that nobody uses.

    Args:
        command: arguments, separated by NUL; Ray writes what a worker does in place of the first.
    """
    title, *others = command.split("\0")
    if title.startswith(_REPLICA):
        return title.removeprefix(_REPLICA).split(":")[1].partition(".")[0]
    if title.startswith("ray::"):
        name = title.removeprefix("ray::").partition(".")[0].partition(":")[0]
        return None if name == "IDLE" else name
    name = title.rpartition("/")[2]
    if not name.startswith("python"):
        return name
    module = next((one for before, one in zip([title, *others], others, strict=False) if before == "-m"), None)
    script = next((one for one in others if one.endswith(".py")), "")
    return f"python {module or script.rpartition('/')[2]}".strip()


def _role(pid: int) -> str | None:
    return role_of((_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0 "))


def _resident(pid: int) -> int:
    lines = (_PROC / str(pid) / "status").read_text().splitlines()
    kib = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "RssFile")))
    return sum(int(value.split()[0]) * 1024 for value in kib.values())


def _below(ancestor: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for folder in _PROC.glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    waiting = [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        yield from below
        waiting += below
