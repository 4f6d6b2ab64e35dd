"""The transformers a rank holds, one per expert, and one step of the states given to it.

Wan2.1 has one transformer; Wan2.2 has one for the high-noise and one for the low-noise steps. Which
one a step needs, and at which LoRA strength, is read off the state: nothing here remembers jobs.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from pusa_dist.checkpoint.lora import build_lora
from pusa_dist.checkpoint.memory import check_device_memory, free_memory, weights_memory
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import ModelConfig
from pusa_dist.parallel.apply import AttentionBackend, parallelize
from pusa_dist.parallel.guidance import guided_velocity
from pusa_dist.sampler import advance
from pusa_dist.state import GenerationState


class Experts:
    """Every expert of a model on one rank of a gang.

    Args:
        model: whose weights are loaded.
        mesh: the gang's mesh; this rank's transformers become its shard of the gang's.
        device: "cpu", "cuda" or "cuda:n".
        attention: which sequence-parallel attention to use.

    Raises:
        ConfigError: the device has not the memory for the weights, or they are not there.
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
        self._cfg_group = mesh.get_group("cfg")
        self._transformers = {}
        self._loras = {}
        if torch.device(device).type == "cuda":
            check_device_memory(weights_memory(model, self.precision), *free_memory(device))
        for expert in model.experts:
            transformer = build_transformer(model, expert, device=device, precision=self.precision)
            self._loras[expert] = build_lora(model, expert, transformer)
            self._transformers[expert] = parallelize(transformer, mesh, attention)

    def advance(self, states: Sequence[GenerationState]) -> list[GenerationState]:
        """Advance states that share a signature by one step in one forward.

        Collective over the gang: every rank calls it with the same states.

        Raises:
            NumericsError: a state's latents became non-finite.
        """
        expert = states[0].expert
        strength = states[0].request.lora_alpha.get(expert)
        lora = self._loras[expert]
        if lora is not None and strength is not None:
            lora.set_alpha(strength)
        return advance(states, partial(guided_velocity, self._transformers[expert], cfg_group=self._cfg_group))
