"""What schemas say: of core objects by the ones a package carries, of custom resources by KubeRay's where given."""

import json
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import kubernetes_validate

from cluster.manifests.finding import Finding, Object, Result
from cluster.manifests.objects import title

KUBERNETES = "1.33"
"""Oldest version that we say we work on."""


def core_objects(objects: Sequence[Object]) -> list[Finding]:
    """Objects of Kubernetes itself, unknown keys refused."""
    found = []
    for one in objects:
        if _is_custom(one):
            continue
        try:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            found.append(Finding(title(one), f"{path}: {error.message}"))
        except kubernetes_validate.SchemaNotFoundError:
            found.append(Finding(title(one), f"{one.get('apiVersion')} has no such kind in Kubernetes {KUBERNETES}"))
    return found


def custom_resources(objects: Sequence[Object], crds: Path | None, subject: str) -> Result:
    """Custom resources against the schemas in a folder, ``rayservice-ray.io-v1.schema.json`` and so on."""
    check = "custom-resources-fit-the-crd"
    if crds is None:
        return Result(subject, check, skipped="no CRD schemas given (make manifests CRDS=folder)")
    found: list[Finding] = []
    for one in filter(_is_custom, objects):
        group, _, version = str(one["apiVersion"]).partition("/")
        path = crds / f"{one['kind'].lower()}-{group}-{version}.schema.json"
        if not path.exists():
            return Result(subject, check, tuple(found), skipped=f"no schema {path.name} in the folder of CRD schemas")
        schema = json.loads(path.read_text())
        for error in jsonschema.Draft202012Validator(schema).iter_errors(one):
            found.append(Finding(title(one), f"{'.'.join(map(str, error.path))}: {error.message[:300]}"))
    return Result(subject, check, tuple(found))


def _is_custom(one: Object) -> bool:
    """A group with a dot in it that is not Kubernetes' own."""
    group = str(one.get("apiVersion")).rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io")
