"""LoRA merged into live weights, from pristine copies of the weights it touches.

Two kinds of file: Pusa's, which adapts a model to vectorized timesteps at a strength the request
chooses (``W = W0 + alpha * (B @ A)``, no division by the rank), and a step-distillation LoRA
(LightX2V), merged once, before it, at ``.alpha / rank``.

A change of strength recomputes ``W`` from ``W0``. Adding the difference instead would drift with every
change; this way the same strength gives the same bits, however often it changes. The copies of ``W0`` are
on the device, or in the host's memory where the device has no room for them.
"""

import logging
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pusa_dist.checkpoint.keys import diffusers_name, without_prefix
from pusa_dist.checkpoint.load import read_tensors, refuse
from pusa_dist.checkpoint.seeded import seeded_normal
from pusa_dist.config import LoraConfig, ModelConfig, PristineWeights
from pusa_dist.errors import CheckpointError, ConfigError
from pusa_dist.weights import files_of

logger = logging.getLogger(__name__)

_DOWN = re.compile(r"\.(lora_A(\.default)?|lora_down)\.weight$")
_UP = re.compile(r"\.(lora_B(\.default)?|lora_up)\.weight$")
_ALPHA = re.compile(r"\.alpha$")
# Full-rank differences of some distilled files. Upstream applies the low-rank part only.
_DIFF = re.compile(r"\.diff(_b|_m)?$")
PUSA_RANK = 512
"""Of the published LoRAs of Pusa V1.0."""
_TARGET = re.compile(r"^blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))\.weight$")


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """Low-rank change of one weight."""

    up: Tensor
    """(out, r), also called B."""
    down: Tensor
    """(r, in), also called A."""
    alpha: float | None = None
    """The file's own scale numerator, where it has one."""


def read_pusa(tensors: Mapping[str, Tensor]) -> dict[str, LoraDelta]:
    """The LoRA in a Pusa file, by diffusers parameter name.

    Accepted keys: ``<linear>.lora_A[.default].weight`` with ``lora_B``, or ``<linear>.lora_down.weight`` with
    ``lora_up``; original or diffusers names of the linear; an optional ``diffusion_model.`` before it.

    Raises:
        CheckpointError: listing every key that is neither, and every half without its other half.
    """
    return _pair(tensors, "Pusa LoRA", allow_alpha=False)


def read_distill(tensors: Mapping[str, Tensor]) -> dict[str, LoraDelta]:
    """The LoRA in a step-distillation (LightX2V) file, by diffusers parameter name.

    Keys as in ``read_pusa``, and ``<linear>.alpha``. Without one the scale is 1 / rank. ``.diff`` entries
    are left out, with a warning: upstream, which defines the result, does not apply them.

    Raises:
        CheckpointError: as ``read_pusa``.
    """
    left_out = [key for key in tensors if _DIFF.search(key)]
    if left_out:
        logger.warning("distillation LoRA: %d full-rank .diff entries are not applied", len(left_out))
    deltas = _pair({k: t for k, t in tensors.items() if k not in left_out}, "distillation LoRA", allow_alpha=True)
    without = sum(delta.alpha is None for delta in deltas.values())
    if without:
        logger.warning(
            "distillation LoRA: %d of %d weights have no .alpha; their scale is 1/rank", without, len(deltas)
        )
    return deltas


def _pair(tensors: Mapping[str, Tensor], what: str, *, allow_alpha: bool) -> dict[str, LoraDelta]:
    parts: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}, "alpha": {}}
    unexpected, repeated = [], []
    for key, tensor in tensors.items():
        kind, name = _kind_and_name(key)
        if kind is None or (kind == "alpha" and not allow_alpha):
            unexpected.append(key)
        elif name in parts[kind]:
            repeated.append(key)
        else:
            parts[kind][name] = tensor
    down, up, alpha = parts["down"], parts["up"], parts["alpha"]
    unexpected += [f"{name} has .alpha alone" for name in alpha if name not in down and name not in up]
    problems = {
        "unexpected": unexpected,
        "repeated": repeated,
        "without its up half": sorted(down.keys() - up.keys()),
        "without its down half": sorted(up.keys() - down.keys()),
    }
    refuse(what, problems)
    if not down:
        raise CheckpointError(f"{what}: the file is empty")
    return {name: LoraDelta(up[name], down[name], alpha[name].item() if name in alpha else None) for name in down}


def _kind_and_name(key: str) -> tuple[str | None, str]:
    for kind, pattern in (("down", _DOWN), ("up", _UP), ("alpha", _ALPHA)):
        if pattern.search(key):
            return kind, diffusers_name(pattern.sub(".weight", without_prefix(key)))
    return None, key


class MergedLora:
    """The LoRA state of one transformer: its pristine weights, and the strength merged into the live ones.

    The transformer is as it was, distillation apart, until ``set_alpha`` is called.

    Args:
        transformer: whose weights change, in place.
        pusa: deltas of adjustable strength.
        distill: deltas merged once, now.
        distill_strength: multiplies ``alpha / rank`` of ``distill``.
        pristine: where the copies of the weights that ``pusa`` changes are kept.

    Attributes:
        alpha: strength in the live weights; None: pristine, or of a merge that failed.

    Raises:
        CheckpointError: a delta is of no weight of the transformer, or does not fit it; nothing was merged.
    """

    def __init__(
        self,
        transformer: nn.Module,
        pusa: Mapping[str, LoraDelta] | None = None,
        distill: Mapping[str, LoraDelta] | None = None,
        *,
        distill_strength: float = 1.0,
        pristine: PristineWeights = "device",
    ) -> None:
        weights = dict(transformer.named_parameters())
        _check_fit(weights, pusa or {}, "Pusa LoRA")
        _check_fit(weights, distill or {}, "distillation LoRA")
        for name, delta in (distill or {}).items():
            _merge_distill(weights[name], delta, distill_strength)
        self.alpha: float | None = None
        self._adapted = [_Adapted.of(weights[name], delta, pristine) for name, delta in (pusa or {}).items()]

    def set_alpha(self, alpha: float) -> None:
        """Merge at this strength: ``W = W0 + alpha * (B @ A)``, rounded as upstream does, in place.

        Raises:
            ConfigError: there is nothing of adjustable strength.
        """
        if not self._adapted:
            raise ConfigError(f"lora_alpha={alpha}: this transformer has no LoRA of adjustable strength; leave it out")
        if alpha == self.alpha:
            return
        self.alpha = None  # of a merge that fails half-way, the weights are of no one strength
        for part in self._adapted:
            part.merge(alpha)
        self.alpha = alpha


@dataclass(frozen=True, slots=True)
class _Adapted:
    weight: Tensor
    pristine: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, weight: Tensor, delta: LoraDelta, kept: PristineWeights) -> "_Adapted":
        live = weight.detach()
        pristine = live.clone() if kept == "device" else _on_host(live)
        return cls(live, pristine, delta.up.to(live), delta.down.to(live))

    def merge(self, alpha: float) -> None:
        # Every operation rounds to the weights' dtype, and in this order: it is upstream's.
        delta = (self.up @ self.down).mul_(alpha)
        # From pinned memory the copy runs beside the host; the stream keeps it before the addition.
        self.weight.copy_(self.pristine, non_blocking=True).add_(delta)


def _on_host(weight: Tensor) -> Tensor:
    """A copy in the host's memory, pinned if the weight is on a GPU."""
    copy = torch.empty_like(weight, device="cpu").copy_(weight)
    if weight.is_cuda:
        pin(copy)
    return copy


def pin(tensor: Tensor) -> None:
    """Pin a tensor where it is: PyTorch's own pinned memory is handed out in powers of two, here half as much again."""
    runtime, address = torch.cuda.cudart(), tensor.data_ptr()
    failed = int(runtime.cudaHostRegister(address, tensor.nbytes, 0))
    if failed:
        raise ConfigError(
            f"pristine_weights=host: {tensor.nbytes} bytes of the host's memory could not be pinned (CUDA error "
            f"{failed}); give the machine or container more memory, or use pristine_weights: device"
        )
    # Before the memory is freed; at the end of the process the driver does it.
    weakref.finalize(tensor, runtime.cudaHostUnregister, address).atexit = False


def _merge_distill(weight: Tensor, delta: LoraDelta, strength: float) -> None:
    scale = strength * (1.0 if delta.alpha is None else delta.alpha) / delta.down.shape[0]
    up, down = (half.to(weight.device, torch.float32) for half in (delta.up, delta.down))
    weight.detach().add_((scale * (up @ down)).to(weight.dtype))


def _check_fit(weights: Mapping[str, Tensor], deltas: Mapping[str, LoraDelta], what: str) -> None:
    misshapen = []
    for name, delta in deltas.items():
        up, down = tuple(delta.up.shape), tuple(delta.down.shape)
        if name not in weights:
            continue
        shape = tuple(weights[name].shape)
        fits = len(shape) == len(up) == len(down) == 2 and up[1] == down[0] and (up[0], down[1]) == shape
        if not fits:
            misshapen.append(f"{name} is {up} @ {down}, not {shape}")
    refuse(what, {"unmatched": sorted(deltas.keys() - weights.keys()), "misshapen": misshapen})


def build_lora(model: ModelConfig, expert: str, transformer: nn.Module) -> MergedLora | None:
    """Read an expert's LoRAs and attach them to its transformer; None when the model has none.

    Args:
        model: whose LoRAs.
        expert: one of ``model.experts``.
        transformer: the expert's, with its weights.

    Raises:
        ConfigError: the configuration names no file for this expert, or the file is not there.
        CheckpointError: a file does not fit the transformer.
    """
    if model.lora is None and model.distill_lora is None:
        return None
    pusa = distill = None
    strength = 1.0
    if model.distill_lora is not None:
        strength = model.distill_lora.alpha[expert]
        distill = _deltas(model, model.distill_lora, expert, "distill_lora", transformer)
    if model.lora is not None:
        pusa = _deltas(model, model.lora, expert, "lora", transformer)
    return MergedLora(transformer, pusa, distill, distill_strength=strength, pristine=model.pristine_weights)


def lora_rank(model: ModelConfig) -> int:
    """Rank of the model's adjustable LoRA, the largest of its experts'; 0 without one.

    Files are opened for their shapes alone. Of one that is not here the rank is taken to be Pusa V1.0's.
    """
    if model.lora is None:
        return 0
    if model.lora.rank is not None:
        return model.lora.rank
    return max(_stored_rank(model, f"lora.files.{expert}", model.lora.files.get(expert)) for expert in model.experts)


def _stored_rank(model: ModelConfig, setting: str, pattern: str | None) -> int:
    try:
        files = files_of(model, setting, pattern)
    except ConfigError:
        return PUSA_RANK
    return max(delta.down.shape[0] for delta in read_pusa(read_tensors(files)).values())


def is_target(name: str) -> bool:
    """Whether a weight of the transformer is one of those that Pusa's LoRA changes."""
    return _TARGET.match(name) is not None


def _deltas(
    model: ModelConfig, lora: LoraConfig, expert: str, part: str, transformer: nn.Module
) -> dict[str, LoraDelta]:
    if lora.rank is not None:
        if model.weights.seed is None:
            raise ConfigError(f"{model.name}: {part}.rank draws a random LoRA, for models with weights.seed only")
        return dict(_drawn(transformer, lora.rank, model.weights.seed, f"{part}/{expert}"))
    tensors = read_tensors(files_of(model, f"{part}.files.{expert}", lora.files.get(expert)))
    return read_pusa(tensors) if part == "lora" else read_distill(tensors)


def _drawn(transformer: nn.Module, rank: int, seed: int, name: str) -> Iterator[tuple[str, LoraDelta]]:
    # A tenth of the weights' own scale at alpha 1: enough to be seen, too little to break anything.
    for key, weight in transformer.named_parameters():
        if is_target(key):
            out_features, in_features = weight.shape
            up = seeded_normal((out_features, rank), seed, f"{name}/{key}/up", 0.1 * rank**-0.5)
            down = seeded_normal((rank, in_features), seed, f"{name}/{key}/down", in_features**-0.5)
            yield key, LoraDelta(up, down)
