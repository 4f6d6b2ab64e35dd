"""The worker end to end on ranks: admit, step, checkpoint on one gang, restore on another, finish."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from pusa_dist.config import ParallelConfig, load_model_config
from pusa_dist.errors import CheckpointError, GangError
from pusa_dist.parallel.mesh import free_port
from pusa_dist.request import ConditioningParams, MediaInfo, RequestParams, resolve_request
from pusa_dist.state import GenerationState
from pusa_dist.worker import Worker, WorkerOptions

STEPS = 4
DEGREES = {1: (1, 1, 1), 2: (2, 1, 1), 4: (1, 2, 2)}


def small_request(model):
    params = RequestParams(
        prompt="a ball rolls",
        seed=1,
        width=112,
        height=80,
        num_frames=9,
        num_inference_steps=STEPS,
        lora_alpha=1.2,
        conditioning=(ConditioningParams(position="start", noise_multiplier=0.2),),
    )
    return resolve_request(params, [MediaInfo(kind="image", width=64, height=64, num_frames=1)], model)


def generate(place, model_name):
    """Final latents: straight through, from a checkpoint after two steps, and sharing forwards with another."""
    model = load_model_config(model_name)
    cfg, ring, ulysses = DEGREES[place.world_size]
    parallel = ParallelConfig(cfg_degree=cfg, ring_degree=ring, ulysses_degree=ulysses)
    worker = Worker(model, parallel, WorkerOptions(threads=1, timeout_s=60))
    worker.join(place.rank, place.world_size, "127.0.0.1", place.port)
    shared = worker.share(f"from rank {place.rank}")

    request = small_request(model)
    generator = torch.Generator().manual_seed(7)
    context, negative = torch.randn(2, 9, model.transformer.text_dim, generator=generator)
    given = torch.randn(16, 1, 10, 14, generator=generator)
    worker.admit("straight", request, context, negative, given)
    for _ in range(2):
        worker.step(["straight"])
    assert worker.checkpoint("straight")[0] == 2
    half = worker.checkpoint("straight")[1]
    finals = [finish(worker, "straight", 2)]

    worker.restore("resumed", half)
    finals.append(finish(worker, "resumed", 2))

    worker.restore("sharing", half)
    worker.admit("other", replace(request, seed=2, guidance_scale=2.0), negative, context, given)
    if len(model.experts) == 1:  # steps of different experts share no forward
        assert worker.step(["sharing", "other"]) == {"sharing": 3, "other": 1}
        assert worker.step(["other", "sharing"]) == {"sharing": 4, "other": 2}
        finals.append(worker.finish("sharing"))
        finals.append(finish(worker, "other", 2))
    worker.leave()
    return finals, shared


def finish(worker, job_id, steps):
    for _ in range(steps):
        worker.step([job_id])
    return worker.finish(job_id)


@pytest.mark.parametrize("model_name", ["debug", "debug-two-expert"])
def test_a_gang_of_workers_generates_what_one_worker_does(run_ranks, model_name):
    expected, _ = run_ranks(1, generate, model_name)[0]
    for world_size in (2, 4):
        ranks = run_ranks(world_size, generate, model_name)
        for rank, (finals, shared) in enumerate(ranks):
            differences = [(a - b).abs().max().item() for a, b in zip(finals, expected, strict=True)]
            assert max(differences) < 1e-5, f"rank {rank} of {world_size}: {differences}"
            assert torch.equal(finals[0], finals[1]), "a state that went through a checkpoint ends elsewhere"
            assert all(torch.equal(a, b) for a, b in zip(finals, ranks[0][0], strict=True))
            # In a batch a sample's sums may be taken in another order: equal, not bit-equal.
            assert all((shared_one - finals[0]).abs().max() < 1e-5 for shared_one in finals[2:3])
            assert shared == "from rank 0"


def start(worker, job_id, request, text_dim):
    generator = torch.Generator().manual_seed(7)
    context, negative = torch.randn(2, 9, text_dim, generator=generator)
    worker.admit(job_id, request, context, negative, torch.randn(16, 1, 10, 14, generator=generator))


def strengths_and_refusals(place):
    """Latents after 2 and 4 steps of jobs that differ in one expert's strength, and foreign checkpoints."""
    model = load_model_config("debug-two-expert")
    worker = Worker(model, ParallelConfig(), WorkerOptions(threads=1, timeout_s=60))
    worker.join(0, 1, "127.0.0.1", place.port)
    found = {}
    for name, alpha in {"plain": (1.5, 1.4), "high": (4.0, 1.4), "low": (1.5, 4.0), "again": (1.5, 1.4)}.items():
        request = replace(small_request(model), lora_alpha=dict(zip(model.experts, alpha, strict=True)))
        start(worker, name, request, model.transformer.text_dim)
        for _ in range(2):
            worker.step([name])
        data = worker.checkpoint(name)[1]
        found[name] = (GenerationState.from_bytes(data).latents, finish(worker, name, 2))
    worker.leave()
    for change in ({"name": "other"}, {"revision": "2"}, {"precision": "bf16"}):
        other = Worker(replace(model, **change), ParallelConfig(), WorkerOptions(threads=1, timeout_s=60))
        other.join(0, 1, "127.0.0.1", free_port())
        with pytest.raises(CheckpointError, match="resume it on a gang like its own"):
            other.restore("job", data)
        other.leave()
    return found


def test_each_expert_runs_at_its_own_strength_and_a_foreign_checkpoint_is_refused(run_ranks):
    ((plain, high, low, again),) = (found.values() for found in run_ranks(1, strengths_and_refusals))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), "strengths of other jobs left a trace"
    assert not torch.equal(high[0], plain[0])
    assert torch.equal(low[0], plain[0]), "the low-noise expert has not run yet"
    assert not torch.equal(low[1], plain[1])


def sliced(place):
    """Final latents of three jobs, each alone, then turning round at every step, then moved at every third step."""
    model = load_model_config("debug")
    worker = Worker(model, ParallelConfig(ulysses_degree=2), WorkerOptions(threads=1, timeout_s=60))
    worker.join(place.rank, place.world_size, "127.0.0.1", place.port)
    requests = {
        "plain": small_request(model),
        "stronger": replace(small_request(model), seed=2, lora_alpha=dict.fromkeys(model.experts, 3.0)),
        "smaller": replace(small_request(model), seed=3, width=64, height=64, conditioning=()),
    }
    generator = torch.Generator().manual_seed(7)
    context, negative = torch.randn(2, 9, model.transformer.text_dim, generator=generator)
    given = torch.randn(16, 1, 10, 14, generator=generator)

    def admit(prefix, name):
        worker.admit(prefix + name, requests[name], context, negative, given if requests[name].conditioning else None)

    finals = {"alone": {}, "in turns": {}, "moved": {}}
    for name in requests:
        admit("alone-", name)
        finals["alone"][name] = finish(worker, f"alone-{name}", STEPS)
    for name in requests:
        admit("turns-", name)
    for _ in range(STEPS):
        for name in requests:
            worker.step([f"turns-{name}"])
    for name in requests:
        finals["in turns"][name] = worker.finish(f"turns-{name}")
        admit("moved-", name)
    for step in range(STEPS):
        for name in reversed(requests):
            if step % 3 == 1:
                _, data = worker.checkpoint(f"moved-{name}")
                worker.drop(f"moved-{name}")
                worker.restore(f"moved-{name}", data)
            worker.step([f"moved-{name}"])
    finals["moved"] = {name: worker.finish(f"moved-{name}") for name in requests}
    worker.leave()
    return finals


def test_latents_are_the_same_bits_however_a_job_is_time_sliced(run_ranks):
    for finals in run_ranks(2, sliced):
        for how in ("in turns", "moved"):
            for name, expected in finals["alone"].items():
                assert torch.equal(finals[how][name], expected), f"{name}, {how}"


def start_with_a_broken_network(place, axis, exchange):
    """What the start of a gang says when the exchange of an axis fails, and whether the rank is still in it."""
    worker = Worker(load_model_config("debug"), ParallelConfig(**{axis: 2}), WorkerOptions(threads=1, timeout_s=60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, exchange, no_route)
        with pytest.raises(GangError) as caught:
            worker.join(place.rank, 2, "127.0.0.1", place.port)
    return str(caught.value), dist.is_initialized()


def no_route(*_, **__):
    raise RuntimeError("no route to host")


@pytest.mark.parametrize(
    ("axis", "exchange"),
    [("cfg_degree", "all_gather"), ("ring_degree", "batch_isend_irecv"), ("ulysses_degree", "all_to_all_single")],
)
def test_ranks_that_meet_but_cannot_exchange_what_a_step_needs_do_not_start(run_ranks, axis, exchange):
    for rank, (message, has_stayed) in enumerate(run_ranks(2, start_with_a_broken_network, axis, exchange)):
        assert message.startswith(f"rank {rank} of 2 met the others, but failed in its first forward with them: no rou")
        assert not has_stayed


def started(place):
    """Strengths in the weights of a gang that has just started."""
    worker = Worker(load_model_config("debug-two-expert"), ParallelConfig(), WorkerOptions(threads=1, timeout_s=60))
    worker.join(0, 1, "127.0.0.1", place.port)
    return {expert: lora.alpha for expert, lora in worker._loaded._loras.items()}


def test_a_gang_starts_with_the_default_strengths(run_ranks):
    assert run_ranks(1, started) == [dict(load_model_config("debug-two-expert").lora.alpha)]
