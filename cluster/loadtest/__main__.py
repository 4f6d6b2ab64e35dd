"""``make loadtest``: open-loop load on a service, a report of it, and 1 as exit code when its objectives are missed.

With ``--url`` on any service, through its public API only; without, on one of its own on this machine, which may
lose ranks meanwhile and be compared with a plain loop.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import httpx

from cluster import processes
from cluster.loadtest.drive import Target
from cluster.loadtest.keys import read_keys
from cluster.loadtest.local import own_service, ranks_per_gang
from cluster.loadtest.plots import draw
from cluster.loadtest.report import Report, as_json, headlines, markdown
from cluster.loadtest.rows import Row
from cluster.loadtest.run import Plan, UnusableError, perform, say
from cluster.loadtest.schedule import read_trace
from cluster.loadtest.settings import SettingsError
from cluster.loadtest.slo import Slo, read_slo
from cluster.loadtest.workload import Workload, read_workload

CONFIGS = Path(__file__).parents[2] / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code: 1 for missed objectives, 2 for what cannot be measured."""
    options = _parser().parse_args(argv)
    if options.url is None:
        processes.adopt_orphans()
    try:
        return _measure(options)
    except KeyboardInterrupt:
        print("loadtest: interrupted")
        return 130
    except httpx.ConnectError as error:
        print(f"loadtest: {error.request.url} cannot be reached: {error}; check --url", file=sys.stderr)
        return 2
    except (SettingsError, UnusableError, RuntimeError, httpx.HTTPError, subprocess.TimeoutExpired) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    finally:
        if options.url is None:
            processes.kill_all(os.getpid())


def _measure(options: argparse.Namespace) -> int:
    given = {"seed": options.seed, "request_rate": options.request_rate, "num_jobs": options.num_jobs}
    workload = read_workload(options.workload, {name: one for name, one in given.items() if one is not None})
    slo = read_slo(options.slo, workload.classes) if options.slo is not None else None
    options.out.mkdir(parents=True, exist_ok=True)
    with _plan(options, workload, slo) as plan:
        report, rows = perform(plan)
    _write(options.out, report, rows, slo)
    print(f"\n{headlines(report)}\nwritten: {options.out / 'report.md'}, report.json, jobs.jsonl and pictures")
    return 0 if report.is_met else 1


@contextmanager
def _plan(options: argparse.Namespace, workload: Workload, slo: Slo | None) -> Iterator[Plan]:
    """What was asked for, and a service for it while it lasts."""
    arrivals = workload.arrivals
    plan = Plan(
        name=f"load-{time.time_ns() // 10**6}",
        workload=workload,
        trace=read_trace(options.workload.parent / arrivals.trace, workload) if arrivals.trace else (),
        slo=slo,
        target=Target(url="", keys={}),
        folder=options.out,
        job_timeout_s=options.job_timeout,
        rates=options.rates,
        sweep_jobs=options.sweep_jobs,
        kill_at=options.kill_rank_at,
        alone=options.alone,
        rounds=options.saturation,
        round_jobs=options.saturation_jobs,
        metrics_url=options.metrics_url,
        ranks_per_gang=options.ranks_per_gang,
    )
    if options.url is not None:
        if options.kill_rank_at or options.saturation:
            raise SettingsError("--kill-rank-at and --saturation need a service of our own; leave --url out")
        keys = read_keys(workload.tenants, options.keys, os.environ)
        yield replace(plan, target=Target(url=options.url.rstrip("/"), keys=keys))
        return
    say("starting a service ...")
    with (
        # A short path: the sockets in it may have 107 characters.
        tempfile.TemporaryDirectory(prefix="l-", ignore_cleanup_errors=True) as folder,
        own_service(options.model, options.service_config, Path(folder) / "state", workload.tenants) as local,
    ):
        yield replace(
            plan,
            target=local.target,
            pid=local.pid,
            metrics_url=options.metrics_url or local.metrics_url,
            ranks_per_gang=ranks_per_gang(options.service_config),
        )


def _write(folder: Path, report: Report, rows: Sequence[Row], slo: Slo | None) -> None:
    pictures = draw(folder, rows, report.summary, slo, report.faults, report.points, report.knee)
    (folder / "report.json").write_text(json.dumps(as_json(report), indent=2, allow_nan=False) + "\n")
    (folder / "report.md").write_text(markdown(report, [one.name for one in pictures]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.loadtest", description=__doc__.splitlines()[0])
    shipped = CONFIGS / "loadtest"
    parser.add_argument(
        "--workload",
        type=Path,
        default=shipped / "debug.yaml",
        help="YAML of tenants and kinds of jobs (default: %(default)s)",
    )
    parser.add_argument(
        "--slo", type=Path, help="YAML of objectives; without it, only lost and doubled jobs are judged"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/loadtest"), help="folder for the report (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="seed of the arrivals, instead of the workload's")
    parser.add_argument("--request-rate", type=float, help="jobs a second, instead of the workload's")
    parser.add_argument("--num-jobs", "--num-prompts", type=int, help="number of jobs, instead of the workload's")
    parser.add_argument(
        "--rates", type=_rates, default=(), help="jobs a second to sweep before the run, such as 0.5,1,2"
    )
    parser.add_argument(
        "--sweep-jobs", type=int, default=40, help="jobs at each rate of the sweep (default: %(default)s)"
    )
    parser.add_argument(
        "--alone",
        type=int,
        default=0,
        metavar="JOBS",
        help="measure so many jobs of each class by themselves first; simulation --against needs it",
    )
    parser.add_argument(
        "--job-timeout",
        type=float,
        default=600.0,
        help="seconds to wait after the last arrival, and for each job of --alone (default: %(default)s)",
    )
    remote = parser.add_argument_group("with a service that runs already")
    remote.add_argument("--url", help="address of the service (default: one is started here)")
    remote.add_argument("--keys", type=Path, help="YAML of API keys by tenant (default: PUSA_KEY_TENANT variables)")
    remote.add_argument("--metrics-url", help="address of the service's metrics, as Prometheus reads them")
    remote.add_argument(
        "--ranks-per-gang", type=int, help="ranks of each of the service's gangs, to work out rank-seconds a video"
    )
    local = parser.add_argument_group("with a service started here")
    local.add_argument("--model", default="debug", help="model that it serves (default: %(default)s)")
    local.add_argument(
        "--service-config",
        type=Path,
        default=CONFIGS / "serve" / "loadtest.yaml",
        help="its Serve config file, which must ask for keys (default: %(default)s)",
    )
    local.add_argument(
        "--kill-rank-at",
        type=float,
        action="append",
        default=[],
        metavar="SECONDS",
        help="kill a rank so long after the run begins; may be given several times",
    )
    local.add_argument(
        "--saturation",
        type=int,
        default=0,
        metavar="ROUNDS",
        help="afterwards, compare the throughput of a full queue with that of a plain loop, in so many rounds",
    )
    local.add_argument(
        "--saturation-jobs", type=int, default=4, help="jobs on each side of a round (default: %(default)s)"
    )
    return parser


def _rates(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """As Ctrl-C, which asyncio turns into an orderly end of what waits."""
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
