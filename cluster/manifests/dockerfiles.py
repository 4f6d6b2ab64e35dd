"""Dockerfiles, line by line: what every image of ours must and must not have."""

import re
from collections.abc import Mapping

from cluster.manifests.finding import Finding

_VERSION = re.compile(r"(\S+):(\d+\.\d+\.\d+\S*)|\S+@sha256:[0-9a-f]{64}")
_WEIGHTS = re.compile(r"\.(safetensors|pth|pt|ckpt|bin)\b|huggingface|/models\b")


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined and comments left out."""
    lines = re.sub(r"\\\n", " ", "\n".join(one for one in text.splitlines() if not one.lstrip().startswith("#")))
    return [
        (word.upper(), rest.strip())
        for line in lines.splitlines()
        if line.strip()
        for word, _, rest in [line.strip().partition(" ")]
    ]


def base_images_are_pinned(files: Mapping[str, str]) -> list[Finding]:
    """The version of the base is in its tag, or it is a digest."""
    return [
        Finding(name, f"FROM {base} has no full version")
        for name, text in files.items()
        for base in _bases(text)
        if not _VERSION.fullmatch(base)
    ]


def base_images_agree(files: Mapping[str, str]) -> list[Finding]:
    """Ray wants the same Python on all nodes of a cluster."""
    bases = {name: _bases(text) for name, text in files.items()}
    different = {base for each in bases.values() for base in each}
    return (
        [Finding(", ".join(sorted(files)), f"different bases: {', '.join(sorted(different))}")]
        if len(different) > 1
        else []
    )


def images_run_unprivileged(files: Mapping[str, str]) -> list[Finding]:
    """The last USER is a number other than 0: Kubernetes cannot tell whether a name is root."""
    found = []
    for name, text in files.items():
        users = [rest for word, rest in instructions(text) if word == "USER"]
        if not users or not re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1]):
            found.append(Finding(name, "the last USER must be a number other than 0"))
    return found


def packages_are_pinned(files: Mapping[str, str]) -> list[Finding]:
    """Every pip install is held to .ci/constraints.txt."""
    return [
        Finding(name, f"pip install without the constraints: {rest[:60]}")
        for name, text in files.items()
        for word, rest in instructions(text)
        if word == "RUN" and "pip install" in rest and "--constraint" not in rest
    ]


def images_have_no_weights(files: Mapping[str, str]) -> list[Finding]:
    """Weights are fetched to the node, once for all images."""
    return [
        Finding(name, f"{word} {rest[:60]} looks like weights")
        for name, text in files.items()
        for word, rest in instructions(text)
        if word in ("ADD", "COPY", "RUN") and _WEIGHTS.search(rest)
    ]


def probes_can_run(files: Mapping[str, str]) -> list[Finding]:
    """The operator's probes are bash and wget in the container."""
    return [
        Finding(name, "wget is not installed; the operator's probes use it")
        for name, text in files.items()
        if not any(word == "RUN" and "wget" in rest for word, rest in instructions(text))
    ]


def _bases(text: str) -> list[str]:
    """Images of FROM that are not stages before it, with the defaults of their arguments."""
    defaults: dict[str, str] = {}
    stages: set[str] = set()
    bases = []
    for word, rest in instructions(text):
        if word == "ARG":
            name, _, value = rest.partition("=")
            defaults[name] = value
        elif word == "FROM":
            image, *alias = rest.split()
            image = re.sub(r"\$\{?(\w+)\}?", lambda found: defaults.get(found[1], ""), image)
            if image not in stages:
                bases.append(image)
            stages.update(alias[1:])
    return bases


RULES = (
    base_images_are_pinned,
    base_images_agree,
    images_run_unprivileged,
    packages_are_pinned,
    images_have_no_weights,
    probes_can_run,
)
