"""Training on several ranks: different samples on each, one average gradient.

Either every rank holds the whole model and the gradients of what learns are averaged (``average_gradients``),
or the model is cut over the ranks (``shard``, FSDP2): a block's weights are gathered when its turn comes and
dropped afterwards, so that of a 14B base, its adapter, gradients and optimiser each rank stores its share.

What a sample is and which noise it gets depends on its number in the run, not on the rank that computes it: R
ranks of B samples take the steps that one rank of R * B samples takes, up to the order of summation.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from pusa_dist.errors import ConfigError
from pusa_dist.generate import Place
from pusa_dist.model.transformer import VectorTimestepTransformer
from pusa_dist.parallel.mesh import check_device, leave_gang, meet

TIMEOUT_S = 1800.0
"""Rank 0 may draw samples for a while as the others wait."""
BUCKET = 2**26
"""Gradients summed in one message."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which rank this process is; by itself, the only one."""

    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    """One axis, ``data``; None: a process by itself."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def numbers(self, step: int, batch_size: int) -> range:
        """Numbers in the run of the samples that this rank sees in a step.

        Args:
            step: 0, 1, ...
            batch_size: samples of each rank.
        """
        first = (step * self.world_size + self.rank) * batch_size
        return range(first, first + batch_size)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their mean over the ranks. Collective; sharded parameters are averaged already.

        Raises:
            ConfigError: a parameter has no gradient, so the ranks could not agree on what to sum.
        """
        mine = [p for p in parameters if not isinstance(p, DTensor)]
        if self.world_size == 1 or not mine:
            return
        if any(p.grad is None for p in mine):
            raise ConfigError("a trained parameter has no gradient; freeze what the loss does not depend on")
        for grads in _buckets([p.grad for p in mine if p.grad is not None]):
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            flat /= self.world_size
            parts = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean of named scalars over the ranks. Collective."""
        stacked = torch.stack([value.detach().double().cpu() for value in values.values()])
        if self.world_size > 1:
            dist.all_reduce(stacked)
            stacked /= self.world_size
        return dict(zip(values, stacked.tolist(), strict=True))


ALONE = Ranks()


def join(device: str) -> Ranks:
    """Meet the other ranks if torchrun started several, else be the only one. Collective; once per process.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL), where each rank takes one of the GPUs it sees.

    Raises:
        ConfigError: there is no such device.
    """
    place = Place.from_environment()
    check_device(device)
    if place.world_size == 1:
        return ALONE
    return meet_at(place, device)


def meet_at(place: Place, device: str) -> Ranks:
    """``join`` with the place given."""
    device_type = meet(place.rank, place.world_size, place.address, place.port, device, TIMEOUT_S)
    return Ranks(
        place.rank, place.world_size, init_device_mesh(device_type, (place.world_size,), mesh_dim_names=("data",))
    )


leave = leave_gang


def checkpoint_blocks(transformer: VectorTimestepTransformer) -> None:
    """Keep of every block its input only, and run it again in the backward pass, in place.

    Before ``shard``, so that weights are gathered for the second run too.
    """
    for block in transformer.blocks:
        # The forward itself, not the module's call: hooks must run once.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard(transformer: VectorTimestepTransformer, ranks: Ranks) -> None:
    """Cut the transformer's weights, adapter included, over the ranks, block by block, in place.

    Gradients and what an optimiser makes for them are cut likewise. Frozen weights keep their precision and
    gradients are summed in the adapter's, float32.

    Args:
        transformer: with its adapter, weights on any device; each block moves to the rank's device as it is cut.
        ranks: who shares it. A process by itself keeps everything.
    """
    if ranks.mesh is None:
        return
    # FSDP's hook sits on the output, which must not be a view that somebody may write to.
    transformer.register_forward_hook(lambda module, inputs, velocity: velocity.clone())
    for block in transformer.blocks:
        fully_shard(block, mesh=ranks.mesh)
    fully_shard(transformer, mesh=ranks.mesh)


def whole(content: Any, *, keep: bool = True) -> Any:
    """The same nested lists and mappings with every sharded tensor gathered, all on the CPU, to be saved.

    Collective where tensors are sharded. A tensor at a time is whole on the device.

    Args:
        content: lists, tuples and mappings of tensors and anything else.
        keep: False for a rank that only takes part, which is given None for every tensor.
    """

    def gathered(tensor: Tensor) -> Tensor | None:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.detach().cpu() if keep else None

    return tree_map_only(Tensor, gathered, content)


def like(value: Tensor, example: Tensor) -> Tensor:
    """This rank's part of a whole tensor, if the example is sharded; on its device either way."""
    if not isinstance(example, DTensor):
        return value.to(example.device)
    here = value.to(example.to_local().device)
    return distribute_tensor(here, example.device_mesh, example.placements, src_data_rank=None)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one device and dtype, of at most BUCKET elements unless one alone has more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        fits = sum(each.numel() for each in bucket) + tensor.numel() <= BUCKET
        if bucket and not (fits and (tensor.device, tensor.dtype) == (bucket[0].device, bucket[0].dtype)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
