"""A folder of recorded cases: ``manifest.json``, and per case a JSON and a safetensors file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from pusa_dist.config import (
    ModelConfig,
    Precision,
    TransformerConfig,
    VaeConfig,
    WeightsConfig,
    load_model_config,
)
from pusa_dist.errors import ConfigError


@dataclass(frozen=True)
class Case:
    """One entry of the manifest; its files are read when they are asked for."""

    folder: "CaseFolder"
    name: str
    listed_kind: str

    @cached_property
    def description(self) -> Mapping[str, Any]:
        """The case's JSON."""
        return json.loads((self.folder.path / f"{self.name}.json").read_text())

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The recorded tensors."""
        return load_file(self.folder.path / f"{self.name}.safetensors")

    @property
    def kind(self) -> str:
        """What the case exercises, as the manifest and its JSON say.

        Raises:
            ValueError: the two disagree.
        """
        described = self.description.get("kind", self.listed_kind)
        if described != self.listed_kind:
            raise ValueError(f"the manifest says kind {self.listed_kind!r}, its JSON {described!r}")
        return self.listed_kind

    @property
    def precision(self) -> Precision:
        """What the recording was computed in."""
        return "bf16" if "bfloat16" in self.description.get("dtype", "float32") else "fp32"

    def model(self) -> ModelConfig:
        """The case's transformers as a model of ours, its files in the case's folder.

        Raises:
            ValueError: the JSON describes a model that is not Wan's.
        """
        files: Mapping[str, str] = self.description["weights"]
        # High-noise first, whatever order the JSON names them in.
        experts = tuple(sorted(files, key=["high", "low"].index)) if set(files) == {"high", "low"} else tuple(files)
        described = self.description.get("model_config") or self._weights_config(files[experts[0]])
        boundary = self.description.get("switch_DiT_boundary")
        return _model(
            self.name,
            transformer=transformer_config(described),
            weights=WeightsConfig(root=str(self.folder.path), transformer=files),
            experts=experts,
            boundary=0.875 if boundary is None else boundary,
            precision=self.precision,
        )

    def _weights_config(self, file: str) -> Mapping[str, Any]:
        return json.loads((self.folder.path / file).with_suffix(".json").read_text())["model_config"]


@dataclass(frozen=True)
class CaseFolder:
    """A folder with a manifest."""

    path: Path

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """Every case of the manifest, in its order.

        Raises:
            ConfigError: there is no readable manifest, or it lists nothing.
        """
        try:
            listed = json.loads((self.path / "manifest.json").read_text())["cases"]
            cases = tuple(Case(self, entry["name"], entry["kind"]) for entry in listed)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.path / 'manifest.json'} is not a manifest of cases: {error!r}") from error
        if not cases:
            raise ConfigError(f"{self.path / 'manifest.json'} lists no case")
        return cases

    def vae_models(self) -> list[ModelConfig]:
        """A model of ours for every VAE among the folder's weights."""
        inputs = [case for case in self.cases if case.listed_kind == "weights"]
        return [_vae_model(case) for case in inputs if "vae_dim" in case.description]


def _vae_model(case: Case) -> ModelConfig:
    described = case.description
    downsample = described.get("temperal_downsample", [False, True, True])
    if downsample != [False, True, True]:
        raise ValueError(f"temperal_downsample={downsample}: Wan's VAE halves time in its last two levels")
    return _model(
        case.name,
        vae=VaeConfig(
            base_dim=described["vae_dim"],
            z_dim=described["z_dim"],
            dim_mult=tuple(described["dim_mult"]),
            num_res_blocks=described["num_res_blocks"],
        ),
        weights=WeightsConfig(root=str(case.folder.path), vae=f"{case.name}.safetensors"),
    )


def _model(name: str, **changes: Any) -> ModelConfig:
    """A configuration around the parts a case describes; the rest is the debug model's and unused."""
    base = load_model_config("debug")
    values = {field: getattr(base, field) for field in ("transformer", "vae", "text_encoder", "defaults", "limits")}
    return ModelConfig(**{"name": name, "revision": "recorded", **values, **changes})


def transformer_config(described: Mapping[str, Any]) -> TransformerConfig:
    """The shape of a recorded DiT, as its case describes it."""
    if described.get("has_image_input") or described.get("patch_size", [1, 2, 2]) != [1, 2, 2]:
        raise ValueError("image input channels and patches other than 1x2x2 are not Pusa's")
    return TransformerConfig(
        num_layers=described["num_layers"],
        num_attention_heads=described["num_heads"],
        attention_head_dim=described["dim"] // described["num_heads"],
        ffn_dim=described["ffn_dim"],
        text_dim=described["text_dim"],
        freq_dim=described["freq_dim"],
        in_channels=described["in_dim"],
        out_channels=described["out_dim"],
        eps=described["eps"],
    )
