"""A dashboard as Grafana's JSON: two panels a row, Prometheus as a variable of the dashboard."""

from typing import Any

from cluster.observability.panels import Dashboard, Panel

_WIDTH, _HEIGHT = 12, 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana imports, or a ConfigMap with the label ``grafana_dashboard`` provides."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["pusa"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "links": [{"type": "dashboards", "tags": ["pusa"], "title": "Pusa", "asDropdown": False}],
        "panels": [_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, 2)
    described = {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }
    words = " ".join(part for part in (panel.meaning, panel.why_empty) if part)
    return {**described, "description": words} if words else described
