"""Weights from files into a module: every key accounted for, no second copy, no code run from a pickle."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pusa_dist.errors import CheckpointError

# Names under which training scripts wrap the weights of a pickled checkpoint.
WRAPPERS = ("model_state", "state_dict")


def read_tensors(paths: Sequence[Path], *, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Tensors of one checkpoint, which may be spread over several files.

    Files are mapped, not read whole, and each tensor is converted as it is met: besides the result,
    no more than one tensor is in memory.

    Args:
        paths: ``.safetensors`` files, or pickles, which are loaded with ``weights_only``.
        dtype: of the floating-point tensors; None keeps the files' own.
        device: where the tensors go.

    Raises:
        CheckpointError: a file cannot be read, holds something else than tensors, or repeats a key.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for key, tensor in _entries(path):
            if key in tensors:
                raise CheckpointError(f"{path}: {key} is already in another file of this checkpoint")
            tensors[key] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    return tensors


def _entries(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from _read(path)
    except pickle.UnpicklingError as error:  # torch's own words advise to trust the file
        raise CheckpointError(f"{path} cannot be read as weights: it is damaged or holds more than tensors") from error
    except (OSError, EOFError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from error


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the handle is not a mapping
                yield key, file.get_tensor(key)
        return
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a mapping of names to tensors, found {type(content).__name__}")
    for key, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {key} is not a tensor but {type(tensor).__name__}")
        yield key, tensor


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Give a module its weights: the tensors themselves, not copies of them.

    Args:
        module: may be on the meta device; its parameters take the tensors' dtype and device.
        tensors: exactly the module's parameters and persistent buffers, by name.
        what: name of the weights, for the error.

    Raises:
        CheckpointError: listing every missing, unexpected and misshapen key; nothing was loaded.
    """
    check_exactly(module, tensors, what)
    module.load_state_dict(dict(tensors), strict=True, assign=True)


def check_exactly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError, listing every missing, unexpected and misshapen key, unless the tensors fit the module."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "misshapen": [
            f"{name} is {given[name]}, not {shape}"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ],
    }
    refuse(what, problems)


def refuse(what: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise CheckpointError if there are problems, listing every one under its kind."""
    listed = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if listed:
        raise CheckpointError(f"{what} does not fit the model; " + "; ".join(listed))
