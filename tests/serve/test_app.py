import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

import configs
from cluster.ray_scaling import Application, Denoiser
from pusa_dist.errors import ConfigError
from serve import app as app_module
from serve.__main__ import main
from serve.app import ROLES, DispatcherReplica, application, build_app
from serve.config import DenoiserConfig, ServeConfig, require_loopback

SHIPPED = sorted((Path(next(iter(configs.__path__))) / "serve").glob("*.yaml"))
CONFIGS = [path for path in SHIPPED if path.stem != "kustomization"]


def deployments(app):
    """Deployments of an application by name."""
    found, waiting = {}, [app]
    while waiting:
        bound = waiting.pop()._bound_deployment
        found[bound.name] = bound
        waiting += [one for one in (*bound.init_args, *bound.init_kwargs.values()) if hasattr(one, "_bound_deployment")]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_configuration_is_a_serve_config_file_and_builds(path):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (one,) = schema.applications
    assert one.import_path == "serve.app:build_app"
    config = ServeConfig.model_validate(one.args)
    assert set(deployments(build_app(config))) == set(ROLES)
    require_loopback(config, schema.http_options.host)


def test_what_is_shipped():
    shipped = [
        "chaos",
        "debug",
        "kind",
        "loadtest",
        "one-gpu",
        "production-multi-host",
        "production",
        "scale-to-zero",
        "several-nodes",
        "single-node",
        "small-videos",
    ]
    assert [path.stem for path in CONFIGS] == shipped


def test_only_gateway_and_dispatcher_are_given_the_database():
    config = ServeConfig(database_url="postgresql+psycopg://secret/db", artifacts_url="s3://bucket/x")
    given = {name: repr((one.init_args, one.init_kwargs)) for name, one in deployments(build_app(config)).items()}
    assert {name for name, arguments in given.items() if "secret" in arguments} == {"Gateway", "Dispatcher"}
    assert {name for name, arguments in given.items() if "s3://bucket/x" in arguments} >= {"Vae", "Denoiser"}


def test_a_relative_state_folder_is_the_builders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = deployments(build_app(ServeConfig(state_dir="here")))["Dispatcher"].init_args[0]
    assert given.state_dir == str(tmp_path / "here")


def test_neighbouring_ranks_of_a_spread_gang_share_a_node():
    denoiser = {"num_gpus": 1, "num_cpus": 2, "cfg_degree": 2, "ulysses_degree": 4, "spread": True, "ranks_per_node": 4}
    config = ServeConfig.model_validate(
        {"model": "debug", "denoiser": denoiser | {"label_selector": {"role": "denoiser"}}}
    )
    found = deployments(build_app(config))["Denoiser"]._replica_config
    assert found.placement_group_bundles == [{"CPU": 8.0, "GPU": 4.0}] * 2
    assert found.placement_group_bundle_label_selector == [{"role": "denoiser"}] * 2
    assert found.placement_group_strategy == "STRICT_SPREAD"
    assert [config.denoiser.bundle_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_lease_that_renewals_cannot_keep_is_refused():
    DenoiserConfig(resident_lease_s=8.0)
    with pytest.raises(ValueError, match=r"resident_lease_s=7\.9 would run out .*; set 8 or more"):
        DenoiserConfig(resident_lease_s=7.9)


@pytest.mark.parametrize("wrong", [{"spread": True, "ranks_per_node": 3}, {"ranks_per_node": 2}])
def test_ranks_that_do_not_fill_their_nodes_are_refused(wrong):
    with pytest.raises(ValueError, match="ranks_per_node"):
        ServeConfig.model_validate({"denoiser": {"ulysses_degree": 4, **wrong}})


def test_roles_are_placed_by_resources_and_labels():
    config = ServeConfig.model_validate(
        {
            "model": "debug",
            "vae": {"label_selector": {"role": "vae"}, "num_gpus": 1, "max_replicas": 3},
            "text_encoder": {"resources": {"text": 0.5}},
            "denoiser": {
                "label_selector": {"role": "denoiser"}, "num_gpus": 1, "cfg_degree": 2, "spread": True,
                "resources": {"rank": 1}, "max_replicas": 4,
            },
        }
    )  # fmt: skip
    found = deployments(build_app(config))
    assert found["Vae"].ray_actor_options["label_selector"] == {"role": "vae"}
    assert found["Vae"].ray_actor_options["num_gpus"] == 1
    assert found["TextEncoder"].ray_actor_options["resources"] == {"text": 0.5}
    denoiser = found["Denoiser"]._replica_config
    assert denoiser.placement_group_bundles == [{"CPU": 0.1, "GPU": 1, "rank": 1}] * 4
    assert denoiser.placement_group_bundle_label_selector == [{"role": "denoiser"}] * 4
    assert denoiser.placement_group_strategy == "STRICT_SPREAD"
    scaling = found["Vae"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    scaling = found["Denoiser"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.policy.get_policy() is Denoiser
    scaling = found["Dispatcher"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 1)


@pytest.mark.parametrize("most", [None, 2, 8])
def test_no_number_of_decodes_keeps_an_encode_or_a_preview_out(most):
    config = ServeConfig.model_validate({"vae": {"max_replicas": most}})
    assert deployments(build_app(config))["Vae"]._deployment_config.max_ongoing_requests == (most or 1) + 2


def test_the_vae_is_given_as_many_jobs_as_there_are_replicas(monkeypatch):
    states, given = [], []

    def status():
        deployment = SimpleNamespace(replica_states=states.pop(0))
        return SimpleNamespace(applications={"pusa": SimpleNamespace(deployments={"Vae": deployment})})

    async def scenario():
        enough = asyncio.Event()

        def resize(number):
            given.append(number)
            if len(given) == 4:
                enough.set()

        dispatcher = SimpleNamespace(_dispatcher=SimpleNamespace(resize_decoders=resize))
        following = asyncio.create_task(DispatcherReplica._follow_vaes(dispatcher))
        async with asyncio.timeout(20):
            await enough.wait()
        following.cancel()

    monkeypatch.setattr(app_module, "_LOOK_S", 0.001)
    monkeypatch.setattr(app_module.ray_serve, "status", status)
    context = SimpleNamespace(app_name="pusa")
    monkeypatch.setattr(app_module.ray_serve, "get_replica_context", lambda: context)
    # Before the last one, what Serve answers makes no sense: the number stays.
    states += [{"STARTING": 1}, {"RUNNING": 1, "STARTING": 7}, {"RUNNING": 8}, None, {"RUNNING": 2, "STOPPING": 6}]
    asyncio.run(scenario())
    assert given[:4] == [1, 1, 8, 2]


def test_a_role_that_goes_to_zero_has_to_come_back():
    found = deployments(build_app(ServeConfig.model_validate({"vae": {"num_replicas": 0, "max_replicas": 2}})))
    assert found["Vae"]._deployment_config.autoscaling_config.min_replicas == 0
    for wrong in ({"vae": {"num_replicas": 0}}, {"gateway": {"num_replicas": 0, "max_replicas": 2}}):
        with pytest.raises(ValueError, match="num_replicas"):
            ServeConfig.model_validate(wrong)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_configuration_that_autoscales_names_the_policy_and_settings_it_takes(path):
    (one,) = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications
    config = ServeConfig.model_validate(one.args)
    roles = (config.gateway, config.text_encoder, config.vae, config.denoiser)
    assert (one.autoscaling_policy is not None) == any(role.max_replicas is not None for role in roles)
    if one.autoscaling_policy is not None:
        policy = AutoscalingPolicy(**one.autoscaling_policy)
        assert policy.get_policy() is Application
        Application(**policy.policy_kwargs)


def test_zero_replicas_are_refused_where_there_is_no_policy_of_the_application(tmp_path, capsys):
    config = tmp_path / "service.yaml"
    config.write_text("denoiser: {num_replicas: 0, max_replicas: 2}")
    assert main(["--config", str(config), "--state", str(tmp_path / "state")]) == 2
    assert "num_replicas=0 needs an autoscaling policy" in capsys.readouterr().err


def test_a_gang_that_asks_for_nothing_is_refused():
    with pytest.raises(ConfigError, match="a rank must ask for something"):
        application(ServeConfig.model_validate({"denoiser": {"num_cpus": 0}}), lambda: None)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", ""])
def test_without_keys_only_loopback_is_served(host):
    with pytest.raises(ConfigError, match="no keys are asked for"):
        require_loopback(ServeConfig(), host)
    require_loopback(ServeConfig(require_keys=True), host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", None])
def test_loopback_needs_no_keys(host):
    require_loopback(ServeConfig(), host)


def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port), "--state", str(tmp_path / "state")]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "choose another address with --host or --port" in said


def test_the_roles_that_do_not_compute_import_no_torch():
    code = "import sys, serve.app, serve.http.gateway, serve.http.api; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
