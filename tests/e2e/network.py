"""A network of our own: namespaces with an address each, on one bridge, for nodes that share no loopback.

Files and process ids are still this machine's, so that a test sees all of them. What is made is named
after this process and is removed in the end, together with whatever still runs in it.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_NAMESPACES = Path("/run/netns")  # where ip keeps them
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A network namespace with one link to the bridge."""

    name: str
    address: str
    switch: int = field(repr=False)
    """An open file of the namespace that has the bridge."""
    link: str = field(repr=False)
    """The bridge's end of its link."""

    @property
    def path(self):
        return _NAMESPACES / self.name

    @contextmanager
    def entered(self):
        """Sockets that this thread opens, and processes and threads that it starts, belong to the host."""
        with self.path.open() as there, _entered(there.fileno()):
            yield

    def processes(self):
        """Ids of all that runs there, but not of this process if it has entered."""
        there = self.path.stat().st_ino
        found = []
        for one in Path("/proc").glob("[0-9]*"):
            try:
                if (one / "ns/net").stat().st_ino == there and int(one.name) != os.getpid():
                    found.append(int(one.name))
            except OSError:  # it has ended, or is not ours to look at
                continue
        return found

    def kill(self, timeout_s=10.0):
        """SIGKILL to everything that runs there, until nothing does."""
        deadline = time.monotonic() + timeout_s
        while running := self.processes():
            for pid in running:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            assert time.monotonic() < deadline, f"processes {running} on {self.name} do not die"
            time.sleep(0.01)

    def cut(self):
        """Lose all that goes there or comes from there."""
        with _entered(self.switch):
            _ip("link", "set", self.link, "down")

    def mend(self):
        with _entered(self.switch):
            _ip("link", "set", self.link, "up")


@contextmanager
def network(*names):
    """Make hosts of these names; yields the address of this machine on their bridge, and the hosts.

    Where that is not permitted, skip by name.
    """
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: there is no program ip on this machine")
    number = os.getpid()
    subnet = f"10.201.{number % 256}"
    bridge = f"pb{number}"
    with ExitStack() as made:
        switch = made.enter_context(open("/proc/thread-self/ns/net")).fileno()
        hosts = []
        for n, name in enumerate(names, 2):
            hosts.append(Host(f"pusa-{number}-{name}", f"{subnet}.{n}", switch, f"pv{number}-{n}"))
            _add(hosts[-1], made)
        _ip("link", "add", bridge, "type", "bridge")
        made.callback(_ip, "link", "del", bridge)
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in hosts:
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", host.link, "master", bridge, "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                _ip("-n", host.name, "link", "set", link, "up")
        yield f"{subnet}.1", hosts


def _add(host, made):
    refused = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True, check=False)
    if refused.returncode != 0:
        pytest.skip(f"no network namespaces: ip netns add is refused: {refused.stderr.strip()}")
    made.callback(_ip, "netns", "del", host.name)  # and with it its link
    made.callback(host.kill)


@contextmanager
def _entered(namespace):
    with open("/proc/thread-self/ns/net") as home:
        _enter(namespace)
        try:
            yield
        finally:
            _enter(home.fileno())


def _enter(namespace):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "a network namespace cannot be entered")


def _ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stderr)
