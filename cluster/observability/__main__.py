"""``python -m cluster.observability``: write what Prometheus and Grafana read beside this file.

``--check`` writes nothing, and fails if a file is not what it would write.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from cluster.observability.grafana import dashboard_json
from cluster.observability.panels import DASHBOARDS
from cluster.observability.rules import rule_file, runbook_table

FOLDER = Path(__file__).parent
_NOTE = "# Made by python -m cluster.observability from cluster/observability/rules.py.\n"


def files() -> Iterator[tuple[Path, str]]:
    """Every file and what belongs in it."""
    yield FOLDER / "rules.yaml", _NOTE + yaml.safe_dump(rule_file(), sort_keys=False, width=110)
    yield FOLDER / "alerts.md", runbook_table()
    for dashboard in DASHBOARDS:
        name = f"{dashboard.uid.removeprefix('pusa-')}.json"
        yield FOLDER / "dashboards" / name, json.dumps(dashboard_json(dashboard), indent=1) + "\n"


def main() -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.observability", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    check = parser.parse_args().check
    stale = [path for path, text in files() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(FOLDER)} {'is out of date' if check else 'written'}")
    if check:
        return int(bool(stale))
    for path, text in files():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
