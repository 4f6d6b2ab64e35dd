"""Runs one function on N processes of this machine, as the ranks of a gang.

A function that is run this way lives at the top of its test module, takes ``(place, *args)``, and
returns something that pickles (tensors included). Start-up costs a second, so that one launch
should make many checks.
"""

import io
import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from pusa_dist.config import ParallelConfig
from pusa_dist.parallel.mesh import free_port, join_gang, leave_gang

PRELOAD = ["torch", "torch.distributed", "pusa_dist.parallel.apply"]


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    port: int

    def join(self, parallel: ParallelConfig, device: str = "cpu", timeout_s: float = 60.0) -> Any:
        return join_gang(self.rank, self.world_size, "127.0.0.1", self.port, parallel, device, timeout_s)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """What ``function(place, *args)`` returned on every rank; AssertionError if one of them failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    processes, pipes = [], {}
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        place = Place(rank, world_size, port)
        process = context.Process(target=_rank_main, args=(sender, function, place, args), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes[receiver] = rank
    try:
        return _collect(pipes, world_size, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: dict[Connection, int], world_size: int, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < world_size:
        waiting = [pipe for pipe, rank in pipes.items() if rank not in results and rank not in failures]
        ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
        if not ready and failures:
            break
        assert ready, f"ranks {[pipes[pipe] for pipe in waiting]} did not answer in time"
        for pipe in ready:
            rank = pipes[pipe]
            try:
                is_good, payload = pipe.recv()
            except EOFError:
                is_good, payload = False, "it died without an answer"
            if is_good:
                results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
            else:
                failures[rank] = f"rank {rank} of {world_size} failed:\n{payload}"
                # The others fail because of it, or hang; the first cause is told with what they say soon.
                deadline = min(deadline, time.monotonic() + 1)
    assert not failures, "\n".join(failures.values())
    return [results[rank] for rank in range(world_size)]


def _rank_main(pipe: Connection, function: Callable[..., Any], place: Place, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        buffer = io.BytesIO()
        torch.save(function(place, *args), buffer)
        pipe.send((True, buffer.getvalue()))
    except BaseException:  # noqa: BLE001 - reported by the parent, whatever it was
        pipe.send((False, traceback.format_exc()))
    finally:
        leave_gang()
