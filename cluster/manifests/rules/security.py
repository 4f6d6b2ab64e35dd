"""What a pod may not do, and who may see what."""

import re
from collections.abc import Sequence

from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import (
    CLUSTER_SCOPED,
    all_containers,
    all_pods,
    cluster_of,
    dig,
    of_kind,
    ray_services,
    title,
)

_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|API_KEY|CREDENTIAL")
_HOST = ("hostNetwork", "hostPID", "hostIPC")


def namespace_is_restricted(objects: Sequence[Object]) -> list[Finding]:
    """Kubernetes itself then refuses a pod that may do more than it must."""
    return [
        Finding(title(one), "label pod-security.kubernetes.io/enforce must be restricted")
        for one in of_kind(objects, "Namespace")
        if dig(one, "metadata", "labels", "pod-security.kubernetes.io/enforce") != "restricted"
    ]


def namespaces_agree(objects: Sequence[Object]) -> list[Finding]:
    """Every object lies in the namespace that comes with it: names are looked up in it."""
    ours = {dig(one, "metadata", "name") for one in of_kind(objects, "Namespace")}
    return [
        Finding(title(one), f"namespace is {dig(one, 'metadata', 'namespace')}; use {', '.join(sorted(ours))}")
        for one in objects
        if one.get("kind") not in CLUSTER_SCOPED and dig(one, "metadata", "namespace") not in ours
    ]


def pods_are_unprivileged(objects: Sequence[Object]) -> list[Finding]:
    """What the restricted profile asks of pods and containers, Ray's autoscaler among them."""
    found = []
    for pods in all_pods(objects):
        context = pods.spec.get("securityContext") or {}
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") in (None, 0):
            found.append(Finding(pods.where, "securityContext: runAsNonRoot: true and a runAsUser that is not 0"))
        if dig(context, "seccompProfile", "type") != "RuntimeDefault":
            found.append(Finding(pods.where, "securityContext.seccompProfile.type must be RuntimeDefault"))
    return found + [
        Finding(where, "securityContext: allowPrivilegeEscalation: false and capabilities: {drop: [ALL]}")
        for where, container in all_containers(objects)
        for context in [container.get("securityContext") or {}]
        if context.get("allowPrivilegeEscalation") is not False
        or dig(context, "capabilities", "drop") != ["ALL"]
        or context.get("privileged")
    ]


def pods_leave_the_host_alone(objects: Sequence[Object]) -> list[Finding]:
    """No folders, network or processes of the machine."""
    return [
        Finding(pods.where, f"{what} is not allowed")
        for pods in all_pods(objects)
        for what in [
            *(name for name in _HOST if pods.spec.get(name)),
            *(f"hostPath volume {one['name']}" for one in pods.spec.get("volumes") or [] if "hostPath" in one),
        ]
    ]


def workers_have_no_token(objects: Sequence[Object]) -> list[Finding]:
    """Only the head, whose autoscaler makes pods, talks to the API server."""
    autoscaled = any(cluster_of(one).get("enableInTreeAutoscaling") for one in ray_services(objects))
    return [
        Finding(pods.where, "automountServiceAccountToken must be false")
        for pods in all_pods(objects)
        if not (pods.is_head and autoscaled) and pods.spec.get("automountServiceAccountToken") is not False
    ]


def secrets_are_files(objects: Sequence[Object]) -> list[Finding]:
    """A mounted file is read again; a variable is seen by every process, and changing it is a new cluster."""
    found = []
    for pods in all_pods(objects):
        for container in pods.all_containers:
            where = f"{pods.where} {container.get('name')}"
            found += [
                Finding(where, f"variable {one['name']} holds a secret; mount it as a file")
                for one in container.get("env") or []
                if dig(one, "valueFrom", "secretKeyRef")
                or (_SECRET_NAME.search(one["name"]) and not one["name"].endswith("_FILE"))
            ]
            found += [
                Finding(where, "envFrom a Secret; mount it as a file")
                for one in container.get("envFrom") or []
                if "secretRef" in one
            ]
    return found


RULES = (
    namespace_is_restricted,
    namespaces_agree,
    pods_are_unprivileged,
    pods_leave_the_host_alone,
    workers_have_no_token,
    secrets_are_files,
)
