"""Two ranks of one sample learn what one process learns from two, with whole copies and with one sharded over them."""

import pytest
import torch

from pusa_dist.checkpoint.seeded import seeded_normal
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import load_model_config
from pusa_dist.errors import ConfigError
from pusa_dist.generate import Place
from pusa_dist.training import distributed
from pusa_dist.training.adapter import adapter_parameters, inject, published_state
from pusa_dist.training.distributed import Ranks, checkpoint_blocks, like, meet_at, shard, whole
from pusa_dist.training.objective import TrainingSchedule, draw, lesson, loss, sample_generator

MODEL = load_model_config("debug")
STEPS = 3


def new_model(ranks, *, sharded, precision="fp32"):
    transformer = inject(build_transformer(MODEL, "main", device="cpu", precision=precision), 4)
    for name, parameter in adapter_parameters(transformer).items():
        if ".lora_B." in name:  # zeros would hide the gradients of A
            parameter.data.copy_(seeded_normal(parameter.shape, 5, name, 0.05))
    if sharded:
        checkpoint_blocks(transformer)
        shard(transformer, ranks)
    return transformer


def backward(transformer, numbers):
    latents = torch.stack([seeded_normal((16, 3, 4, 6), 1, f"latents {n}") for n in numbers])
    context = torch.stack([seeded_normal((7, 32), 1, f"context {n}") for n in numbers])
    given = lesson(latents, *draw(latents, [sample_generator(2, n) for n in numbers]), TrainingSchedule.of("fp32"))
    loss(transformer(given.noisy, given.timesteps, context), given).backward()


def learn(ranks, batch_size, *, sharded, stop=STEPS, resume=None, precision="fp32"):
    """Gradients of the first step, the norm that clipping sees, the adapter at the end, and a checkpoint."""
    transformer = new_model(ranks, sharded=sharded, precision=precision)
    parameters = list(adapter_parameters(transformer).values())
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    start = 0
    if resume is not None:
        start = resume["step"]
        with torch.no_grad():
            for parameter, value in zip(parameters, resume["weights"], strict=True):
                parameter.copy_(like(value, parameter))
        state = {i: {k: like(v, parameters[i]) if v.dim() else v.clone() for k, v in each.items()}
                 for i, each in resume["optimiser"]["state"].items()}  # fmt: skip
        optimiser.load_state_dict({**resume["optimiser"], "state": state})
    first = norm = None
    for step in range(start, stop):
        backward(transformer, ranks.numbers(step, batch_size))
        ranks.average_gradients(parameters)
        first = first or whole([p.grad for p in parameters])
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, 0.5))
        optimiser.step()
        optimiser.zero_grad()
    content = {"step": stop, "weights": whole(parameters), "optimiser": whole(optimiser.state_dict())}
    return first, norm, published_state(transformer), content


def rank_main(place):
    ranks = meet_at(Place(rank=place.rank, world_size=place.world_size, address="127.0.0.1", port=place.port), "cpu")
    copies = learn(ranks, 1, sharded=False)
    again = learn(ranks, 1, sharded=False)
    cut = learn(ranks, 1, sharded=True)
    halfway = learn(ranks, 1, sharded=True, stop=2)[3]
    resumed = learn(ranks, 1, sharded=True, resume=halfway)
    half = learn(ranks, 1, sharded=True, precision="bf16")
    transformer = new_model(ranks, sharded=True)
    stored = sum(p.to_local().numel() for p in transformer.parameters())
    return copies, again, cut, halfway, resumed, half, stored


@pytest.fixture(scope="module")
def results(run_ranks):
    return run_ranks(2, rank_main)


@pytest.fixture(scope="module")
def alone():
    return learn(Ranks(), 2, sharded=False)


def difference(ours, theirs):
    ours, theirs = (x.values() if isinstance(x, dict) else x for x in (ours, theirs))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("way", [0, 2], ids=["copies", "sharded"])
def test_gradients_are_those_of_one_process_on_the_union_of_the_batches(results, alone, way):
    for result in results:
        gradients, norm, adapter, _ = result[way]
        assert difference(gradients, alone[0]) < 1e-4
        assert norm == pytest.approx(alone[1].item(), rel=1e-4)
        assert difference(adapter, alone[2]) < 1e-3
    one_sample = learn(Ranks(), 1, sharded=False)
    assert difference(one_sample[0], alone[0]) > 0.1


def test_ranks_agree_and_a_run_repeats_bit_for_bit(results):
    for way in (0, 2):
        assert all(a.equal(b) for a, b in zip(*(r[way][2].values() for r in results), strict=True))
    copies, again = results[0][0], results[0][1]
    assert all(copies[2][key].equal(again[2][key]) for key in copies[2])


def test_a_sharded_run_resumes_to_the_same_bits_and_its_checkpoint_suits_one_process(results, alone):
    _, _, cut, halfway, resumed, _, _ = results[0]
    assert all(cut[2][key].equal(resumed[2][key]) for key in cut[2])
    continued = learn(Ranks(), 2, sharded=False, resume=halfway)
    assert difference(continued[2], alone[2]) < 1e-3


def test_each_rank_stores_half(results):
    total = sum(p.numel() for p in new_model(Ranks(), sharded=False).parameters())
    assert [result[6] / total for result in results] == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_half_precision_base_under_float32_updates_is_sharded_too(results, alone):
    gradients = results[0][5][0]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    together = [torch.cat([g.flatten() for g in each]) for each in (gradients, alone[0])]
    assert torch.nn.functional.cosine_similarity(*together, dim=0) > 0.99


def test_checkpointed_blocks_give_the_same_gradients(alone):
    again = learn(Ranks(), 2, sharded=True)  # by itself nothing is sharded
    assert all(a.equal(b) for a, b in zip(again[0], alone[0], strict=True))


def test_samples_are_numbered_over_ranks_and_steps():
    shares = [list(Ranks(rank, 2).numbers(step, 3)) for step in (0, 1) for rank in (0, 1)]
    assert [number for share in shares for number in share] == list(range(12))


def test_gradients_go_in_messages_of_bounded_size_and_one_kind(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 10)
    sizes = [4, 6, 1, 30, 2, 3]
    tensors = [torch.empty(size, dtype=torch.float64 if size == 3 else torch.float32) for size in sizes]
    assert [[t.numel() for t in bucket] for bucket in distributed._buckets(tensors)] == [[4, 6], [1], [30], [2], [3]]


def test_a_parameter_without_a_gradient_is_an_error_and_not_a_hang():
    with pytest.raises(ConfigError, match="no gradient"):
        Ranks(0, 2).average_gradients([torch.nn.Parameter(torch.ones(2))])
