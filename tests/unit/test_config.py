from dataclasses import replace
from importlib.resources import files

import pytest
import yaml

from pusa_dist import ConfigError, ParallelConfig, load_model_config
from pusa_dist.config import ModelConfig, from_mapping, model_names
from pusa_dist.geometry import num_frames_within, num_latent_frames, num_pixel_frames, shard_sizes, tokens_per_frame


def debug_values():
    return yaml.safe_load((files("configs") / "model" / "debug.yaml").read_text())


@pytest.mark.parametrize("name", model_names())
def test_every_shipped_model_loads_under_its_own_name(name):
    assert load_model_config(name).name == name


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(ConfigError, match="debug-two-expert"):
        load_model_config("wan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, "unknown setting nmae"),
        ({"limits": {"max_frames": 5}}, "missing setting max_tokens"),
        ({"transformer": "big"}, "expected a mapping"),
        ({"precision": "fp8"}, "precision='fp8': use fp32 or bf16"),
        ({"pristine_weights": "cpu"}, "pristine_weights='cpu': use device or host"),
        ({"revision": 1}, "revision=1: expected str"),
        ({"limits": {"max_frames": "5", "max_tokens": 9}}, r"limits\.max_frames='5': expected int"),
        ({"boundary": "1e-6"}, "boundary='1e-6': expected float"),
        ({"experts": "high"}, r"experts='high': expected tuple\[str, \.\.\.\]"),
        ({"vae": {"tile": [30]}}, r"vae\.tile=\[30\]: expected tuple\[int, int\]"),
        ({"lora": {"rank": True, "alpha": {"main": 1.0}}}, r"lora\.rank=True: expected int"),
        ({"lora": {"rank": 2, "alpha": {"main": "strong"}}}, r"lora\.alpha\.main='strong': expected float"),
        ({"experts": ["a", "b", "c"]}, "high-noise then low-noise"),
        ({"lora": {"rank": 2, "alpha": {"high": 1.0}}}, "lora alpha names"),
        ({"weights": {}}, "either seed"),
        ({"defaults": {"width": 100, "height": 96, "num_frames": 17, "fps": 8}}, "multiples of 16"),
    ],
)
def test_an_impossible_model_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(ModelConfig, {**debug_values(), **change}, "test")


def test_the_folder_of_weights_can_be_overridden_where_there_is_one():
    assert load_model_config("pusa-v1-14b", "/elsewhere").weights.root == "/elsewhere"
    with pytest.raises(ConfigError, match="draws its weights from a seed"):
        load_model_config("debug", "/elsewhere")


def test_an_unreadable_configuration_is_refused_by_name(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("name: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_model_config(str(path))
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_model_config(str(tmp_path / "absent.yaml"))


def test_with_a_distilled_lora_guidance_is_off_unless_the_file_says_otherwise(tmp_path):
    path = tmp_path / "distilled.yaml"
    distilled = {**debug_values(), "distill_lora": {"alpha": {"main": 1.0}, "files": {"main": "x"}}}
    path.write_text(yaml.safe_dump(distilled))
    assert load_model_config(str(path)).defaults.guidance_scale == 1.0
    distilled["defaults"]["guidance_scale"] = 2.5
    path.write_text(yaml.safe_dump(distilled))
    assert load_model_config(str(path)).defaults.guidance_scale == 2.5
    assert load_model_config("debug").defaults.guidance_scale == 5.0


def test_a_head_dim_that_rotary_embedding_cannot_split_is_refused():
    values = debug_values()
    values["transformer"]["attention_head_dim"] = 16
    with pytest.raises(ConfigError, match="attention_head_dim=16"):
        from_mapping(ModelConfig, values, "test")


def test_degrees_that_do_not_divide_name_those_that_do():
    with pytest.raises(ConfigError, match="use one of 1, 2, 4"):
        ParallelConfig(ulysses_degree=3).check(load_model_config("debug"))
    with pytest.raises(ConfigError, match="1, 2, 4, 5, 8, 10, 20, 40"):
        ParallelConfig(ulysses_degree=16).check(load_model_config("pusa-v1-14b"))
    with pytest.raises(ConfigError, match="cfg_degree=3"):
        ParallelConfig(cfg_degree=3)
    with pytest.raises(ConfigError, match="at least 1"):
        ParallelConfig(ring_degree=0)
    with pytest.raises(ConfigError, match="at most 48"):
        ParallelConfig(ring_degree=64).check(load_model_config("debug"))


def test_precision_follows_the_device_unless_the_model_says():
    model = load_model_config("debug")
    assert model.precision_on("cpu") == "fp32"
    assert model.precision_on("cuda") == "bf16"
    assert replace(model, precision="bf16").precision_on("cpu") == "bf16"


def test_geometry():
    assert num_latent_frames(81) == 21
    assert num_pixel_frames(21) == 81
    assert tokens_per_frame(480, 832) * 21 == 32760
    assert shard_sizes(7, 3) == (3, 2, 2)
    assert num_frames_within(4.0, 24) == 93
    assert num_frames_within(0.01, 24) == 1
