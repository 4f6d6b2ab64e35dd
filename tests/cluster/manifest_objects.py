"""Overlays rendered once, and the parts of them that tests change."""

import copy
import functools
import shutil
from pathlib import Path

import pytest
import yaml

from cluster.manifests.render import render

K8S = Path(__file__).parents[2] / "cluster" / "k8s"


@functools.cache
def _rendered(name):
    return render(K8S / "overlays" / name)


def overlay(name):
    """A copy of an overlay's objects."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    return copy.deepcopy(_rendered(name))


def only(objects, kind, name=None):
    """The object of a kind and name."""
    (found,) = [one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    return found


def spec(objects):
    """The RayService's."""
    return only(objects, "RayService")["spec"]


def cluster(objects):
    """The Ray cluster's."""
    return spec(objects)["rayClusterConfig"]


def group(objects, name):
    """A worker group, or the head's for ``head``."""
    if name == "head":
        return cluster(objects)["headGroupSpec"]
    (found,) = [one for one in cluster(objects)["workerGroupSpecs"] if one["groupName"] == name]
    return found


def pod(objects, name):
    """The pod of a group."""
    return group(objects, name)["template"]["spec"]


def ray(objects, name):
    """The Ray container of a group."""
    return pod(objects, name)["containers"][0]


def named(values, name):
    """The one of that name in a list of mappings."""
    (found,) = [one for one in values if one["name"] == name]
    return found


def change_config(objects, change):
    """Change the Serve config, in the RayService and in the file that it comes from."""
    config = yaml.safe_load(spec(objects)["serveConfigV2"])
    change(config)
    text = yaml.safe_dump(config)
    only(objects, "ConfigMap", "serve-configs")["data"]["changed.yaml"] = text
    spec(objects)["serveConfigV2"] = text


def change_args(objects, change):
    """Change the application's arguments."""
    change_config(objects, lambda config: change(config["applications"][0]["args"]))


def remove(objects, kind, name):
    """Leave an object out."""
    objects.remove(only(objects, kind, name))
