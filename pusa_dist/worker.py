"""What one rank of a gang runs: join, hold resident generations, step them, hand them over.

The same class runs under ``torchrun`` (``pusa_dist.generate``) and inside a Ray actor
(``serve.gang``). It is synchronous and knows nothing of scheduling: whoever drives the gang gives
every rank the same calls in the same order, because most of them are collective.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pusa_dist.config import ModelConfig, ParallelConfig
from pusa_dist.errors import CheckpointError, DeviceMemoryError, PusaError
from pusa_dist.experts import Experts
from pusa_dist.parallel.apply import AttentionBackend
from pusa_dist.parallel.mesh import join_gang, leave_gang
from pusa_dist.request import GenerationRequest
from pusa_dist.sampler import clean_estimate
from pusa_dist.state import GenerationState

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a rank runs, apart from what it runs."""

    device: str = "cpu"
    threads: int | None = None
    """CPU threads of this rank; None leaves it to torch."""
    timeout_s: float = 600.0
    """A collective that takes longer fails the rank."""
    attention: AttentionBackend = "ours"


class Worker:
    """One rank of a gang."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, options: WorkerOptions) -> None:
        self.model = model
        self.parallel = parallel.check(model)
        self.options = options
        self._residents: dict[str, GenerationState] = {}
        self._before: dict[str, GenerationState] = {}
        """Where residents were one step ago, for previews."""
        self._experts: Experts | None = None

    def join(self, rank: int, world_size: int, address: str, port: int) -> None:
        """Meet the other ranks, load the weights, shard the model and rehearse. Collective over the gang."""
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        mesh = join_gang(rank, world_size, address, port, self.parallel, self.options.device, self.options.timeout_s)
        try:
            self._experts = Experts(
                self.model,
                mesh,
                device=self.options.device,
                attention=self.options.attention,
            )
            self._experts.rehearse()
        except BaseException:
            leave_gang()
            raise

    def leave(self) -> None:
        """Leave the gang; the worker cannot be used afterwards."""
        self._experts = None
        self._residents.clear()
        self._before.clear()
        leave_gang()

    def admit(
        self,
        job_id: str,
        request: GenerationRequest,
        context: Tensor,
        negative_context: Tensor | None,
        given: Tensor | None,
    ) -> None:
        """Make a new generation resident.

        Args:
            job_id: name for later calls.
            request: what to generate.
            context: (L, E_text) embedding of the prompt.
            negative_context: (L, E_text) of the negative prompt; None without guidance.
            given: (C, K, H, W) conditioning latents in the order of ``request.conditioning``.

        Raises:
            DeviceMemoryError: the device has no room for it.
        """
        state = GenerationState.start(
            request,
            self.model,
            self._loaded.precision,
            self.parallel,
            context,
            negative_context,
            given,
        )
        self._residents[job_id] = _fitting(lambda: state.to(self.options.device), [request])

    def restore(self, job_id: str, data: bytes) -> int:
        """Make a generation resident that ``checkpoint`` wrote, on this gang or another of the same model.

        Returns:
            Steps done.

        Raises:
            CheckpointError: the bytes are no checkpoint, or one of another model, revision or precision.
            DeviceMemoryError: the device has no room for it.
        """
        state = GenerationState.from_bytes(data)
        theirs = (state.request.model, state.revision, state.precision)
        ours = (self.model.name, self.model.revision, self._loaded.precision)
        if theirs != ours:
            raise CheckpointError(
                f"job {job_id} was started with (model, revision, precision) {theirs}, this gang holds {ours}; "
                "resume it on a gang like its own"
            )
        self._residents[job_id] = _fitting(lambda: state.to(self.options.device), [state.request])
        return state.step

    def step(self, job_ids: Sequence[str]) -> dict[str, int]:
        """Advance residents that share a signature by one step in one forward.

        Collective over the gang.

        Returns:
            Steps done so far, per job.

        Raises:
            NumericsError: latents became non-finite.
            DeviceMemoryError: the forward needs more memory than the device has; no resident has moved.
        """
        before = [self._residents[job_id] for job_id in job_ids]
        states = _fitting(lambda: self._loaded.advance(before), [state.request for state in before])
        self._before.update(zip(job_ids, before, strict=True))
        self._residents.update(zip(job_ids, states, strict=True))
        return {job_id: state.step for job_id, state in zip(job_ids, states, strict=True)}

    def checkpoint(self, job_id: str) -> tuple[int, bytes]:
        """Steps done by a resident and its state, to be restored anywhere.

        May be called from another thread while a step runs: it sees the state before or after the step.
        """
        state = self._residents[job_id]
        return state.step, state.to_bytes()

    def preview(self, job_id: str) -> tuple[int, Tensor] | None:
        """Steps done by a resident and where it is heading: (C, F, H, W) in float32 on the CPU.

        None before its first step here. May be called from another thread while a step runs.
        """
        before, state = self._before.get(job_id), self._residents.get(job_id)
        if before is None or state is None or state.step != before.step + 1:
            return None  # a step is just being taken note of
        return state.step, clean_estimate(before, state).cpu()

    def signature(self, job_id: str) -> Hashable:
        """Equal for residents that may share the forward of their next step; None after the last one."""
        state = self._residents[job_id]
        return None if state.is_final else state.signature()

    def finish(self, job_id: str) -> Tensor:
        """Latents (C, F, H, W) in float32 on the CPU; the generation is no longer resident."""
        self._before.pop(job_id, None)
        return self._residents.pop(job_id).latents.float().cpu()

    def drop(self, job_id: str) -> None:
        """Forget a resident, if it is one."""
        self._residents.pop(job_id, None)
        self._before.pop(job_id, None)

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank. Collective over the gang."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @property
    def _loaded(self) -> Experts:
        if self._experts is None:
            raise PusaError("the worker has not joined a gang; call join first")
        return self._experts


def _fitting(work: Callable[[], T], requests: Sequence[GenerationRequest]) -> T:
    """What ``work`` returns, if the device has the memory for these requests.

    Raises:
        DeviceMemoryError: it has not; saying what was asked and what to do instead.
    """
    with suppress(torch.OutOfMemoryError):
        return work()
    # The error is gone by now, and with it the tensors of the frames that it went through.
    if torch.cuda.is_initialized():
        # A rank that got further waits here for one that stopped before it. It then does not agree with
        # the others within seconds and the gang is given up: no message of this forward meets the next one's.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    asked = " and ".join(f"size={one.width}x{one.height}, num_frames={one.num_frames}" for one in requests)
    tokens = sum(one.num_tokens for one in requests)
    raise DeviceMemoryError(
        f"{asked}: {tokens} tokens need more memory than there is; use a smaller size or fewer frames"
    )
