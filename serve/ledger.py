"""The fair-share ledger as a dispatcher keeps it: the store's, and what has been delivered since it was read.

Steps are delivered many times a second; they are written about once a second, in the order in which
they happened. Between two readings the tenants of this dispatcher are up to date, those of others
that far behind.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from serve.policy.cost import StepShape, charge, job_cost, observed, step_seconds
from serve.policy.fairness import InHand, Standing, Turn, Waiting, idle_clock, in_order, virtual_clock
from serve.policy.tick import Resident
from serve.store.jobs import Job, JobStore
from serve.store.threads import StoreThreads


@dataclass(slots=True)
class _Event:
    """Something that moves a tenant's virtual time: a delivery, or a lift to the virtual clock."""

    tenant: str
    cost: float = 0.0
    lifted_to: float | None = None

    def after(self, standing: Standing) -> Standing:
        moved = standing.virtual_time + self.cost / standing.weight
        return Standing(weight=standing.weight, virtual_time=max(moved, self.lifted_to or moved))


class Ledger:
    """Who has had how much, and what things cost.

    Args:
        store: of the ledger and of measured step times.
        model: whose steps they are.
        clock: Unix seconds.

    Attributes:
        delivered_s: predicted gang-seconds of all steps that this dispatcher has seen.
    """

    def __init__(self, store: JobStore, model: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._model = model
        self._clock = clock
        self._standings: dict[str, Standing] = {}
        """By tenant: as read, and what happened since."""
        self._events: list[_Event] = []
        """What is not written yet."""
        self._measured: dict[StepShape, float] = {}
        self._new_shapes: set[StepShape] = set()
        self._virtual_clock: float | None = None
        self.delivered_s = 0.0

    def standing(self, tenant: str) -> Standing:
        """A tenant's line, as far as it is known here."""
        return self._standings.get(tenant, Standing(weight=1.0, virtual_time=0.0))

    def shape(self, job: Job) -> StepShape:
        """What a step of the job is, alone in its forward."""
        return StepShape(num_tokens=job.request.num_tokens, uses_guidance=job.request.uses_guidance)

    def step_cost(self, job: Job) -> float:
        """Predicted gang-seconds of a step."""
        return step_seconds(self.shape(job), self._measured)

    def cost_left(self, job: Job, step: int) -> float:
        """Predicted gang-seconds of what the job still needs after ``step`` steps."""
        return job_cost(self.shape(job), job.request.num_inference_steps - step, self._measured)

    def order(self, waiting: Iterable[Waiting], in_hand: Iterable[InHand], switch_s: float) -> list[Turn]:
        """The waiting jobs, first to run first."""
        waiting = list(waiting)
        standings = {one.tenant: self.standing(one.tenant) for one in waiting}
        turns = in_order(
            waiting, standings, in_hand, clock=self._virtual_clock or 0.0, now=self._clock(), switch_s=switch_s
        )
        return list(turns)

    def advance(self, running: Iterable[Resident], turns: Iterable[Turn]) -> None:
        """Move the virtual clock to where service has come.

        Args:
            running: the jobs that gangs make steps for.
            turns: of waiting jobs, at least the first of every tenant.
        """
        running, turns = list(running), list(turns)
        if self._virtual_clock is None or not (running or turns):
            self._virtual_clock = max(self._virtual_clock or 0.0, idle_clock(self._standings.values()))
        self._virtual_clock = virtual_clock(
            self._virtual_clock,
            [one.claim.virtual_time for one in running],
            [one.virtual_time for one in running],
            [one.virtual_time for one in turns],
        )

    def lift(self, tenant: str, to: float) -> None:
        """A job of a tenant that was behind the virtual clock goes to a gang."""
        if to > self.standing(tenant).virtual_time:
            self._note(_Event(tenant, lifted_to=to))

    def delivered(self, tenant: str, shape: StepShape, seconds: float, num_sharing: int, *, is_new: bool) -> float:
        """A step was made; returns the gang-seconds that its tenant is charged.

        Args:
            tenant: whose job it was for.
            shape: of the whole forward.
            seconds: it took.
            num_sharing: jobs that shared it.
            is_new: whether the job had never come so far; a step that is made again is the service's loss.
        """
        cost = charge(shape, seconds, self._measured) / num_sharing
        self._measured[shape] = observed(seconds, self._measured.get(shape))
        self._new_shapes.add(shape)
        if not is_new:
            return 0.0
        self.delivered_s += cost
        self._note(_Event(tenant, cost=cost))
        return cost

    def read(self) -> None:
        """Fetch what was measured before, and every tenant's line; for the start. Blocking."""
        self._measured = dict(self._store.step_seconds(self._model))
        self._standings = {
            one.name: Standing(weight=one.weight, virtual_time=one.virtual_time) for one in self._store.tenants()
        }

    def knows(self, tenant: str) -> bool:
        """Whether the tenant's line has been read."""
        return tenant in self._standings

    async def flush(self, db: StoreThreads) -> None:
        """Write what happened and read what others wrote.

        A charge that was written, but whose answer was lost with the connection, is written again: of one tenant,
        what a second of steps costs.

        Args:
            db: how the store is called.
        """
        events, self._events = self._events, []
        shapes, self._new_shapes = {shape: self._measured[shape] for shape in self._new_shapes}, set()
        try:
            standings = await db(self._write, events, shapes)
        except BaseException:
            # What had been written is off the list, but for one charge whose answer got lost: that is made again.
            self._events = events + self._events
            self._new_shapes |= set(shapes)
            raise
        self._standings.update(standings)
        for event in self._events:  # what happened meanwhile counts on top
            self._standings[event.tenant] = event.after(self.standing(event.tenant))

    def _write(self, events: list[_Event], shapes: Mapping[StepShape, float]) -> dict[str, Standing]:
        while events:
            event = events[0]
            if event.lifted_to is not None:
                self._store.activate(event.tenant, event.lifted_to)
            else:
                self._store.charge(event.tenant, event.cost)
            del events[0]
        if shapes:
            self._store.record_step_seconds(self._model, shapes)
        return self._store.standings()

    def _note(self, event: _Event) -> None:
        self._standings[event.tenant] = event.after(self.standing(event.tenant))
        last = next((one for one in reversed(self._events) if one.tenant == event.tenant), None)
        if last is not None and last.lifted_to is None and event.lifted_to is None:
            last.cost += event.cost
        else:
            self._events.append(event)
