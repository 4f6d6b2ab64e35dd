"""A second folder of cases in the format of the goldens: other names, shapes, seeds and settings.

Its loops are written out here, apart from the package's sampler, so that the two check each other.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from pusa_dist.checkpoint.seeded import seeded_normal, seeded_state
from pusa_dist.checkpoint.vae import new_vae
from pusa_dist.config import TransformerConfig, VaeConfig
from pusa_dist.model.transformer import new_transformer
from pusa_dist.model.vae import decode_chunks, encode

MODEL_CONFIG = {
    "dim": 72, "in_dim": 8, "ffn_dim": 100, "out_dim": 8, "text_dim": 20, "freq_dim": 48, "eps": 1e-6,
    "patch_size": [1, 2, 2], "num_heads": 3, "num_layers": 3, "has_image_input": False,
}  # fmt: skip
TRANSFORMER = TransformerConfig(
    num_layers=3, num_attention_heads=3, attention_head_dim=24, ffn_dim=100, text_dim=20, freq_dim=48,
    in_channels=8, out_channels=8,
)  # fmt: skip
SAMPLER_TOLERANCE = {"model_timesteps_max_abs": 0.0, "sigma_max_abs": 1e-6, "max_abs": 1e-4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Writer:
    """Collects cases and writes the manifest."""

    def __init__(self, path):
        self.path = path
        self.listed = []

    def add(self, name, kind, tensors, **described):
        tensors = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
        save_file(tensors, self.path / f"{name}.safetensors")
        text = json.dumps({"name": name, "kind": kind, **described})
        (self.path / f"{name}.json").write_text(text)
        self.listed.append({"name": name, "kind": kind})
        (self.path / "manifest.json").write_text(json.dumps({"set": "other", "cases": self.listed}))


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory):
    writer = Writer(tmp_path_factory.mktemp("other-cases"))
    experts = {name: add_transformer(writer, name, seed) for name, seed in (("grey", 1), ("hot", 2), ("cold", 3))}
    add_loop(writer, "clip", experts, {"main": "grey"}, [2, 0], [0.75, 0.0], cfg=1.0, by_position=True, pipeline="v2v")
    add_loop(writer, "free", experts, {"only": "grey"}, [], [], cfg=4.25, pipeline="t2v")
    add_loop(
        writer, "pair", experts, {"low": "cold", "high": "hot"}, [1], [0.003], cfg=2.0, boundary=0.6,
        pipeline="wan22_multi_frames",
    )  # fmt: skip
    add_loop(writer, "half", experts, {"main": "hot"}, [0, 2], [0.3, 1.0], cfg=3.0, dtype="bfloat16", pipeline="v2v")
    add_loop(writer, "full", experts, {"main": "grey"}, [0, 1, 2], [0.2, 0.5, 0.1], cfg=3.0, pipeline="v2v", fault=2)
    add_forward(writer, experts["cold"])
    add_scheduler(writer)
    add_lora(writer, experts["hot"])
    add_vae(writer)
    add_text_encoder(writer)
    add_preprocess(writer)
    add_lesson(writer, experts["grey"])
    return writer.path


def add_transformer(writer, name, seed):
    with torch.device("meta"):
        transformer = new_transformer(TRANSFORMER)
    state = seeded_state(transformer, seed, name)
    writer.add(f"weights_{name}", "weights", state, model_config=MODEL_CONFIG)
    return state


def transformer_of(state, dtype=torch.float32):
    with torch.device("meta"):
        transformer = new_transformer(TRANSFORMER)
    transformer.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, assign=True)
    return transformer.eval().requires_grad_(False)


def loop_rows(positions, multipliers, steps, shift, frames, dtype, *, truncate):
    """Scalar schedule, and per step what is fed and which part of sigma each frame has."""
    uniform = torch.linspace(1, 0, steps + 1)
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    fed, share = torch.zeros(steps, frames), torch.ones(steps, frames)
    for i in range(steps):
        row = (sigmas[i] * 1000).repeat(frames).to(dtype)
        for p, m in zip(positions, multipliers, strict=True):
            row[p] = row[p] * m
        row = row.long().to(dtype) if truncate else row
        fed[i] = row.float()
        for p, m in zip(positions, multipliers, strict=True):
            share[i, p] = 0 if row[p] == 0 else m
    return sigmas, fed, share


def add_loop(
    writer, name, experts, weights, positions, multipliers, *, cfg, pipeline,
    boundary=None, dtype="float32", by_position=False, fault=None, steps=6, shift=3.0,
):  # fmt: skip
    kind, frames = DTYPES[dtype], 3
    noise = torch.randn(1, 8, frames, 4, 2, generator=torch.Generator().manual_seed(17))
    clean = seeded_normal((1, 8, frames if by_position else max(len(positions), 1), 4, 2), 5, name)
    context, negative = (seeded_normal((1, 7, 20), 5, f"{name}{side}") for side in (0, 1))
    sigmas, fed, share = loop_rows(positions, multipliers, steps, shift, frames, kind, truncate=bool(positions))
    latents = noise.to(kind, copy=True)
    for k, (p, m) in enumerate(zip(positions, multipliers, strict=True)):
        start = clean[:, :, p if by_position else k].to(kind)
        latents[:, :, p] = ((1 - m) * start.float() + m * latents[:, :, p].float()).to(kind) if m else start
    models = {key: transformer_of(experts[value], kind) for key, value in weights.items()}
    init, velocities, trajectory, names = latents, [], [], []
    for i in range(steps):
        names.append("low" if boundary and sigmas[i] * 1000 < boundary * 1000 else "high")
        model = models[names[-1]] if boundary else next(iter(models.values()))
        branches = [model(latents.to(kind), fed[i : i + 1], each.to(kind)) for each in (context, negative)]
        velocity = branches[0] if cfg == 1.0 else branches[1] + cfg * (branches[0] - branches[1])
        change = (sigmas[i + 1] - sigmas[i]) * share[i]
        latents = latents.float() + velocity.float() * change.view(1, 1, -1, 1, 1)
        velocities.append(velocity)
        trajectory.append(latents)
    recorded = {
        "noise": noise, "context_pos": context, "sigmas": sigmas[:-1], "timesteps": sigmas[:-1] * 1000,
        "model_timesteps": fed.to(kind), "sigma": sigmas[:-1, None] * share, "sigma_next": sigmas[1:, None] * share,
        "latents_init": init, "noise_pred": torch.cat(velocities), "latents_steps": torch.cat(trajectory),
        "final": latents,
    }  # fmt: skip
    if fault:  # as upstream: the index nearest to the largest scaled timestep
        index = (fed.max(1).values[:, None] - sigmas[None, :-1] * 1000).abs().argmin(1)
        recorded["sigma"], recorded["sigma_next"] = sigmas[index][:, None] * share, sigmas[index + 1][:, None] * share
        recorded |= {key: recorded[key] + 1 for key in ("latents_init", "noise_pred", "latents_steps", "final")}
    if positions:
        recorded["cond_latents"] = clean
    if cfg != 1.0:
        recorded["context_neg"] = negative
    statistical = {"min_cosine": 0.999, "mean_abs": 0.02, "model_timesteps_max_abs": 0.0, "sigma_max_abs": 1e-6}
    writer.add(
        name, "sampler", recorded, pipeline=pipeline, model_config=MODEL_CONFIG, dtype=f"{dtype} weights+compute",
        weights={key: f"weights_{value}.safetensors" for key, value in weights.items()},
        steps=steps, shift=shift, cfg_scale=cfg, seed=17, cond_positions=positions, noise_multipliers=multipliers,
        cond_latents_meaning="full-clip latents, index by position" if by_position else "one per entry, same order",
        switch_DiT_boundary=boundary, experts_per_step=names if boundary else None,
        tolerance=statistical if dtype == "bfloat16" else SAMPLER_TOLERANCE, upstream_fault=fault,
    )  # fmt: skip


def add_forward(writer, state):
    model = transformer_of(state)
    x, context = seeded_normal((3, 8, 4, 6, 4), 7, "x"), seeded_normal((3, 5, 20), 7, "context")
    timestep = torch.arange(12.0).view(3, 4) * 70.5
    recorded = {"x": x, "timestep": timestep, "context": context, "output": model(x, timestep, context)}
    writer.add(
        "velocity", "forward", recorded, model_config=MODEL_CONFIG, dtype="torch.float32",
        weights={"main": "weights_cold.safetensors"}, tolerance={"max_abs": 2e-5, "min_cosine": 0.999999},
    )  # fmt: skip


def add_scheduler(writer):
    recorded, positions, multipliers = {}, [1, 3], [0.4, 0.0]
    for pipeline in ("t2v", "wan22_v2v"):
        given = ([], []) if pipeline == "t2v" else (positions, multipliers)
        for precision in ("fp32", "bf16"):
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            sigmas, fed, share = loop_rows(*given, 7, 2.5, 6, dtype, truncate=pipeline != "t2v")
            prefix = f"{pipeline}.shift2.5.steps7"
            recorded |= {
                f"{prefix}.sigmas": sigmas[:-1],
                f"{prefix}.timesteps": sigmas[:-1] * 1000,
                f"{prefix}.{precision}.model_timesteps": fed,
                f"{prefix}.{precision}.sigma": sigmas[:-1, None] * share,
                f"{prefix}.{precision}.sigma_next": sigmas[1:, None] * share,
            }
    experts = ["high" if sigma * 1000 >= 875 else "low" for sigma in sigmas[:-1]]
    writer.add(
        "times", "scheduler", recorded, cond={"positions": positions, "multipliers": multipliers, "latent_frames": 6},
        experts={"wan22_v2v.shift2.5.steps7.experts": experts},
        tolerance={"model_timesteps_max_abs": 0.0, "sigma_max_abs": 1e-6},
    )  # fmt: skip


def add_lora(writer, state):
    weight = state["blocks.2.attn1.to_k.weight"]
    up, down = seeded_normal((72, 3), 9, "up"), seeded_normal((3, 72), 9, "down")
    recorded = {
        "pusa/blocks.2.self_attn.k.lora_up.weight": up,
        "pusa/blocks.2.self_attn.k.lora_down.weight": down,
        "lightx2v/blocks.2.self_attn.k.lora_up.weight": up,
        "lightx2v/blocks.2.self_attn.k.lora_down.weight": down,
        "lightx2v/blocks.2.self_attn.k.alpha": torch.tensor(1.5),
        "merged_fp32.pusa/blocks.2.self_attn.k.weight": weight + 0.7 * (up @ down),
        "merged_fp32.lightx2v/blocks.2.self_attn.k.weight": weight + 0.5 * (up @ down),
        "merged_fp32.lightx2v_then_pusa/blocks.2.self_attn.k.weight": weight + 1.2 * (up @ down),
        "merged_bf16.pusa/blocks.2.self_attn.k.weight": weight.bfloat16() + 0.7 * (up.bfloat16() @ down.bfloat16()),
    }
    writer.add(
        "strength", "lora", recorded, model_config=MODEL_CONFIG, weights={"x": "weights_hot.safetensors"},
        pusa_lora_alpha=0.7, tolerance={"fp32_max_abs": 1e-5, "bf16_max_ulp": 1},
    )  # fmt: skip


def add_vae(writer):
    config = VaeConfig(base_dim=8, z_dim=16, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
    vae = new_vae(config).eval().requires_grad_(False)
    vae.load_state_dict(seeded_state(vae, 4, "vae"))
    described = {"vae_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    writer.add("eyes", "weights", vae.state_dict(), **described, temperal_downsample=[False, True, True])
    video, latents = seeded_normal((1, 3, 5, 32, 48), 4, "video").tanh(), seeded_normal((1, 16, 2, 4, 6), 4, "latents")
    tiles = {"tile": (3, 4), "tile_stride": (2, 3)}
    recorded = {
        "video": video, "latents": encode(vae, video), "latents_first_frame_only": encode(vae, video[:, :, :1]),
        "decode_input": latents, "decoded": torch.cat(list(decode_chunks(vae, latents)), 2),
    }  # fmt: skip
    # Listed before the case whose decode_input it needs.
    tiled = {"decoded_tiled": torch.cat(list(decode_chunks(vae, latents, **tiles)), 2)}
    writer.add("patchwork", "vae", tiled, tile_size=[3, 4], tile_stride=[2, 3], tolerance={"max_abs": 1e-4})
    writer.add("sight", "vae", recorded, tolerance={"max_abs": 1e-4})


def add_text_encoder(writer):
    described = {"vocab": 40, "dim": 24, "dim_attn": 16, "dim_ffn": 30, "num_heads": 2, "num_layers": 3}
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=40, d_model=24, d_kv=8, d_ff=30, num_heads=2, num_layers=3, relative_attention_num_buckets=16
        )
    ).eval()
    drawn = seeded_state(encoder, 6, "text")
    drawn["encoder.embed_tokens.weight"] = drawn["shared.weight"]
    encoder.load_state_dict(drawn)
    ids, mask = torch.arange(36).view(2, 18) % 40, torch.ones(2, 18, dtype=torch.int64)
    mask[0, 11:] = 0
    raw = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    recorded = {f"w/{key}": value for key, value in drawn.items() if "embed_tokens" not in key}
    recorded |= {"ids": ids, "mask": mask, "raw": raw, "embeds_zeroed": raw * mask[..., None]}
    writer.add(
        "words", "text_encoder", recorded,
        config={**described, "num_buckets": 16, "shared_pos": False}, tolerance={"max_abs": 1e-5},
    )  # fmt: skip


def add_preprocess(writer):
    pixels = np.random.default_rng(8).integers(0, 256, (37, 90, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(pixels).resize((64, 48), Image.Resampling.LANCZOS))
    ready = torch.from_numpy(resized.copy()).permute(2, 0, 1).float()[None, :, None] * (2 / 255) - 1
    writer.add(
        "portrait", "preprocess", {"image_uint8_hwc": torch.from_numpy(pixels), "vae_input": ready},
        height=48, width=64, tolerance={"max_uint8_levels": 1},
    )  # fmt: skip
    # 64 of the 90 columns are kept, from column 13, and nothing is resized.
    frame = np.random.default_rng(9).integers(0, 256, (48, 90, 3), dtype=np.uint8)
    kept = np.ascontiguousarray(frame[::3, 13:77, ::-1][:, ::3])
    writer.add(
        "strip", "preprocess",
        {"frame7_bgr_uint8": torch.from_numpy(frame), "frame7_out_rgb_48x64_every3rd": torch.from_numpy(kept)},
        tolerance={"max_uint8_levels": 2},
    )  # fmt: skip


def add_lesson(writer, state, rank=3, alpha=6):
    """One training step with the LoRA as hooks of our own, B @ A by hand; alpha differs from the rank."""
    model = transformer_of(state)
    linears = {f"{attn}_attn.{x}": f"attn{i}.{to}" for i, attn in ((1, "self"), (2, "cross")) for x, to in
               (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))}  # fmt: skip
    linears |= {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    lora = {}
    for block in range(3):
        for original, ours in linears.items():
            linear, key = model.blocks[block].get_submodule(ours), f"blocks.{block}.{original}"
            shapes = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
            a, b = (seeded_normal(shapes[x], 11, key + x, 0.2).requires_grad_() for x in "AB")
            lora |= {f"{key}.lora_A.default.weight": a, f"{key}.lora_B.default.weight": b}
            linear.register_forward_hook(lambda _, x, out, a=a, b=b: out + (x[0] @ a.T @ b.T) * (alpha / rank))

    latents, noise = seeded_normal((1, 8, 4, 4, 6), 11, "latents"), seeded_normal((1, 8, 4, 4, 6), 11, "noise")
    context, ids = seeded_normal((1, 6, 20), 11, "context"), torch.tensor([[999, 3, 500, 500]])
    uniform = 1 - torch.arange(1000) / 1000
    sigmas = 5 * uniform / (1 + 4 * uniform)
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    bell = (bell - bell.min()) / (bell - bell.min()).sum() * 1000

    def noised(index, latents=latents, noise=noise):
        sigma = sigmas[index].view(1, 1, -1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    rounded = (sigmas[ids] * 1000).bfloat16().float()
    nearest = (sigmas * 1000 - rounded[..., None]).abs().argmin(-1)
    output = model(noised(ids), sigmas[ids] * 1000, context)
    mse = (output - (noise - latents)).square().mean()
    loss = mse * bell[ids[0]].mean()
    loss.backward()
    recorded = {
        "latents": latents, "noise": noise, "context": context, "timestep_id": ids, "timestep": sigmas[ids] * 1000,
        "noisy_latents": noised(ids), "weights_per_frame": bell[ids[0]], "model_output": output,
        "mse": mse[None], "loss": loss[None], "bf16.timestep": rounded,
        "bf16.noisy_latents": noised(nearest, latents.bfloat16().float(), noise.bfloat16().float()),
        "bf16.weights_per_frame": bell[nearest[0]],
        **{f"lora/{key}": tensor for key, tensor in lora.items()},
        **{f"grad/{key}": tensor.grad for key, tensor in lora.items()},
    }  # fmt: skip
    writer.add(
        "lesson", "training", recorded, model_config=MODEL_CONFIG, weights={"main": "weights_grey.safetensors"},
        lora_rank=rank, lora_alpha=alpha, trainable_names=list(lora),
        tolerance={"loss_max_rel": 1e-5, "grad_max_abs": 1e-4},
    )  # fmt: skip
