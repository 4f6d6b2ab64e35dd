"""The overlays as they are: clean, made of the same Serve config files as everything else, and honest about skips."""

import os
from pathlib import Path

import pytest
import yaml

import configs
from cluster.manifests.__main__ import K8S, main
from cluster.manifests.application import deployments
from cluster.manifests.dockerfiles import RULES as IMAGE_RULES
from cluster.manifests.finding import Finding, Result
from cluster.manifests.overlays import check_dockerfiles, check_overlay, check_serve_configs
from cluster.manifests.render import overlays
from cluster.manifests.report import report
from cluster.manifests.schemas import core_objects, custom_resources
from tests.cluster.manifest_objects import cluster, only, overlay, spec

NAMES = ["kind", "production", "production-multi-host", "single-node"]
CONFIGS = Path(next(iter(configs.__path__))) / "serve"
DOCKER = K8S.parent / "docker"


def test_the_overlays_are_these():
    assert [path.name for path in overlays(K8S)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_is_clean(name):
    overlay(name)
    assert [(one.check, one.findings) for one in check_overlay(K8S / "overlays" / name) if one.findings] == []


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_runs_a_serve_config_file_as_it_is(name):
    assert spec(overlay(name))["serveConfigV2"] == (CONFIGS / f"{name}.yaml").read_text()


def test_the_kind_overlay_needs_nothing_filled_in():
    overlay("kind")
    assert [one.notes for one in check_overlay(K8S / "overlays" / "kind") if one.notes] == []


def test_the_multi_host_files_differ_from_production_in_their_gangs_alone():
    one, other = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("production", NAMES[2]))
    for config in (one, other):
        del config["applications"][0]["args"]["denoiser"]
    assert one == other


def test_what_the_application_needs_is_read_as_ray_builds_it():
    found = {one.name: one for one in deployments((CONFIGS / "production.yaml").read_text())}
    assert set(found) == {"Gateway", "Dispatcher", "TextEncoder", "Vae", "Denoiser"}
    gang = found["Denoiser"]
    assert (len(gang.bundles), gang.bundles[0], gang.selector) == (8, {"CPU": 2.0, "GPU": 1.0}, {"role": "denoiser"})
    assert not gang.spread
    assert gang.max_replicas >= gang.min_replicas
    hosts = {one.name: one for one in deployments((CONFIGS / "production-multi-host.yaml").read_text())}
    assert hosts["Denoiser"].spread


def test_what_a_file_says_of_a_deployment_goes_before_the_code():
    config = yaml.safe_load((CONFIGS / "kind.yaml").read_text())
    config["applications"][0]["deployments"] = [
        {"name": "Denoiser", "autoscaling_config": {"min_replicas": 0, "max_replicas": 5}},
        {"name": "Vae", "num_replicas": 3, "ray_actor_options": {"num_cpus": 2}},
    ]
    found = {one.name: one for one in deployments(yaml.safe_dump(config))}
    assert (found["Denoiser"].min_replicas, found["Denoiser"].max_replicas) == (0, 5)
    assert (found["Vae"].max_replicas, found["Vae"].bundles[0]["CPU"]) == (3, 2.0)


def test_every_serve_config_file_is_clean():
    assert [one.findings for one in check_serve_configs() if one.findings] == []


def test_core_objects_are_held_against_kubernetes_own_schemas():
    objects = overlay("kind")
    only(objects, "Service", "postgres")["spec"]["selectors"] = {"app": "postgres"}
    (found,) = core_objects(objects)
    assert found.where == "Service/postgres"
    assert "selectors" in found.message


def test_custom_resources_without_schemas_are_a_named_skip():
    result = custom_resources(overlay("kind"), None, "kind")
    assert result.skipped is not None
    assert "custom-resources-fit-the-crd of kind: no CRD schemas given" in report([result]).splitlines()[-1]


@pytest.mark.skipif("CRDS" not in os.environ, reason="no CRD schemas given (CRDS=folder)")
def test_custom_resources_fit_the_crd_and_a_misspelt_key_does_not():
    folder = Path(os.environ["CRDS"])
    for name in NAMES:
        result = custom_resources(overlay(name), folder, name)
        assert (result.findings, result.skipped) == ((), None)
    objects = overlay("kind")
    cluster(objects)["headGroupSpecs"] = {}
    assert "headGroupSpecs" in custom_resources(objects, folder, "kind").findings[0].message


def test_a_missing_kubectl_is_a_named_skip_and_no_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"render of {', '.join(NAMES)}: kubectl is not installed" in last
    assert ", 4 skipped (" in last


def test_an_overlay_that_cannot_be_rendered_is_a_finding(tmp_path, capsys):
    overlay("kind")
    folder = tmp_path / "overlays" / "bad"
    folder.mkdir(parents=True)
    (folder / "kustomization.yaml").write_text("resources: [nowhere.yaml]\n")
    assert main(["--k8s", str(tmp_path)]) == 1
    assert "bad: render: bad: " in capsys.readouterr().out


def test_the_last_line_counts_what_was_found_and_what_was_skipped():
    results = [
        Result("kind", "one"),
        Result("kind", "two", (Finding("Pod/x", "is wrong"),)),
        Result("production", "three", skipped="promtool is not installed"),
    ]
    lines = report(results).splitlines()
    assert "kind: two: Pod/x: is wrong" in lines
    assert lines[-1] == "3 checks, 1 findings, 1 skipped (three of production: promtool is not installed)"


def test_the_images_are_clean():
    assert sorted(path.name for path in DOCKER.glob("Dockerfile.*[!e]")) == ["Dockerfile.cpu", "Dockerfile.cuda"]
    assert [(one.check, one.findings) for one in check_dockerfiles(DOCKER) if one.findings] == []


BROKEN_IMAGES = {
    "base_images_are_pinned": ("ARG BASE=python:3.11.14-slim-bookworm", "ARG BASE=python:slim"),
    "base_images_agree": ("ARG BASE=python:3.11.14-slim-bookworm", "ARG BASE=python:3.12.1-slim-bookworm"),
    "images_run_unprivileged": ("USER 1000:1000", "USER root"),
    "packages_are_pinned": (" --constraint constraints.txt", ""),
    "images_have_no_weights": ("COPY serve serve", "COPY weights/model.safetensors /models/"),
    "probes_can_run": ("wget", "curl"),
}


@pytest.mark.parametrize("rule", IMAGE_RULES, ids=[rule.__name__ for rule in IMAGE_RULES])
def test_a_broken_image_is_caught_by_the_rule_of_its_name(rule):
    texts = {path.name: path.read_text() for path in DOCKER.glob("Dockerfile.*[!e]")}
    assert rule(texts) == []
    old, new = BROKEN_IMAGES[rule.__name__]
    assert old in texts["Dockerfile.cuda"]
    assert rule(texts | {"Dockerfile.cuda": texts["Dockerfile.cuda"].replace(old, new)})
