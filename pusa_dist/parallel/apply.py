"""Turn a plain transformer into this rank's share of a gang's."""

from typing import Literal

from torch.distributed.device_mesh import DeviceMesh

from pusa_dist.config import check_heads
from pusa_dist.errors import ConfigError
from pusa_dist.model.transformer import VectorTimestepTransformer
from pusa_dist.parallel.attention import SequenceAttention
from pusa_dist.parallel.shard import SequenceShard

AttentionBackend = Literal["ours", "xfuser"]


def parallelize(
    model: VectorTimestepTransformer, mesh: DeviceMesh, attention: AttentionBackend = "ours"
) -> VectorTimestepTransformer:
    """Spread the model's tokens and self-attention over the mesh, in place.

    Every rank keeps all weights; afterwards ``model(...)`` is collective over the ring and ulysses
    axes, takes whole latents and returns whole velocities. A mesh of one rank runs the same code.

    Args:
        model: loaded, on this rank's device.
        mesh: axes (cfg, ring, ulysses).
        attention: "ours", or "xfuser" for its USP where shards are even (extra ``cuda``).

    Returns:
        ``model``.

    Raises:
        ConfigError: the heads cannot be shared so; or xfuser cannot be used here, or differs from ours.
    """
    shard = SequenceShard(mesh.get_group("ring"), mesh.get_group("ulysses"))
    heads = model.config["num_attention_heads"]
    check_heads(shard.ulysses_degree, heads)
    model.token_shard = shard
    ours = SequenceAttention(shard)
    if attention == "ours":
        model.attention = ours
    elif attention == "xfuser":
        # Imported only here: importing xfuser needs an accelerator.
        from pusa_dist.parallel.xfuser_usp import admitted_usp

        like = model.proj_out.weight
        model.attention = admitted_usp(mesh, ours, heads, model.config["attention_head_dim"], like)
    else:
        raise ConfigError(f"attention={attention!r}: use ours or xfuser")
    return model
