"""``python -m cluster.quality``: measure two served models on the same pairs, print and keep the table."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx

from cluster.local_service import local_service
from cluster.orders import served_model
from cluster.quality.run import adaptation_cost, answers, grid
from cluster.quality.table import Row, markdown, rows
from cluster.quality.tasks import TASKS, Pair, held_out_pairs, questions

LEAST_PAIRS = 256
FIRST_SEED = 20_000
SERVICE_CONFIG = str(files("configs") / "serve" / "small-videos.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; exit code 1 unless every requirement is reached."""
    options = _parser().parse_args(argv)
    pairs = held_out_pairs(options.pairs, options.first_seed)
    text_pairs = held_out_pairs(options.text_pairs or options.pairs, options.first_seed)
    tasks = [task for task in TASKS if not options.task or task.name in options.task]
    began = time.monotonic()
    models, outcomes = {}, {}
    for column in ("base", "adapted"):
        name, url = getattr(options, column), getattr(options, f"{column}_url")
        with _service(name, url, options.config) as client:
            models[column] = served_model(client)
            print(f"{models[column]['id']}, revision {models[column]['pusa']['revision']}", file=sys.stderr)
            outcomes[column], pictures = answers(client, questions(pairs, text_pairs, tasks), options.in_flight)
        for task, frames in pictures.items():
            path = options.out / models[column]["id"] / f"{task}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid(frames).save(path)
    table = rows(outcomes["base"], outcomes["adapted"], adaptation_cost(models["adapted"]["id"]))
    facts = _facts(models, pairs, text_pairs, time.monotonic() - began)
    _write(options.out, table, facts, outcomes)
    print(_report(table, facts))
    return int(any(row.verdict not in (None, "reached") for row in table))


@contextmanager
def _service(model: str, url: str | None, config: str) -> Iterator[httpx.Client]:
    """A client of the given service, or of one of our own for as long as it is needed."""
    transport = httpx.HTTPTransport(retries=3)
    if url is not None:
        with httpx.Client(base_url=url, timeout=60, transport=transport) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="pusa-quality-") as state:
        print(f"starting the service with {model} ...", file=sys.stderr)
        with (
            local_service(model, Path(state), ["--config", config]) as own,
            httpx.Client(base_url=own, timeout=60, transport=transport) as client,
        ):
            yield client


def _facts(
    models: dict[str, dict[str, Any]], pairs: Sequence[Pair], text_pairs: Sequence[Pair], seconds: float
) -> dict[str, Any]:
    return {
        "models": {column: {"id": model["id"], **model["pusa"]} for column, model in models.items()},
        "pairs": len(pairs),
        "text_pairs": len(text_pairs),
        "first_seed": pairs[0].seed,
        "distinct_prompts": len({pair.prompt for pair in pairs}),
        "seconds": round(seconds),
    }


def _write(out: Path, table: Sequence[Row], facts: dict[str, Any], outcomes: dict[str, Any]) -> None:
    """``quality.md`` for people, ``quality.json`` with every answer's outcome for machines."""
    out.mkdir(parents=True, exist_ok=True)
    judged = [
        {**asdict(row), "verdict": row.verdict, "verdicts": [str(one) for one in row.requirements]} for row in table
    ]
    (out / "quality.json").write_text(json.dumps({**facts, "rows": judged, "outcomes": outcomes}, indent=1) + "\n")
    (out / "quality.md").write_text(_report(table, facts))


def _report(table: Sequence[Row], facts: dict[str, Any]) -> str:
    models = " and ".join(f"`{one['id']}` (revision {one['revision']})" for one in facts["models"].values())
    few = min(facts["pairs"], facts["text_pairs"]) < LEAST_PAIRS
    return (
        f"{models}: {facts['pairs']} held-out pairs of scene and seed ({facts['text_pairs']} for text-to-video), the "
        f"same for both, seeds from {facts['first_seed']}, {facts['distinct_prompts']} distinct prompts. "
        f"95 % intervals in brackets; {facts['seconds']} s in all."
        f"{f' Fewer than {LEAST_PAIRS} pairs: a look, not a measurement.' if few else ''}\n\n{markdown(table)}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.quality", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", type=int, default=LEAST_PAIRS, help="pairs of scene and seed for each row (default: %(default)s)"
    )
    parser.add_argument("--text-pairs", type=int, help="pairs for text-to-video (default: as many as --pairs)")
    parser.add_argument(
        "--task",
        action="append",
        choices=[task.name for task in TASKS],
        help="measure only this task; may be given several times",
    )
    parser.add_argument(
        "--first-seed", type=int, default=FIRST_SEED, help="seed of the first pair (default: %(default)s)"
    )
    parser.add_argument("--base", default="tiny-base", help="model of the table's first column (default: %(default)s)")
    parser.add_argument("--adapted", default="tiny", help="model of the table's second column (default: %(default)s)")
    parser.add_argument("--base-url", help="a running service with the first model, instead of one started here")
    parser.add_argument("--adapted-url", help="a running service with the second model, likewise")
    parser.add_argument("--in-flight", type=int, default=6, help="jobs in flight at once (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/quality"), help="folder of the report (default: %(default)s)"
    )
    parser.add_argument(
        "--config", default=SERVICE_CONFIG, help="Serve config file of the services started here (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
