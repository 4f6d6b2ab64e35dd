"""What must be true after all faults, judged from plain records."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.chaos.sameness import BIT_EQUAL, Sameness
from cluster.verdicts import Figure, at_most, equal, no_growth, none_of

MAX_MEMORY_GROWTH = 0.1
MIN_FORWARDS, MAX_FORWARDS = 0.5, 0.75
"""By steps, where jobs share forwards, two at most: a job runs alone where no other is on its gang."""
_JOBS, _FAULTS, _LEAKS = "jobs", "faults", "left behind"
"""Parts of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one job."""

    number: int
    status: str
    attempt: int
    num_steps: int
    steps_run: int
    results: Mapping[str, bytes]
    """What it published, by variant."""

    @property
    def num_repeated(self) -> int:
        """Steps that were made again."""
        return self.steps_run - self.num_steps

    @property
    def num_hits(self) -> int:
        """Faults that ended an attempt at it."""
        return self.attempt - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """A fault that was made."""

    name: str
    num_hit: int
    """Jobs whose attempt it ended."""
    must_hit: bool
    whole_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What the service takes when it has nothing to do."""

    processes: Mapping[str, int]
    """By role."""
    placement_groups: int
    actors: int
    stray_files: Sequence[str]
    """In its state folder, that belong to no result."""
    memory_mib: Mapping[str, float]
    """Resident, of the largest process of a role, without the object store that all share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What is there when the service was stopped."""

    processes: Sequence[str]
    temporary_files: Sequence[str]


def figures_of_jobs(
    reference: Sequence[Outcome],
    disturbed: Sequence[Outcome],
    num_jobs: int,
    num_completions: int,
    k: int,
    sameness: Sameness = BIT_EQUAL,
) -> Iterator[Figure]:
    """What became of the jobs.

    Args:
        reference: the same jobs without faults.
        disturbed: with them.
        num_jobs: that were asked for in each of the two.
        num_completions: how often a result was published, in both together.
        k: ``checkpoint_every``.
        sameness: what their results must be.
    """
    completed = [one for one in disturbed if one.status == "completed"]
    yield equal(_JOBS, "jobs completed", len(completed), num_jobs)
    yield equal(_JOBS, "jobs in the store", len(disturbed), num_jobs)
    yield equal(_JOBS, "results published, reference and chaos", num_completions, len(reference) + num_jobs)
    lost = [one.number for one in reference if one.status != "completed" or one.attempt != 1 or one.num_repeated]
    yield none_of(_JOBS, "jobs of the reference that were not undisturbed", lost)
    known = {one.number: one.results for one in reference}
    for variant, is_same in sameness.by_variant.items():
        pairs = [(one.results.get(variant), known.get(one.number, {}).get(variant)) for one in disturbed]
        num_same = sum(ours is not None and theirs is not None and is_same(ours, theirs) for ours, theirs in pairs)
        yield equal(_JOBS, f"{variant} {sameness.words} the reference's", num_same, num_jobs)
    twice = [one.number for one in disturbed if one.steps_run >= 2 * one.num_steps]
    yield none_of(_JOBS, "jobs that ran to the end twice", twice)
    short = [one.number for one in completed if one.num_repeated < 0]
    yield none_of(_JOBS, "jobs completed without all their steps", short)
    yield most_repeated(disturbed, k)


def most_repeated(disturbed: Sequence[Outcome], k: int) -> Figure:
    """Steps made again for each fault that hit a job, of the job with most."""
    repeated = {one.number: one.num_repeated / max(one.num_hits, 1) for one in disturbed}
    above = [one.number for one in disturbed if one.num_repeated > k * one.num_hits]
    most = max(repeated.values(), default=0.0)
    value = f"{most:g}" + (f" (jobs above: {above})" if above else "")
    return Figure(_JOBS, "steps made again per fault that hit the job, at most", value, f"<= k = {k}", not above)


def forwards_shared(num_forwards: float, num_steps: int) -> Figure:
    """Whether jobs that were to share forwards did: of two together there are half as many as steps."""
    ratio = num_forwards / num_steps
    is_met = MIN_FORWARDS <= ratio <= MAX_FORWARDS
    return Figure(_JOBS, "forwards by steps, undisturbed", ratio, f"{MIN_FORWARDS} to {MAX_FORWARDS}", is_met)


def figures_of_faults(struck: Sequence[Struck], num_faults: int) -> Iterator[Figure]:
    """Whether the run has shown anything."""
    yield equal(_FAULTS, "faults made while jobs ran", len(struck), num_faults)
    in_vain = [one.name for one in struck if one.must_hit and not one.num_hit]
    yield none_of(_FAULTS, "faults that should have hit a job and did not", in_vain)


def figures_of_leaks(before: Traces, after: Traces, remains: Remains) -> Iterator[Figure]:
    """What the faults left behind.

    Memory is judged for growth only: processes that were started again hold less.
    """
    yield _same("processes of the idle service", before.processes, after.processes)
    yield at_most(_LEAKS, "actors", after.actors, before.actors)
    yield at_most(_LEAKS, "placement groups", after.placement_groups, before.placement_groups)
    yield none_of(_LEAKS, "stray files in the state folder", after.stray_files)
    was, now = before.memory_mib, after.memory_mib
    most = max(was.keys() & now.keys(), key=lambda role: now[role] / was[role])
    what = f"resident memory of the role that grew most, {most}"
    yield no_growth(_LEAKS, what, was[most], now[most], MAX_MEMORY_GROWTH)
    yield none_of(_LEAKS, "processes left after the stop", remains.processes)
    yield none_of(_LEAKS, "temporary files left after the stop", remains.temporary_files)


def table_of_faults(struck: Sequence[Struck]) -> str:
    """Markdown."""
    head = "| fault | jobs hit | whole again after |\n|---|---|---|\n"
    return head + "".join(f"| {one.name} | {one.num_hit} | {one.whole_after_s:.1f} s |\n" for one in struck)


def _same(what: str, before: Mapping[str, int], after: Mapping[str, int]) -> Figure:
    differing = {role: after.get(role, 0) for role in {*before, *after} if before.get(role, 0) != after.get(role, 0)}
    value = f"{sum(after.values())}" + (f" ({differing})" if differing else "")
    return Figure(_LEAKS, what, value, f"{sum(before.values())}", not differing)
