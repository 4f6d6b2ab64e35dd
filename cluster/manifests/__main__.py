"""``python -m cluster.manifests``: render and check every overlay, print a table, exit 1 on a finding."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.manifests.overlays import check_all
from cluster.manifests.report import report

K8S = Path(__file__).parents[1] / "k8s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.manifests", description=__doc__)
    parser.add_argument(
        "--crds",
        type=Path,
        metavar="DIR",
        help="folder of JSON schemas made from KubeRay's CRDs (default: that check is skipped)",
    )
    parser.add_argument(
        "--k8s", type=Path, metavar="DIR", default=K8S, help="folder that contains overlays/ (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    results = check_all(options.k8s, options.crds)
    print(report(results))
    return int(any(result.findings for result in results))


if __name__ == "__main__":
    sys.exit(main())
