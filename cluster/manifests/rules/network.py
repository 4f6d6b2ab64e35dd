"""Who may talk to whom, and who may be taken away when."""

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import Pods, dig, of_kind, ray_pods, title
from cluster.manifests.selectors import selects

SERVE_PORT = 8000
_CODE_PORTS = (8265, 10001, 6379)
"""Dashboard, client, GCS: whoever reaches one can run code, but for the token."""


def everything_is_denied_first(objects: Sequence[Object]) -> list[Finding]:
    """A policy that selects every pod and allows nothing: what no other allows does not happen."""
    for one in of_kind(objects, "NetworkPolicy"):
        spec = one["spec"]
        both = {"Ingress", "Egress"} <= set(spec.get("policyTypes") or [])
        if not spec.get("podSelector") and both and not spec.get("ingress") and not spec.get("egress"):
            return []
    return [Finding("NetworkPolicy", "none denies all ingress and egress of every pod")]


def names_resolve(objects: Sequence[Object]) -> list[Finding]:
    """Every pod may ask for names."""
    return [
        Finding(pods.where, "no NetworkPolicy lets it ask for names (UDP 53)")
        for pods in ray_pods(objects)
        if not any(
            _opens(rule, 53, pods) and (_outside(rule) or not rule.get("to"))
            for rule, _ in _rules(objects, "egress", pods)
        )
    ]


def ray_talks_to_ray(objects: Sequence[Object]) -> list[Finding]:
    """On every port, in both directions: most are chosen when a process starts."""
    everyone = ray_pods(objects)
    return [
        Finding(pods.where, f"no NetworkPolicy lets it talk to {other.where} on every port ({way})")
        for pods in everyone
        for way, ends in (("ingress", "from"), ("egress", "to"))
        for other in everyone
        if not any(
            not rule.get("ports") and any(_is_peer(peer, other) for peer in rule.get(ends) or [])
            for rule, _ in _rules(objects, way, pods)
        )
    ]


def clients_reach_serve(objects: Sequence[Object]) -> list[Finding]:
    """Somebody outside the namespace may reach the HTTP port of every Ray pod: any of them may have a proxy."""
    return [
        Finding(pods.where, f"no NetworkPolicy lets another namespace reach port {SERVE_PORT}")
        for pods in ray_pods(objects)
        if not pods.is_head
        and not any(_opens(rule, SERVE_PORT, pods) and _outside(rule) for rule, _ in _rules(objects, "ingress", pods))
    ]


def dashboard_is_closed(objects: Sequence[Object]) -> list[Finding]:
    """Dashboard, client port and GCS are for Ray's own pods; the dashboard also for the operator, in its namespace."""
    found = []
    for pods in ray_pods(objects):
        for rule, name in _rules(objects, "ingress", pods):
            if all(_is_ray(peer) for peer in rule.get("from") or [{}]):
                continue
            by_operator = all(_names_one_namespace(peer) for peer in rule.get("from") or [{}])
            found += [
                Finding(f"NetworkPolicy/{name}", f"opens port {port} of {pods.where} to others than Ray's pods")
                for port in _CODE_PORTS
                if _opens(rule, port, pods) and not (port == 8265 and by_operator)
            ]
    return found


def operator_reaches_the_head(objects: Sequence[Object]) -> list[Finding]:
    """The operator gives the head its Serve config through the dashboard's port."""
    return [
        Finding(pods.where, "no NetworkPolicy lets the operator's namespace reach port 8265")
        for pods in ray_pods(objects)
        if pods.is_head
        and not any(_opens(rule, 8265, pods) and _outside(rule) for rule, _ in _rules(objects, "ingress", pods))
    ]


def budgets_are_whole_numbers(objects: Sequence[Object]) -> list[Finding]:
    """Nothing that owns Ray's pods has a scale, so percentages and maxUnavailable never allow anything."""
    return [
        Finding(title(one), "only an integer minAvailable works for pods of a Ray cluster")
        for one in of_kind(objects, "PodDisruptionBudget")
        if not isinstance(dig(one, "spec", "minAvailable"), int) or "maxUnavailable" in one["spec"]
    ]


def budgets_leave_room(objects: Sequence[Object]) -> list[Finding]:
    """A budget for all the pods there are keeps their machines from ever being drained."""
    found = []
    for one in of_kind(objects, "PodDisruptionBudget"):
        least = sum(pods.min_pods for pods in _selected(objects, one))
        wanted = dig(one, "spec", "minAvailable")
        if isinstance(wanted, int) and 0 < least <= wanted:
            found.append(Finding(title(one), f"minAvailable={wanted}, but there may be only {least} pods"))
    return found


def _selected(objects: Sequence[Object], budget: Object) -> list[Pods]:
    return [pods for pods in ray_pods(objects) if selects(dig(budget, "spec", "selector"), pods.labels)]


def _rules(objects: Sequence[Object], way: str, pods: Pods) -> Iterator[tuple[dict[str, Any], str]]:
    """Rules of one direction that hold for these pods, with their policy's name."""
    for one in of_kind(objects, "NetworkPolicy"):
        if selects(one["spec"].get("podSelector"), pods.labels):
            yield from ((rule, dig(one, "metadata", "name")) for rule in one["spec"].get(way) or [])


def _opens(rule: dict[str, Any], port: int, pods: Pods) -> bool:
    named = {one.get("name"): one.get("containerPort") for one in pods.ray.get("ports") or []}
    ports = rule.get("ports") or []
    return not ports or any(named.get(one.get("port"), one.get("port")) == port for one in ports)


def _is_peer(peer: dict[str, Any], pods: Pods) -> bool:
    return "podSelector" in peer and "namespaceSelector" not in peer and selects(peer["podSelector"], pods.labels)


def _is_ray(peer: dict[str, Any]) -> bool:
    labels = dig(peer, "podSelector", "matchLabels", default={})
    return "namespaceSelector" not in peer and labels.get("ray.io/is-ray-node") == "yes"


def _names_one_namespace(peer: dict[str, Any]) -> bool:
    return "kubernetes.io/metadata.name" in dig(peer, "namespaceSelector", "matchLabels", default={})


def _outside(rule: dict[str, Any]) -> bool:
    return any(
        "namespaceSelector" in peer or "ipBlock" in peer
        for peer in [*(rule.get("from") or []), *(rule.get("to") or [])]
    )


RULES = (
    everything_is_denied_first,
    names_resolve,
    ray_talks_to_ray,
    clients_reach_serve,
    dashboard_is_closed,
    operator_reaches_the_head,
    budgets_are_whole_numbers,
    budgets_leave_room,
)
