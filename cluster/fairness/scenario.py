"""What tenants ask for, as values: the same scenario runs under virtual time and against the real service.

Times are in idle latencies of the job in question: what it takes from asking to the result when nobody
else is there. So a scenario means the same on any machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from serve.policy.priority import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """A text-to-video request."""

    width: int = 288
    height: int = 192
    num_frames: int = 33
    num_steps: int = 10

    @property
    def num_tokens(self) -> int:
        """Tokens of one forward: patches of 16x16 pixels of every latent frame, of four frames each but the first."""
        return ((self.num_frames - 1) // 4 + 1) * (self.width // 16) * (self.height // 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Jobs of one tenant."""

    tenant: str
    video: Video
    count: int
    every: float = 0.0
    """Idle latencies between two of them; 0: all at once."""
    first: float = 0.0
    """Idle latencies from the beginning to the first."""
    priority: Priority = "interactive"

    def times(self, idle_s: float) -> Iterator[float]:
        """Seconds after the beginning at which the jobs are asked for."""
        return ((self.first + number * self.every) * idle_s for number in range(self.count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Tenants that compete."""

    name: str
    streams: tuple[Stream, ...]
    weights: Mapping[str, float]
    """Of every tenant."""
    num_gangs: int = 1
    ends: float | None = None
    """Idle latencies of the first stream's video after which nothing more is seen; None: with the last job."""


LARGE = Video(num_frames=49)
SMALL = Video(width=192, num_frames=17)
USUAL = Video()

HEAD_OF_LINE = Scenario(
    name="A queues 50 jobs, B sends one every 4 idle latencies",
    streams=(
        Stream(tenant="A", video=USUAL, count=50),
        Stream(tenant="B", video=USUAL, count=8, every=4.0, first=4.0),
    ),
    weights={"A": 1.0, "B": 1.0},
)

TWO_TO_ONE = Scenario(
    name="weights 2:1 under backlog",
    streams=(Stream(tenant="A", video=USUAL, count=40), Stream(tenant="B", video=USUAL, count=20)),
    weights={"A": 2.0, "B": 1.0},
)

FOUR_EQUAL = Scenario(
    name="four equal tenants with jobs of different sizes under backlog",
    streams=(
        Stream(tenant="A", video=USUAL, count=12),
        Stream(tenant="B", video=LARGE, count=7),
        Stream(tenant="C", video=SMALL, count=36),
        Stream(tenant="D", video=Video(num_steps=5), count=24),
    ),
    weights=dict.fromkeys("ABCD", 1.0),
)


def crowd(num_gangs: int = 1000, num_tenants: int = 200, lasts: float = 16.0) -> Scenario:
    """Many of each at once: backlogs of weight 2 (``heavy``) and 1 (``equal``), and tenants with a job now and then."""
    num_heavy, num_rare = num_tenants // 5, 2 * num_tenants // 5
    num_equal = num_tenants - num_heavy - num_rare
    sizes = (USUAL, LARGE, SMALL, Video(num_steps=5))
    usual = _work(USUAL)
    streams, weights = [], {}
    for number in range(num_heavy + num_equal):
        is_heavy = number < num_heavy
        tenant = f"{'heavy' if is_heavy else 'equal'}-{number}"
        weights[tenant] = 2.0 if is_heavy else 1.0
        video = sizes[number % len(sizes)]
        share = weights[tenant] * num_gangs / (2 * num_heavy + num_equal)
        count = int(1.5 * share * lasts * usual / _work(video)) + 2
        streams.append(Stream(tenant=tenant, video=video, count=count))
    for number in range(num_rare):
        tenant = f"rare-{number}"
        weights[tenant] = 1.0
        first = 4.0 + 4.0 * number / num_rare
        count = int((lasts - 2 - first) // 4) + 1
        streams.append(Stream(tenant=tenant, video=USUAL, count=count, every=4.0, first=first))
    return Scenario(
        name=f"{num_gangs} gangs, {num_tenants} tenants",
        streams=tuple(streams),
        weights=weights,
        num_gangs=num_gangs,
        ends=lasts,
    )


def _work(video: Video) -> int:
    return video.num_steps * video.num_tokens
