"""``make chaos``: prints what every fault cost and what must be true after all of them, ends with 1 if it is not.

Two gangs of the debug model on this machine, three tenants with keys, 20 jobs of every task: first
undisturbed, then the same jobs with the same seeds while every kind of process is killed in turn, a rank is
stopped, and the whole service is killed and started again on its state folder.

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

import yaml

from cluster.chaos import processes
from cluster.chaos.faults import (
    FAULTS,
    Fault,
    NoJobsLeftError,
    TimedOutError,
    strike,
    wait_for,
    wait_for_moment,
    wait_until_whole,
)
from cluster.chaos.held import held_by
from cluster.chaos.records import JobRecord, count_completions, read_jobs, stray_files
from cluster.chaos.tenants import Digests, Tenants, job_key, tenants_at_work
from cluster.chaos.verdict import (
    Outcome,
    Remains,
    Struck,
    Traces,
    figures_of_faults,
    figures_of_jobs,
    figures_of_leaks,
    table_of_faults,
)
from cluster.chaos.workload import NUM_JOBS, TENANTS, orders
from cluster.local_service import Service, free_port, serve_command, start, stop, wait_until_ready
from cluster.verdicts import are_met, table

CONFIG = Path(__file__).parents[2] / "configs/serve/chaos.yaml"
ALL_JOBS_S = 400.0
"""Longest time for the jobs of a run, or for what is left of them after the last fault."""
TIDY_S = 90.0
"""Longest wait for what ends later than the jobs do: the sweep of dead attempts' files comes every 30 seconds."""
SETTLE_S = 3.0


class Chaos:
    """A service under test, over the lives of its processes.

    Args:
        folder: for its state and its temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.temporary = folder / "t"
        self.temporary.mkdir()
        self._port = free_port()
        self.state.mkdir()
        self.keys = {tenant: serve_command(self.state, "keys", "create", tenant) for tenant in TENANTS}
        self.service = self._start()

    @property
    def key(self) -> str:
        """One of the keys."""
        return self.keys[TENANTS[0]]

    def wait_until_ready(self) -> None:
        """See ``cluster.local_service``."""
        wait_until_ready(self.service, {"Authorization": f"Bearer {self.key}"})

    def kill_and_restart(self) -> int:
        """SIGKILL the driver and everything it has started, and start the service again on the same state folder."""
        struck = self.service.process.pid
        self.service.process.kill()
        processes.kill_all(os.getpid())
        self.service.process.wait()
        self.service = self._start()
        self.wait_until_ready()
        return struck

    def traces(self) -> Traces:
        """What the idle service takes."""
        wait_for_tidiness(self.state)
        time.sleep(SETTLE_S)
        by_role = processes.roles(self.service.process.pid)
        held = held_by(self.service.process.pid)
        return Traces(
            processes={role: len(pids) for role, pids in by_role.items()},
            placement_groups=held.placement_groups,
            actors=held.actors,
            stray_files=stray_files(self.state),
            memory_mib=processes.memory(by_role),
        )

    def stop(self) -> Remains:
        """Stop it as Ctrl-C does; returns what is left then."""
        stop(self.service)
        time.sleep(SETTLE_S)
        processes.reap()
        left = processes.descendants(os.getpid())
        return Remains(
            processes=[" ".join(processes.command_of(pid))[:80] for pid in left],
            temporary_files=sorted(path.name for path in self.temporary.iterdir() if not _is_cache(path)),
        )

    def _start(self) -> Service:
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        return start("debug", self.state, ["--config", str(CONFIG)], port=self._port, environment=environment)


def wait_for_tidiness(state: Path) -> None:
    """Give the service the time to remove what nobody needs; what is left after that is judged."""
    try:
        wait_for("no stray file", lambda: not stray_files(state), TIDY_S, pause_s=1.0)
    except TimedOutError as error:
        say(f"{error}")


def undisturbed(chaos: Chaos) -> list[Outcome]:
    """The reference: every job, and no fault."""
    with tenants_at_work(chaos.service.url, chaos.keys, orders(), "reference") as tenants:
        wait_for("the reference's jobs", lambda: tenants.is_done, ALL_JOBS_S)
        return outcomes(chaos.state, "reference", tenants.answers())


def disturbed(chaos: Chaos, whole: Mapping[str, int]) -> tuple[list[Outcome], list[Struck]]:
    """The same jobs, and every fault."""
    with tenants_at_work(chaos.service.url, chaos.keys, orders(), "chaos") as tenants:
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


def outcomes(state: Path, run: str, answers: Mapping[int, Digests]) -> list[Outcome]:
    """What the store and the tenants say of every job; a row that no tenant asked for is a job, too."""
    numbers = {job_key(run, number): number for number in answers}
    return [
        Outcome(
            number=numbers.get(name, -1),
            status=record.status,
            attempt=record.attempt,
            num_steps=record.num_steps,
            steps_run=record.steps_run,
            digests=answers[numbers[name]] if name in numbers else {},
        )
        for name, record in read_jobs(state, run).items()
    ]


def say(line: str) -> None:
    """Tell whoever watches; the figures come at the end."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def measure(folder: Path) -> bool:
    """Run it all and print; returns whether every figure is met."""
    k = checkpoint_every(CONFIG)
    say("starting the service ...")
    began = time.monotonic()
    chaos = Chaos(folder)
    chaos.wait_until_ready()
    say(f"ready after {time.monotonic() - began:.1f} s; {NUM_JOBS} jobs, undisturbed ...")
    reference = undisturbed(chaos)
    before = chaos.traces()
    say(f"done after {time.monotonic() - began:.1f} s; the same {NUM_JOBS} jobs, and {len(FAULTS)} faults ...")
    found, struck = disturbed(chaos, before.processes)
    say(f"every job has ended after {time.monotonic() - began:.1f} s")
    num_completions = count_completions(chaos.state)
    after = chaos.traces()
    remains = chaos.stop()
    lines = [
        *figures_of_faults(struck, len(FAULTS)),
        *figures_of_jobs(reference, found, NUM_JOBS, num_completions, k),
        *figures_of_leaks(before, after, remains),
    ]
    say(f"stopped after {time.monotonic() - began:.1f} s\n")
    sys.stdout.write(f"{table_of_faults(struck)}\n{table(lines)}")
    return are_met(lines)


def checkpoint_every(config: Path) -> int:
    """Steps that a job may lose by a fault."""
    (application,) = yaml.safe_load(config.read_text())["applications"]
    return int(application["args"]["denoiser"]["checkpoint_every"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code. Whatever happens, no process stays."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="an empty folder with a short name for the state and the log, kept")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    processes.adopt_orphans()
    # A short path: the sockets in it may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="c-", ignore_cleanup_errors=True) as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        try:
            return 0 if measure(folder) else 1
        except KeyboardInterrupt:
            sys.stdout.write("chaos: interrupted\n")
            return 130
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            sys.stdout.write(f"chaos: {error}\n{_log_of(folder)}\n")
            return 1
        finally:
            processes.kill_all(os.getpid())


def _is_cache(path: Path) -> bool:
    """Whether it is torch's, one folder for an account: not a file of any process."""
    return path.name.startswith("torchinductor_")


def _log_of(folder: Path) -> str:
    log = folder / "state" / "service.log"
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if log.exists() else ""


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
