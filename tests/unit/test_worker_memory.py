"""A device without the memory for a generation: an error of that generation, which leaves the rank as it was."""

from dataclasses import replace

import pytest
import torch

from pusa_dist.errors import DeviceMemoryError
from pusa_dist.model.transformer import VectorTimestepTransformer
from pusa_dist.request import GenerationRequest
from pusa_dist.state import GenerationState

REQUEST = GenerationRequest(
    model="debug", prompt="a", negative_prompt="b", width=64, height=48, num_frames=9, fps=8,
    num_inference_steps=2, guidance_scale=1.0, shift=5.0, seed=0, lora_alpha={"main": 1.4},
)  # fmt: skip


class Full:
    """A device that has no memory left, as a function that would need some."""

    def __init__(self) -> None:
        self.words = "CUDA out of memory. Process 71423 has 77.90 GiB memory in use."

    def __call__(self, *_, **__):
        raise torch.OutOfMemoryError(self.words)


def admit(worker, name, request=REQUEST):
    worker.admit(name, request, torch.ones(5, 32), None, None)


def test_a_step_without_memory_moves_no_resident_and_says_what_to_ask_for_instead(worker, monkeypatch):
    for name in ("undisturbed", "disturbed", "other"):
        admit(worker, name)
    for _ in range(2):
        worker.step(["undisturbed"])
    with monkeypatch.context() as patched:
        patched.setattr(VectorTimestepTransformer, "forward", Full())
        with pytest.raises(DeviceMemoryError) as caught:
            worker.step(["disturbed"])
        with pytest.raises(DeviceMemoryError, match="and size=64x48, num_frames=9: 72 tokens"):
            worker.step(["disturbed", "other"])
    assert str(caught.value) == (
        "size=64x48, num_frames=9: 36 tokens need more memory than there is; use a smaller size or fewer frames"
    )
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)  # which would keep the forward's tensors
    assert [worker.step([name]) for name in ("disturbed", "other")] == [{"disturbed": 1}, {"other": 1}]
    worker.step(["disturbed"])
    assert torch.equal(worker.finish("disturbed"), worker.finish("undisturbed"))


def test_a_step_without_memory_for_its_strength_leaves_no_weights_of_another(worker, monkeypatch):
    admit(worker, "weak")
    admit(worker, "strong", replace(REQUEST, lora_alpha={"main": 3.0}))
    worker.step(["weak"])
    merges, merge = [], torch.Tensor.copy_

    def full_at_second(weight, *arguments, **options):
        merges.append(weight)
        return Full()() if len(merges) == 2 else merge(weight, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", full_at_second)
        with pytest.raises(DeviceMemoryError):
            worker.step(["strong"])
    worker.step(["weak"])
    disturbed = worker.finish("weak")
    admit(worker, "again")
    for _ in range(2):
        worker.step(["again"])
    assert torch.equal(disturbed, worker.finish("again"))


def test_a_generation_that_has_no_room_is_not_taken_in(worker, monkeypatch):
    admit(worker, "here")
    _, data = worker.checkpoint("here")
    worker.drop("here")
    monkeypatch.setattr(GenerationState, "to", Full())
    with pytest.raises(DeviceMemoryError, match="size=64x48"):
        admit(worker, "new")
    with pytest.raises(DeviceMemoryError, match="size=64x48"):
        worker.restore("back", data)
    assert not worker._residents.keys() & {"new", "back"}
