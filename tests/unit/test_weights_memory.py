"""What weights take on a rank: by shapes, by hand, and by what is really allocated."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pusa_dist import experts, load_model_config
from pusa_dist.checkpoint import memory
from pusa_dist.checkpoint.lora import PUSA_RANK, build_lora, lora_rank
from pusa_dist.checkpoint.memory import GIB, check_device_memory, free_host_memory, weights_memory
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import LoraConfig, WeightsConfig, model_names
from pusa_dist.errors import ConfigError
from pusa_dist.experts import Experts

ONE, TWO = load_model_config("pusa-v1-14b"), load_model_config("pusa-v1-wan2.2-a14b")
GB80 = 79 * GIB


def test_what_the_published_models_take():
    one = weights_memory(ONE, "bf16")
    assert one.base == 14_288_491_584 * 2
    assert one.lora == 40 * 512 * (8 * (5120 + 5120) + 2 * (5120 + 13824)) * 2
    assert one.pristine == 40 * (8 * 5120 * 5120 + 2 * 5120 * 13824) * 2
    assert (one.device, one.host) == (one.base + one.lora + one.pristine, 0)
    assert round(one.device / GIB, 1) == 57.4
    assert weights_memory(ONE, "fp32").device == 2 * one.device


@pytest.mark.parametrize("name", model_names())
def test_weights_are_counted_without_making_a_transformer(name):
    model = load_model_config(name)
    made = weights_memory(model, "fp32")
    assert 4 * model.num_weights == made.experts * (made.base + made.pristine)


def test_two_experts_fit_80_gb_with_their_pristine_weights_on_the_host():
    on_host = weights_memory(TWO, "bf16")
    on_device = weights_memory(replace(TWO, pristine_weights="device"), "bf16")
    assert round(on_device.device / GIB, 1) == 114.7
    assert (round(on_host.device / GIB, 1), round(on_host.host / GIB, 1)) == (62.4, 52.3)
    assert on_device.device == on_host.device + on_host.host
    check_device_memory(on_host, GB80, GB80)
    with pytest.raises(ConfigError, match=r"need 114\.7 GiB .* has 79\.0 GiB, 78\.0 GiB .* set pristine_weights: host"):
        check_device_memory(on_device, GB80 - GIB, GB80)


def test_the_other_place_is_advised_only_where_it_helps():
    for model in (TWO, replace(TWO, pristine_weights="device"), load_model_config("tiny-base")):
        with pytest.raises(ConfigError, match="use a device with more memory") as caught:
            check_device_memory(weights_memory(model, "bf16"), 2**20, 40 * GIB)
        assert "pristine_weights" not in str(caught.value)


@pytest.mark.parametrize("pristine", ["device", "host"])
def test_what_is_worked_out_is_what_is_there(pristine):
    model = replace(load_model_config("debug-two-expert"), pristine_weights=pristine)
    found = 0
    for expert in model.experts:
        transformer = build_transformer(model, expert, device="cpu", precision="fp32")
        lora = build_lora(model, expert, transformer)
        found += sum(p.nbytes for p in transformer.parameters())
        found += sum(part.up.nbytes + part.down.nbytes + part.pristine.nbytes for part in lora._adapted)
    worked_out = weights_memory(model, "fp32")
    assert worked_out.device + worked_out.host == found
    assert (worked_out.host > 0) == (pristine == "host")


def test_the_rank_of_a_lora_is_its_files_or_pusas_if_there_is_none(tmp_path):
    lora = LoraConfig(alpha={"main": 1.4}, files={"main": "lora.safetensors"})
    model = replace(load_model_config("debug"), lora=lora, weights=WeightsConfig(root=str(tmp_path)))
    assert lora_rank(model) == PUSA_RANK
    halves = {"lora_A": torch.zeros(7, 96), "lora_B": torch.zeros(96, 7)}
    save_file({f"blocks.0.self_attn.q.{half}.weight": x for half, x in halves.items()}, tmp_path / "lora.safetensors")
    assert lora_rank(model) == 7
    assert weights_memory(load_model_config("tiny-base"), "bf16").rank == 0


class Mesh:
    def get_group(self, axis):
        return axis


@pytest.fixture
def nothing_is_read(monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(experts, "build_transformer", read)


@pytest.mark.usefixtures("nothing_is_read")
def test_on_a_gpu_the_device_is_asked_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(experts, "free_memory", lambda device: (5 * GIB, GB80))
    with pytest.raises(ConfigError, match=r"pusa-v1-14b: its weights need 57\.4 GiB .* 5\.0 GiB of them free"):
        Experts(ONE, Mesh(), device="cuda:0")


@pytest.mark.usefixtures("nothing_is_read")
def test_copies_on_the_host_are_counted_for_every_rank_of_the_machine_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(experts, "free_memory", lambda device: (GB80, GB80))
    monkeypatch.setattr(experts, "free_host_memory", lambda: 256 * GIB)
    monkeypatch.setattr(experts, "num_ranks_here", lambda: 8)
    with pytest.raises(ConfigError, match=r"pristine_weights=host needs 52\.3 GiB .* 418\.8 GiB for 8; 256\.0 GiB can"):
        Experts(TWO, Mesh(), device="cuda:0")
    monkeypatch.setattr(experts, "num_ranks_here", lambda: 4)
    with pytest.raises(AssertionError, match="weights were read"):
        Experts(TWO, Mesh(), device="cuda:0")


@pytest.mark.parametrize(("limit", "free"), [("max", 8 * GIB), (str(3 * GIB), 3 * GIB), (str(2**63 - 4096), 8 * GIB)])
def test_what_can_be_had_of_the_host_is_what_is_available_within_the_containers_limit(
    tmp_path, monkeypatch, limit, free
):
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 * 2**20} kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINER_LIMITS", (tmp_path / "memory.max", tmp_path / "absent"))
    assert free_host_memory() == free
