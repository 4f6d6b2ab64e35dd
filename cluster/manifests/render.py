"""Overlays made into objects, by the kustomize inside kubectl."""

import shutil
import subprocess
from pathlib import Path

import yaml

from cluster.manifests.finding import Object


class MissingToolError(Exception):
    """A tool that a check needs is not installed."""


class RenderError(Exception):
    """kustomize refused an overlay."""


def overlays(k8s: Path) -> list[Path]:
    """Folders of the overlays."""
    return sorted(path.parent for path in (k8s / "overlays").glob("*/kustomization.yaml"))


def render(overlay: Path) -> list[Object]:
    """Objects of an overlay, and the Secrets that it expects, from its ``secrets.example.yaml``.

    Raises:
        MissingToolError: there is no kubectl.
        RenderError: the overlay is refused.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise MissingToolError("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RenderError(done.stderr.strip())
    objects = [one for one in yaml.safe_load_all(done.stdout) if one]
    expected = overlay / "secrets.example.yaml"
    return objects + (list(yaml.safe_load_all(expected.read_text())) if expected.exists() else [])
