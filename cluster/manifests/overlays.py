"""All checks of all overlays, the Serve config files and the Dockerfiles."""

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from cluster.manifests import dockerfiles
from cluster.manifests.finding import Finding, Object, Result, apply
from cluster.manifests.objects import title
from cluster.manifests.render import MissingToolError, RenderError, overlays, render
from cluster.manifests.rules import serve_config
from cluster.manifests.rules.all_rules import RULES
from cluster.manifests.schemas import core_objects, custom_resources

_NO_DIGEST = "0" * 64


def check_all(k8s: Path, crds: Path | None = None) -> list[Result]:
    """Every check of the project's manifests.

    Args:
        k8s: folder with ``overlays/``; ``docker/`` is beside it.
        crds: folder of schemas made from KubeRay's CRDs, if there is one.
    """
    results = [result for overlay in overlays(k8s) for result in check_overlay(overlay, crds)]
    results += check_serve_configs()
    return results + check_dockerfiles(k8s.parent / "docker")


def check_overlay(overlay: Path, crds: Path | None = None) -> list[Result]:
    """Render one overlay and apply every rule and schema."""
    try:
        objects = render(overlay)
    except MissingToolError as error:
        return [Result(overlay.name, "render", skipped=str(error))]
    except RenderError as error:
        return [Result(overlay.name, "render", (Finding(overlay.name, str(error)),))]
    to_fill = tuple(sorted(set(_to_fill_in(objects))))
    return [
        Result(overlay.name, "render", notes=to_fill),
        *apply([core_objects], objects, overlay.name),
        custom_resources(objects, crds, overlay.name),
        *apply(RULES, objects, overlay.name),
    ]


def check_serve_configs() -> list[Result]:
    """Every file of configs/serve by the rules of a Serve config."""
    folder = files("configs") / "serve"
    paths = sorted((one for one in folder.iterdir() if one.name.endswith(".yaml")), key=lambda one: one.name)
    objects = [
        serve_config.as_object(one.read_text(), f"configs/serve/{one.name}")
        for one in paths
        if one.name != "kustomization.yaml"
    ]
    return apply(serve_config.RULES, objects, "configs/serve")


def check_dockerfiles(folder: Path) -> list[Result]:
    """Every Dockerfile by the rules of images."""
    texts = {
        path.name: path.read_text() for path in sorted(folder.glob("Dockerfile.*")) if path.suffix != ".dockerignore"
    }
    return [Result("docker", rule.__name__.replace("_", "-"), tuple(rule(texts))) for rule in dockerfiles.RULES]


def _to_fill_in(objects: Sequence[Object]) -> Iterator[str]:
    """What is somebody else's to know: names below example.com, digests of zeros, and empty values of Secrets."""
    for one in objects:
        for line in _lines(one):
            if "example.com" in line:
                yield line
            elif _NO_DIGEST in line:
                yield f"{title(one)}: digests of zeros"
        if one.get("kind") == "Secret":
            texts = (one.get("stringData") or {}).values()
            if any(not text or re.search(r"\w=$", text, re.MULTILINE) for text in texts):
                yield f"{title(one)}: see secrets.example.yaml"


def _lines(value: Any) -> Iterator[str]:
    """Lines of every text in an object."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _lines(key)
            yield from _lines(below)
    elif isinstance(value, list):
        for below in value:
            yield from _lines(below)
    elif isinstance(value, str):
        yield from (line.strip() for line in value.splitlines())
