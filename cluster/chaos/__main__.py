"""``make chaos``: prints what every fault cost and what must be true after all of them, ends with 1 if it is not.

Two gangs of the debug model on this machine, three tenants with keys, 20 jobs of every task: first
undisturbed, then the same jobs with the same seeds while every kind of process is killed in turn, a rank is
stopped, and the whole service is killed and started again on its state folder.

With ``--share-forwards`` all jobs have one shape, and results may differ by what rounding does to a pixel.

Final latents do not leave the service, and it does not keep them: what is compared bit for bit is the
lossless frames that are decoded from them, and the MP4.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType

from cluster import processes
from cluster.chaos.faults import (
    FAULTS,
    Fault,
    NoJobsLeftError,
    strike,
    wait_for,
    wait_for_moment,
    wait_until_whole,
)
from cluster.chaos.records import JobRecord, count_completions, read_jobs
from cluster.chaos.sameness import BIT_EQUAL, SHARED_FORWARDS
from cluster.chaos.service import CONFIG, Chaos, settings_of
from cluster.chaos.tenants import Results, Tenants, job_key, tenants_at_work
from cluster.chaos.verdict import (
    Outcome,
    Struck,
    figures_of_faults,
    figures_of_jobs,
    figures_of_leaks,
    forwards_shared,
    table_of_faults,
)
from cluster.chaos.workload import NUM_JOBS, orders
from cluster.orders import Order
from cluster.verdicts import are_met, table

ALL_JOBS_S = 1800.0
"""Longest time for the jobs of a run, or for what is left of them after the last fault."""


def undisturbed(chaos: Chaos, jobs: Mapping[int, Order]) -> list[Outcome]:
    """The reference: every job, and no fault."""
    with tenants_at_work(chaos.service.url, chaos.keys, jobs, "reference") as tenants:
        wait_for("the reference's jobs", lambda: tenants.is_done, ALL_JOBS_S)
        return outcomes(chaos.state, "reference", tenants.answers())


def disturbed(chaos: Chaos, jobs: Mapping[int, Order], whole: Mapping[str, int]) -> tuple[list[Outcome], list[Struck]]:
    """The same jobs, and every fault."""
    with tenants_at_work(chaos.service.url, chaos.keys, jobs, "chaos") as tenants:
        struck = make_faults(chaos, tenants, whole)
        return outcomes(chaos.state, "chaos", tenants.answers()), struck


def make_faults(chaos: Chaos, tenants: Tenants, whole: Mapping[str, int]) -> list[Struck]:
    """Make one fault after the other; fewer if the jobs end before the faults do.

    What a fault has hit is seen when the next is made: some attempts end seconds later, when a lease runs out.
    """

    def jobs() -> dict[str, JobRecord]:
        if tenants.is_done:
            tenants.answers()  # raises if a client has given up
            raise NoJobsLeftError("every job has ended")
        return read_jobs(chaos.state, "chaos")

    struck: list[tuple[Fault, float]] = []
    seen: list[dict[str, JobRecord]] = []
    for fault in FAULTS:
        try:
            wait_for_moment(fault, jobs)
        except NoJobsLeftError as error:
            say(f"no job was left for: {fault.name} ({error})")
            break
        seen.append(read_jobs(chaos.state, "chaos"))
        seconds = make(fault, chaos, whole)
        struck.append((fault, seconds))
        num_ended = sum(one.is_final for one in read_jobs(chaos.state, "chaos").values())
        say(f"{fault.name}: whole again after {seconds:.1f} s, {num_ended} of {NUM_JOBS} jobs have ended")
    wait_for("the jobs after the last fault", lambda: tenants.is_done, ALL_JOBS_S)
    seen.append(read_jobs(chaos.state, "chaos"))
    return [
        Struck(name=fault.name, num_hit=num_hit(before, after), must_hit=fault.must_hit, whole_after_s=seconds)
        for (fault, seconds), (before, after) in zip(struck, pairwise(seen), strict=True)
    ]


def make(fault: Fault, chaos: Chaos, whole: Mapping[str, int]) -> float:
    """Make one fault; returns after how many seconds the service was whole again."""
    began = time.monotonic()
    pid = chaos.kill_and_restart() if fault.role == "service" else strike(fault, chaos.service.process.pid)
    service = chaos.service
    wait_until_whole(
        fault, pid, service.process.pid, whole, service.url, chaos.key, lambda: read_jobs(chaos.state, "chaos")
    )
    return time.monotonic() - began


def num_hit(before: Mapping[str, JobRecord], after: Mapping[str, JobRecord]) -> int:
    """Jobs in hand whose attempt has ended without the job: nothing but a fault does that."""
    in_hand = {name: one for name, one in before.items() if one.status == "in_progress"}
    return sum(after[name].attempt > one.attempt or after[name].status == "queued" for name, one in in_hand.items())


def outcomes(state: Path, run: str, answers: Mapping[int, Results]) -> list[Outcome]:
    """What the store and the tenants say of every job; a row that no tenant asked for is a job, too."""
    numbers = {job_key(run, number): number for number in answers}
    return [
        Outcome(
            number=numbers.get(name, -1),
            status=record.status,
            attempt=record.attempt,
            num_steps=record.num_steps,
            steps_run=record.steps_run,
            results=answers[numbers[name]] if name in numbers else {},
        )
        for name, record in read_jobs(state, run).items()
    ]


def say(line: str) -> None:
    """Tell whoever watches; the figures come at the end."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def measure(folder: Path, share_forwards: bool) -> bool:
    """Run it all and print; returns whether every figure is met."""
    jobs = orders(are_alike=share_forwards)
    say("starting the service ...")
    began = time.monotonic()
    chaos = Chaos(folder, settings_of(CONFIG, share_forwards))
    chaos.wait_until_ready()
    say(f"ready after {time.monotonic() - began:.1f} s; {NUM_JOBS} jobs, undisturbed ...")
    reference = undisturbed(chaos, jobs)
    before = chaos.traces()
    shared = [forwards_shared(chaos.num_forwards(), sum(one.steps_run for one in reference))] if share_forwards else []
    say(f"done after {time.monotonic() - began:.1f} s; the same {NUM_JOBS} jobs, and {len(FAULTS)} faults ...")
    found, struck = disturbed(chaos, jobs, before.processes)
    say(f"every job has ended after {time.monotonic() - began:.1f} s")
    num_completions = count_completions(chaos.state)
    after = chaos.traces()
    remains = chaos.stop()
    sameness = SHARED_FORWARDS if share_forwards else BIT_EQUAL
    lines = [
        *figures_of_faults(struck, len(FAULTS)),
        *figures_of_jobs(reference, found, NUM_JOBS, num_completions, chaos.checkpoint_every, sameness),
        *shared,
        *figures_of_leaks(before, after, remains),
    ]
    say(f"stopped after {time.monotonic() - began:.1f} s\n")
    sys.stdout.write(f"{table_of_faults(struck)}\n{table(lines)}")
    return are_met(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code. Whatever happens, no process stays."""
    parser = argparse.ArgumentParser(prog="python -m cluster.chaos", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--keep", type=Path, help="keep the state and the log in this folder; it must be empty and its path short"
    )
    parser.add_argument(
        "--share-forwards",
        action="store_true",
        help="give all jobs one shape, so that two share each forward; their results then agree within rounding",
    )
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    processes.adopt_orphans()
    # A short path: the sockets in it may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="c-", ignore_cleanup_errors=True) as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        try:
            return 0 if measure(folder, arguments.share_forwards) else 1
        except KeyboardInterrupt:
            sys.stdout.write("chaos: interrupted\n")
            return 130
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            sys.stdout.write(f"chaos: {error}\n{_log_of(folder)}\n")
            return 1
        finally:
            processes.kill_all(os.getpid())


def _log_of(folder: Path) -> str:
    log = folder / "state" / "service.log"
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if log.exists() else ""


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
