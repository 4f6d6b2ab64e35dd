"""xfuser's USP behind the model's attention seam: a CUDA adapter that must first equal ours.

Never imported unless chosen, because importing xfuser needs an accelerator. USP exchanges equal
blocks only, and pads with zeros that attention then attends to; so it runs where every rank holds
equally many tokens, and our own attention runs everywhere else, which is logged once per shape.

Before it is used at all, it must agree with ours on this mesh: libraries below it have returned
plausible but wrong sums in a ring, and this is the only place where that would show.
"""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pusa_dist.errors import ConfigError
from pusa_dist.model.attention import AttentionFn
from pusa_dist.parallel.attention import SequenceAttention
from pusa_dist.parallel.mesh import AXES
from pusa_dist.parallel.shard import SequenceShard, TokenLayout

logger = logging.getLogger(__name__)

Usp = Callable[..., Tensor]

FLOOR = 1e-5
"""Relative difference always admitted: float32 sums in another order."""
CEILING = 2e-2
"""Relative difference never admitted, whatever our own rounding error is."""


def admitted_usp(mesh: DeviceMesh, ours: SequenceAttention, num_heads: int, head_dim: int, like: Tensor) -> AttentionFn:
    """USP on this mesh, once it is set up and has been found equal to ours. Collective over the mesh.

    Args:
        mesh: axes (cfg, ring, ulysses), made by ``join_gang``.
        ours: runs where USP cannot, and is what it is compared with.
        num_heads: N of the model.
        head_dim: D of the model.
        like: a weight of the model; gives dtype and device.

    Raises:
        ConfigError: xfuser is missing, does not run here, or computes something else.
    """
    try:
        usp = _start_usp(mesh)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f"attention=xfuser cannot be set up on this mesh ({error}); use attention=ours") from error
    attention = UspAttention(usp, ours)
    admit(attention, ours, mesh, num_heads, head_dim, like)
    return attention


class UspAttention:
    """USP where shards are even, ours where they are not.

    Args:
        usp: xfuser's function; takes and returns (B, N, S, D).
        ours: our attention, whose shard knows the layout of the running forward.
    """

    def __init__(self, usp: Usp, ours: SequenceAttention) -> None:
        self._usp = usp
        self._ours = ours
        self._logged: set[TokenLayout] = set()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's queries to the whole sequence: (B, S_rank, N, D) each.

        Collective over both sequence axes.
        """
        layout = self._ours.shard.layout
        if not layout.is_even:
            self._log_once(layout)
            return self._ours(query, key, value)
        heads_first = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
        return self._usp(*heads_first, combine_qkv_a2a=True).transpose(1, 2).contiguous()

    def _log_once(self, layout: TokenLayout) -> None:
        if layout not in self._logged:
            self._logged.add(layout)
            logger.warning(
                "ranks hold %s tokens of a frame; xfuser needs equal shards, so our attention runs for this shape",
                "/".join(str(size) for size in layout.sizes),
            )


def admit(
    candidate: AttentionFn, ours: SequenceAttention, mesh: DeviceMesh, num_heads: int, head_dim: int, like: Tensor
) -> None:
    """Return if the candidate equals ours on this mesh; all ranks decide alike. Collective over the mesh.

    Both attend to the same sequence, whose keys and values grow along it so that ranks differ in
    their log-sum-exp. The relative difference may be twice our own rounding error, which is
    measured against float32 attention on one device, and at least 1e-5.

    Args:
        candidate: to be judged; called with this rank's tokens, as the model would.
        ours: what it must equal.
        mesh: axes (cfg, ring, ulysses).
        num_heads: N.
        head_dim: D.
        like: gives dtype and device.

    Raises:
        ConfigError: it failed or differs, with the measured difference.
    """
    whole = _drifting_sequence(ours.shard, num_heads, head_dim, like)
    mine = [_tokens_of_rank(ours.shard, x) for x in whole]
    expected = ours(*mine)
    try:
        found = candidate(*mine)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"attention=xfuser does not run on this mesh ({error}); use attention=ours") from error
    query = _tokens_of_rank(ours.shard, whole[0])
    exact = _attention_in_float32(query, whole[1].flatten(1, 2), whole[2].flatten(1, 2))
    limit = min(max(FLOOR, 2 * _largest(_difference(expected, exact), like)), CEILING)
    difference = _largest(_difference(found, expected), like)
    if not difference <= limit:  # a NaN is refused too
        degrees = "x".join(str(mesh.size(axis)) for axis in range(len(AXES)))
        raise ConfigError(
            f"attention=xfuser differs from ours by {difference:.2e} (relative, {like.dtype}, mesh {degrees}); "
            f"at most {limit:.2e} is admitted: use attention=ours"
        )
    logger.info("attention=xfuser admitted: relative difference %.2e, limit %.2e", difference, limit)


def _start_usp(mesh: DeviceMesh) -> Usp:
    """Set up xfuser's own groups over this process's gang, and return its function."""
    distributed, usp = _import("xfuser.core.distributed"), _import("xfuser.model_executor.layers.usp")
    cfg, ring, ulysses = (mesh.size(axis) for axis in range(len(AXES)))
    # xfuser keeps its groups per process; a second transformer (another expert) uses the same ones.
    if not distributed.model_parallel_is_initialized():
        distributed.init_distributed_environment(
            world_size=dist.get_world_size(), rank=dist.get_rank(), local_rank=torch.cuda.current_device()
        )
        distributed.initialize_model_parallel(
            classifier_free_guidance_degree=cfg,
            sequence_parallel_degree=ring * ulysses,
            ulysses_degree=ulysses,
            ring_degree=ring,
        )
    if not distributed.runtime_state_is_initialized():
        _set_runtime_state(cfg, ring, ulysses)
    found = (distributed.get_ring_parallel_world_size(), distributed.get_ulysses_parallel_world_size())
    if found != (ring, ulysses):
        raise ConfigError(
            f"xfuser was set up before with ring and ulysses degrees {found}, not {(ring, ulysses)}; "
            "start new processes for other degrees"
        )
    function: Usp = usp.USP
    return function


def _set_runtime_state(cfg: int, ring: int, ulysses: int) -> None:
    """What ``initialize_runtime_state`` does for code outside xfuser, which takes no degrees and so asserts one rank.

    The kernel is named, because the usual choice is one that rings refuse.
    """
    runtime, arguments = _import("xfuser.core.distributed.runtime_state"), _import("xfuser.config.args")
    degrees = {"use_cfg_parallel": cfg == 2, "ring_degree": ring, "ulysses_degree": ulysses}
    config, _ = arguments.xFuserArgs(**degrees, attention_backend="SDPA_FLASH").create_config()
    state = runtime.ExternalRuntimeState.__new__(runtime.ExternalRuntimeState)
    runtime.RuntimeState.__init__(state, config)
    runtime._RUNTIME = state


def _import(name: str) -> Any:
    try:
        module: ModuleType = importlib.import_module(name)
    # Without an accelerator xfuser raises NotImplementedError, a RuntimeError, while it is imported.
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"attention=xfuser cannot be used here ({type(error).__name__}: {error}); install the extra "
            "`cuda` (pip install 'pusa-dist[cuda]') on a machine with GPUs, or use attention=ours"
        ) from error
    return module


def _drifting_sequence(shard: SequenceShard, num_heads: int, head_dim: int, like: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value (1, F, S_frame, N, D), the same on every rank."""
    num_frames, frame_tokens = 3, 8 * shard.degree
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, num_frames, frame_tokens, num_heads, head_dim, generator=generator)
    drift = torch.linspace(0.2, 2.0, frame_tokens).view(1, 1, -1, 1, 1)
    return tuple(x.to(like.device, like.dtype) for x in (query, key * drift, value * drift))


def _tokens_of_rank(shard: SequenceShard, whole: Tensor) -> Tensor:
    """(1, F, S_frame, N, D) -> (1, F * S_rank, N, D)."""
    return shard.split(whole.flatten(3)).flatten(1, 2).unflatten(2, whole.shape[3:])


def _attention_in_float32(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.float().transpose(1, 2).contiguous() for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative difference in the Euclidean norm."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm())


def _largest(value: float, like: Tensor) -> float:
    """The largest of all ranks' values, on every rank; NaN if any is NaN."""
    box = torch.tensor([value if value == value else float("inf")], device=like.device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)  # over all ranks of the process group, which are the mesh
    return float(box)
