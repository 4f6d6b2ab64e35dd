"""xfuser's attention is refused unless it is there, runs, and equals ours."""

import importlib.util
import logging
import sys

import pytest
import torch

from pusa_dist.config import ParallelConfig, TransformerConfig
from pusa_dist.errors import ConfigError
from pusa_dist.model.attention import attention_with_lse, local_attention
from pusa_dist.model.transformer import new_transformer
from pusa_dist.parallel.apply import parallelize
from pusa_dist.parallel.attention import SequenceAttention
from pusa_dist.parallel.mesh import lay_out
from pusa_dist.parallel.ring import ring_attention
from pusa_dist.parallel.shard import SequenceShard
from pusa_dist.parallel.xfuser_usp import UspAttention, admit, admitted_usp

HEADS, HEAD_DIM = 4, 8


def verdict(candidate, ours, mesh):
    try:
        admit(candidate, ours, mesh, HEADS, HEAD_DIM, torch.zeros(1))
    except ConfigError as error:
        return str(error)
    return "admitted"


def attention_over(mesh):
    return SequenceAttention(SequenceShard(mesh.get_group("ring"), mesh.get_group("ulysses")))


def judge(place):
    mesh = place.join(ParallelConfig(ring_degree=2))
    ours = attention_over(mesh)

    def ring_that_ignores_lse(query, key, value):
        def attend(q, k, v):
            out, lse = attention_with_lse(q, k, v)
            return out, torch.zeros_like(lse)

        return ring_attention(query, key, value, ours.shard.layout.ring_lengths(), ours.shard.ring_group, attend)

    def wrong_on_one_rank(query, key, value):
        return ours(query, key, value) * (1.001 if place.rank == 1 else 1.0)

    def fails(query, key, value):
        raise RuntimeError("no kernel image")

    def usp(query, key, value, combine_qkv_a2a):
        assert combine_qkv_a2a
        return ours(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    wrapped = UspAttention(usp, ours)
    verdicts = {
        "ours": verdict(ours, ours, mesh),
        "wrapped": verdict(wrapped, ours, mesh),
        "local": verdict(local_attention, ours, mesh),
        "no lse": verdict(ring_that_ignores_lse, ours, mesh),
        "one rank": verdict(wrong_on_one_rank, ours, mesh),
        "nan": verdict(lambda q, k, v: torch.full_like(q, torch.nan), ours, mesh),
        "fails": verdict(fails, ours, mesh),
    }
    inner = lay_out(ParallelConfig(ulysses_degree=2), "cpu", 60)
    verdicts["local, ulysses"] = verdict(local_attention, attention_over(inner), inner)
    return verdicts, uneven_shapes(ours), refusal(mesh)


def uneven_shapes(ours):
    """What is logged, and which attention runs, for an uneven shape twice and an even one."""
    calls, lines = [], []

    def usp(query, key, value, combine_qkv_a2a):
        calls.append(tuple(query.shape))
        return query

    class Recorder(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    recorder = Recorder()
    logger = logging.getLogger("pusa_dist.parallel.xfuser_usp")
    logger.addHandler(recorder)
    wrapped = UspAttention(usp, ours)
    for frame_tokens in (5, 5, 7, 6):
        tokens = torch.randn(1, 2, frame_tokens, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1))
        mine = ours.shard.split(tokens).flatten(1, 2).unflatten(2, (HEADS, HEAD_DIM))
        out = wrapped(mine, mine, mine)
        assert torch.equal(out, mine if frame_tokens == 6 else ours(mine, mine, mine))
    logger.removeHandler(recorder)
    return calls, lines


def refusal(mesh):
    sys.modules["xfuser"] = None  # as if it were not installed
    shape = TransformerConfig(
        num_layers=1, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=8, text_dim=8, freq_dim=8
    )
    with pytest.raises(ConfigError) as caught:
        parallelize(new_transformer(shape), mesh, attention="xfuser")
    return str(caught.value)


def test_only_an_attention_that_equals_ours_is_admitted(run_ranks):
    ranks = run_ranks(2, judge)
    for verdicts, _, _ in ranks:
        assert verdicts["ours"] == "admitted"
        assert verdicts["wrapped"] == "admitted"
        for wrong in ("local", "no lse", "one rank", "nan", "local, ulysses"):
            assert "attention=xfuser differs from ours by" in verdicts[wrong], wrong
            assert "use attention=ours" in verdicts[wrong]
        assert "9.99e-04" in verdicts["one rank"] or "1.00e-03" in verdicts["one rank"]
        assert "does not run on this mesh (no kernel image)" in verdicts["fails"]
    assert ranks[0][0] == ranks[1][0], "ranks must decide alike"

    for _, (calls, lines), message in ranks:
        assert calls == [(1, HEADS, 6, HEAD_DIM)], "xfuser runs for even shards only"
        assert len(lines) == 2, f"each uneven shape is logged once: {lines}"
        assert "3/2 tokens of a frame" in lines[0]
        assert "4/3 tokens of a frame" in lines[1]
        assert "install the extra `cuda`" in message


def real_usp_on_cpus(place, parallel):
    """xfuser itself, told that there are accelerators, with the CPU's flash kernel as its own."""
    torch.cuda.current_device = lambda: 0
    torch.version.cuda = "12.8"
    backend, config, groups, state, usp = (
        importlib.import_module(f"xfuser.{name}")
        for name in (
            "core.distributed.attention_backend",
            "config.config",
            "core.distributed.parallel_state",
            "core.distributed.group_coordinator",
            "model_executor.layers.usp",
        )
    )
    importlib.import_module("xfuser.envs").get_torch_distributed_backend = lambda: "gloo"
    for module in (config, groups, state):
        module.HAS_LONG_CTX_ATTN = True
    groups.set_device = lambda index: None
    usp.PROCESS_GROUP = importlib.import_module("yunchang.globals").PROCESS_GROUP
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backend.ATTENTION_FUNCTION_REGISTRY[backend.AttentionBackendType.SDPA_FLASH] = lambda query, key, value, *_, **__: (
        flash(query, key, value)
    )
    mesh = place.join(parallel)
    attention = admitted_usp(mesh, attention_over(mesh), HEADS, HEAD_DIM, torch.zeros(1))
    return type(attention).__name__


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton")),
    reason="xfuser is not installed (extra `cuda`, and the CUDA build of torch)",
)
def test_xfuser_itself_is_set_up_and_admitted(run_ranks):
    for cfg, ring, ulysses in ((1, 1, 2), (1, 2, 1), (2, 1, 2), (1, 2, 2)):
        parallel = ParallelConfig(cfg_degree=cfg, ring_degree=ring, ulysses_degree=ulysses)
        names = run_ranks(cfg * ring * ulysses, real_usp_on_cpus, parallel, timeout_s=280)
        assert set(names) == {"UspAttention"}


def on_gpus(place, attention):
    mesh = place.join(ParallelConfig(ulysses_degree=place.world_size), device="cuda")
    torch.manual_seed(2)
    shape = TransformerConfig(
        num_layers=2, num_attention_heads=8, attention_head_dim=128, ffn_dim=64, text_dim=32, freq_dim=64
    )
    model = new_transformer(shape).requires_grad_(False).to("cuda", torch.bfloat16)
    model = parallelize(model, mesh, attention=attention)
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 16, 3, 8, 8, generator=generator).cuda()
    context = torch.randn(1, 9, 32, generator=generator).cuda()
    return model(latents, torch.tensor([[0.0, 500.0, 937.0]]).cuda(), context).float().cpu()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs and the extra `cuda`")
def test_xfuser_on_gpus_computes_what_ours_does(run_ranks):
    pytest.importorskip("xfuser")
    ours = run_ranks(2, on_gpus, "ours", timeout_s=280)
    xfuser = run_ranks(2, on_gpus, "xfuser", timeout_s=280)
    difference = (xfuser[0] - ours[0]).norm() / ours[0].norm()
    assert difference < 2e-2
    assert torch.equal(xfuser[0], xfuser[1])
