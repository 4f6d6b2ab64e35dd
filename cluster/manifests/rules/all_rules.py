"""All rules, in the order of the table."""

from cluster.manifests.finding import Rule
from cluster.manifests.rules import (
    cluster,
    groups,
    network,
    placement,
    pods,
    references,
    security,
    serve_config,
    service,
    weights,
)

RULES: tuple[Rule, ...] = (
    *service.RULES,
    *cluster.RULES,
    *groups.RULES,
    *pods.RULES,
    *security.RULES,
    *network.RULES,
    *references.RULES,
    *serve_config.RULES,
    *placement.RULES,
    *weights.RULES,
)
