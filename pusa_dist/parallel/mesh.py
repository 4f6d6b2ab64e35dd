"""How ranks find each other and which of them share an axis.

The ranks of a gang form a grid (cfg, ring, ulysses), the last axis varying fastest: neighbours in
the ulysses axis exchange the most and should sit closest. Groups are handed on inside the mesh;
nothing else in the package looks one up.
"""

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pusa_dist.config import ParallelConfig
from pusa_dist.errors import ConfigError, GangError

AXES = ("cfg", "ring", "ulysses")


def free_port() -> int:
    """A TCP port nobody on this machine listens on right now; rank 0 should take it soon."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def join_gang(
    rank: int,
    world_size: int,
    address: str,
    port: int,
    parallel: ParallelConfig,
    device: str,
    timeout_s: float,
) -> DeviceMesh:
    """Meet the other ranks and lay them out. Collective over the gang; once per process.

    Args:
        rank: of this process, 0..world_size-1; rank 0 serves the rendezvous at ``port``.
        world_size: number of processes; must be the product of the degrees.
        address: host name or IP of rank 0.
        port: TCP port on it.
        parallel: widths of the axes.
        device: "cpu" (gloo), "cuda" or "cuda:n" (NCCL; gloo for what lies on the CPU). "cuda" takes
            the GPU whose number is the rank, modulo the GPUs this process sees.
        timeout_s: longest wait for the other ranks, now and in every collective.

    Raises:
        ConfigError: the degrees do not multiply to ``world_size``, or there is no such device.
        GangError: the ranks did not meet.
    """
    check_world(rank, world_size, parallel)
    device_type = meet(rank, world_size, address, port, device, timeout_s)
    return lay_out(parallel, device_type, timeout_s)


def meet(rank: int, world_size: int, address: str, port: int, device: str, timeout_s: float) -> str:
    """Find the other ranks and take this rank's device. Collective; once per process; arguments as ``join_gang``'s.

    Returns:
        The device's type.
    """
    chosen = check_device(device)
    if chosen.type == "cuda":
        index = rank % torch.cuda.device_count() if chosen.index is None else chosen.index
        torch.cuda.set_device(index)
    if dist.is_initialized():
        raise GangError("this process is already a rank of a gang; leave it before joining another")
    host = f"[{address}]" if ":" in address else address
    try:
        dist.init_process_group(
            backend="gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl",
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        raise GangError(
            f"rank {rank} could not meet the other ranks of {world_size} at {host}:{port} within {timeout_s} s: {error}"
        ) from error
    return chosen.type


def check_device(device: str) -> torch.device:
    """The device of that name, or ConfigError if this process has none."""
    chosen = torch.device(device)
    if chosen.type == "cuda" and torch.cuda.device_count() == 0:
        raise ConfigError(f"device={device}: this process sees no CUDA device; use cpu")
    return chosen


def check_world(rank: int, world_size: int, parallel: ParallelConfig) -> None:
    """Raise ConfigError unless the degrees multiply to ``world_size`` and ``rank`` lies in it."""
    if world_size != parallel.world_size:
        raise ConfigError(
            f"cfg_degree={parallel.cfg_degree} * ring_degree={parallel.ring_degree} * "
            f"ulysses_degree={parallel.ulysses_degree} needs {parallel.world_size} ranks, but world_size={world_size}; "
            f"start {parallel.world_size} ranks or choose degrees whose product is {world_size}"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank}: use 0 to {world_size - 1} for world_size={world_size}")


def lay_out(parallel: ParallelConfig, device_type: str, timeout_s: float) -> DeviceMesh:
    """The mesh (cfg, ring, ulysses) of a gang that has met. Collective over the gang.

    The groups are made one by one, rather than by ``init_device_mesh``, because that gives every
    group torch's own timeout of half an hour instead of ours.
    """
    shape = (parallel.cfg_degree, parallel.ring_degree, parallel.ulysses_degree)
    grid = torch.arange(parallel.world_size).reshape(shape)
    mine = dist.get_rank()
    groups = []
    for axis, degree in enumerate(shape):
        # Every rank takes part in making every group, its own or not, in one order.
        for ranks in grid.movedim(axis, -1).reshape(-1, degree).tolist():
            group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
            if mine in ranks:
                groups.append(group)
    return DeviceMesh.from_group(groups, device_type, grid, mesh_dim_names=AXES)


def num_ranks_here() -> int:
    """Ranks of the gang on this rank's machine (or in its container), itself among them. Collective over the gang."""
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def leave_gang() -> None:
    """Close this process's connections to the other ranks; harmless when it has none."""
    if dist.is_initialized():
        dist.destroy_process_group()
