"""A generation as a value: everything needed to advance it by one step, anywhere.

A state never changes; a step makes a new one. Because it is a value it can be checkpointed, moved
to another gang, paused or handed from the high-noise to the low-noise expert at any step.
"""

import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pusa_dist.conditioning import initial_latents, initial_noise
from pusa_dist.config import ModelConfig, ParallelConfig, Precision
from pusa_dist.errors import CheckpointError, PusaError
from pusa_dist.geometry import latent_shape
from pusa_dist.request import GenerationRequest
from pusa_dist.schedule import DTYPES, StepTables, expert_index, shifted_sigmas, step_tables

FORMAT = "pusa-generation-state-1"
"""Written into every checkpoint; another format needs another name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationState:
    """One generation between two steps."""

    request: GenerationRequest
    revision: str
    """Of the model's weights."""
    precision: Precision
    """It rounds what the model is fed, so it stays with the generation to its end."""
    parallel: ParallelConfig
    """Degrees it was started on; equal degrees repeat bit for bit."""
    experts: tuple[str, ...]
    """Name of the expert of each step."""
    tables: StepTables
    step: int
    """Steps done, 0..N; also the index of the next one."""
    latents: Tensor
    """(C, F, H, W); in the precision's dtype before the first step, float32 after it."""
    context: Tensor
    """(L, E_text) embedding of the prompt."""
    negative_context: Tensor | None
    """(L, E_text) of the negative prompt; None without guidance."""

    @classmethod
    def start(
        cls,
        request: GenerationRequest,
        model: ModelConfig,
        precision: Precision,
        parallel: ParallelConfig,
        context: Tensor,
        negative_context: Tensor | None,
        given: Tensor | None,
        *,
        noise: Tensor | None = None,
    ) -> Self:
        """State before the first step: tables resolved, noise drawn, given frames mixed in.

        Args:
            request: what to generate.
            model: gives the latent channels, the experts and the revision.
            precision: of the deployment.
            parallel: degrees of the gang.
            context: (L, E_text) embedding of the prompt.
            negative_context: (L, E_text) of the negative prompt; None exactly when the guidance scale is 1.
            given: (C, K, H, W) clean latents in the order of ``request.conditioning``; None without any.
            noise: (C, F, H, W) to start from instead of what the seed draws.

        Raises:
            ValueError: the tensors do not fit the request.
        """
        if request.uses_guidance != (negative_context is not None):
            raise ValueError(
                f"guidance_scale={request.guidance_scale}: a negative embedding is needed exactly when it is not 1"
            )
        steps, shift = request.num_inference_steps, request.shift
        shape = latent_shape(model.transformer.in_channels, request.num_frames, request.height, request.width)
        noise = initial_noise(shape, request.seed) if noise is None else noise
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise is {tuple(noise.shape)}; the request needs {shape}")
        multipliers = {entry.position: entry.noise_multiplier for entry in request.conditioning}
        sigma_start = shifted_sigmas(steps, shift)[0]
        return cls(
            request=request,
            revision=model.revision,
            precision=precision,
            parallel=parallel,
            experts=_expert_names(model, steps, shift),
            tables=step_tables(steps, shift, request.num_latent_frames, multipliers, precision),
            step=0,
            latents=initial_latents(noise, given, request.conditioning, sigma_start, DTYPES[precision]),
            context=context,
            negative_context=negative_context,
        )

    @property
    def num_steps(self) -> int:
        """N."""
        return self.tables.num_steps

    @property
    def is_final(self) -> bool:
        """Whether every step is done and ``latents`` can be decoded."""
        return self.step == self.num_steps

    @property
    def expert(self) -> str:
        """Name of the expert that the next step needs.

        Raises:
            PusaError: there is no next step.
        """
        if self.is_final:
            raise PusaError(f"all {self.num_steps} steps are done; a finished generation needs no expert")
        return self.experts[self.step]

    def signature(self) -> Hashable:
        """Equal for states that may share the forward of their next step.

        Steps, conditioning, multipliers, seeds and guidance scales may differ.

        Raises:
            PusaError: there is no next step.
        """
        return (
            self.request.model,
            self.revision,
            self.precision,
            self.expert,
            self.request.lora_alpha.get(self.expert),
            self.request.uses_guidance,
            tuple(self.latents.shape),
            tuple(self.context.shape),
        )

    def to(self, device: torch.device | str) -> Self:
        """The same state with its latents and embeddings on a device (the tables stay on the CPU)."""
        negative = self.negative_context
        return replace(
            self,
            latents=self.latents.to(device),
            context=self.context.to(device),
            negative_context=None if negative is None else negative.to(device),
        )

    def to_bytes(self) -> bytes:
        """Checkpoint: a safetensors file in memory, its metadata the rest of the state as JSON.

        At 81 frames of 1280x720 of the 14B model this is 28 MB.
        """
        described = {
            "request": self.request.to_dict(),
            "revision": self.revision,
            "precision": self.precision,
            "parallel": asdict(self.parallel),
            "experts": self.experts,
            "step": self.step,
        }
        # Copies, because safetensors refuses tensors that share memory (two rows of one batch).
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self._tensors().items()}
        return save(tensors, metadata={"format": FORMAT, "state": json.dumps(described)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of ``to_bytes``, on the CPU, bit for bit.

        Raises:
            CheckpointError: the bytes are not a checkpoint of this format, or damaged.
        """
        try:
            described = _description(data)
            tensors = load(data)
            tables = StepTables(**{item.name: tensors.pop(item.name) for item in fields(StepTables)})
            state = cls(
                request=GenerationRequest.from_dict(described.pop("request")),
                parallel=ParallelConfig(**described.pop("parallel")),
                experts=tuple(described.pop("experts")),
                tables=tables,
                latents=tensors.pop("latents"),
                context=tensors.pop("context"),
                negative_context=tensors.pop("negative_context", None),
                **described,
            )
        except (SafetensorError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not a generation checkpoint ({FORMAT}): {error!r}") from error
        state._check(tensors)
        return state

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {item.name: getattr(self.tables, item.name) for item in fields(StepTables)}
        tensors |= {"latents": self.latents, "context": self.context}
        if self.negative_context is not None:
            tensors["negative_context"] = self.negative_context
        return tensors

    def _check(self, left_over: Mapping[str, Tensor]) -> None:
        request, shape = self.request, (self.request.num_inference_steps, self.request.num_latent_frames)
        latents = latent_shape(0, request.num_frames, request.height, request.width)[1:]
        wrong = list(left_over)
        wrong += [item.name for item in fields(StepTables) if getattr(self.tables, item.name).shape != shape]
        wrong += ["latents"] if tuple(self.latents.shape[1:]) != latents else []
        wrong += ["negative_context"] if request.uses_guidance != (self.negative_context is not None) else []
        wrong += ["experts"] if len(self.experts) != self.num_steps else []
        wrong += ["step"] if not 0 <= self.step <= request.num_inference_steps else []
        wrong += ["precision"] if self.precision not in get_args(Precision) else []
        if wrong:
            raise CheckpointError(f"a generation checkpoint whose {', '.join(wrong)} do not fit its request")


def _expert_names(model: ModelConfig, steps: int, shift: float) -> tuple[str, ...]:
    if len(model.experts) == 1:
        return model.experts * steps
    return tuple(model.experts[index] for index in expert_index(steps, shift, model.boundary))


def _description(data: bytes) -> dict[str, Any]:
    """The JSON beside the tensors; the safetensors reader for bytes does not hand it out."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    if metadata["format"] != FORMAT:
        raise ValueError(f"its format is {metadata['format']!r}")
    return json.loads(metadata["state"])
