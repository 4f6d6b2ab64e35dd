"""The transformers a rank holds, one per expert, and one step of the states given to it.

Wan2.1 has one transformer; Wan2.2 has one for the high-noise and one for the low-noise steps. Which
one a step needs, and at which LoRA strength, is read off the state: nothing here remembers jobs.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from pusa_dist.checkpoint.lora import build_lora
from pusa_dist.checkpoint.memory import (
    check_device_memory,
    check_host_memory,
    free_host_memory,
    free_memory,
    weights_memory,
)
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import ModelConfig
from pusa_dist.errors import GangError
from pusa_dist.geometry import PATCH
from pusa_dist.parallel.apply import AttentionBackend, parallelize
from pusa_dist.parallel.guidance import guided_velocity
from pusa_dist.parallel.mesh import num_ranks_here
from pusa_dist.sampler import VelocityFn, advance
from pusa_dist.state import GenerationState


class Experts:
    """Every expert of a model on one rank of a gang.

    Args:
        model: whose weights are loaded.
        mesh: the gang's mesh; this rank's transformers become its shard of the gang's.
        device: "cpu", "cuda" or "cuda:n".
        attention: which sequence-parallel attention to use.

    Raises:
        ConfigError: the device or its machine has not the memory for the weights, or they are not there.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: DeviceMesh,
        *,
        device: str,
        attention: AttentionBackend = "ours",
    ) -> None:
        self.precision = model.precision_on(device.partition(":")[0])
        self._model = model
        self._mesh = mesh
        self._transformers = {}
        self._loras = {}
        if torch.device(device).type == "cuda":
            needed = weights_memory(model, self.precision)
            check_device_memory(needed, *free_memory(device))
            if needed.host:
                check_host_memory(needed, free_host_memory(), num_ranks_here())
        for expert in model.experts:
            transformer = build_transformer(model, expert, device=device, precision=self.precision)
            self._loras[expert] = build_lora(model, expert, transformer)
            self._transformers[expert] = parallelize(transformer, mesh, attention)

    def rehearse(self) -> None:
        """Merge every LoRA at its default strength and make every expert's smallest guided forward, one token a rank.

        What a job would be the first to need, from connections to kernels, is then there, or fails the
        start. Collective over the gang.

        Raises:
            GangError: it failed; saying on which rank, and with what.
        """
        try:
            for expert in self._transformers:
                self._merge(expert, None if self._model.lora is None else self._model.lora.alpha[expert])
                self._smallest_forward(expert)
        except RuntimeError as error:
            rank, size = self._mesh.get_rank(), self._mesh.size()
            raise GangError(
                f"rank {rank} of {size} met the others, but failed in its first forward with them: {error}; "
                "see that the ranks reach each other (NCCL_DEBUG=INFO says over which interfaces they try)"
            ) from error

    def advance(self, states: Sequence[GenerationState]) -> list[GenerationState]:
        """Advance states that share a signature by one step in one forward.

        Collective over the gang: every rank calls it with the same states.

        Raises:
            NumericsError: a state's latents became non-finite.
        """
        expert = states[0].expert
        self._merge(expert, states[0].request.lora_alpha.get(expert))
        return advance(states, self._velocity(expert))

    def _merge(self, expert: str, strength: float | None) -> None:
        lora = self._loras[expert]
        if lora is not None and strength is not None:
            lora.set_alpha(strength)

    def _velocity(self, expert: str) -> VelocityFn:
        return partial(guided_velocity, self._transformers[expert], cfg_group=self._mesh.get_group("cfg"))

    def _smallest_forward(self, expert: str) -> None:
        config = self._model.transformer
        degree = self._mesh["ring"].size() * self._mesh["ulysses"].size()
        with torch.device(self._transformers[expert].device):
            latents = torch.zeros(1, config.in_channels, 1, PATCH, PATCH * degree)
            timestep, context, scale = torch.zeros(1, 1), torch.zeros(1, 1, config.text_dim), torch.ones(1)
        velocity = self._velocity(expert)(latents, timestep, context, context, scale)
        velocity.cpu()  # what a GPU was given to do is done only then
