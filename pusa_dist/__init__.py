"""Engine for Pusa V1.0: vectorized-timestep sampling of Wan, on one process or a gang of ranks.

Importing this package does not import torch: what a gateway needs (requests, configuration,
errors, geometry) is light; the mathematics lives in the modules below.
"""

from pusa_dist.config import ModelConfig, ParallelConfig, load_model_config
from pusa_dist.errors import (
    Cancelled,
    CheckpointError,
    ConfigError,
    DeviceMemoryError,
    GangError,
    NumericsError,
    PusaError,
    RequestError,
)
from pusa_dist.request import (
    Conditioning,
    ConditioningParams,
    GenerationRequest,
    MediaInfo,
    RequestParams,
    resolve_request,
)

__all__ = [
    "Cancelled",
    "CheckpointError",
    "Conditioning",
    "ConditioningParams",
    "ConfigError",
    "DeviceMemoryError",
    "GangError",
    "GenerationRequest",
    "MediaInfo",
    "ModelConfig",
    "NumericsError",
    "ParallelConfig",
    "PusaError",
    "RequestError",
    "RequestParams",
    "load_model_config",
    "resolve_request",
]
