"""A scenario under virtual time."""

from functools import partial

from cluster.fairness.outcome import Delivery, Observation, Outcome
from cluster.fairness.scenario import Scenario, Video
from cluster.virtual.cluster import VirtualCluster
from cluster.virtual.event_loop import EventLoop
from cluster.virtual.job import Ask, Times
from serve.policy.cost import StepShape, step_seconds


def observe(scenario: Scenario) -> Observation:
    """Run a scenario; the same values give the same observation."""
    # Steps of the usual video take a second, and the rest of the path the share of it that was measured.
    unit_s = _step_s(Video())
    step_s = {one.tenant: _step_s(one.video) / unit_s for one in scenario.streams}
    # Of a crowd something changes a hundred times a second; that is looked at ten times.
    is_crowd = scenario.num_gangs >= 100
    times = Times(prepare_s=0.5, decode_s=1.0, poll_s=1.0 if is_crowd else 0.1, arrange_s=0.1 if is_crowd else 0.0)
    idle_s = {
        one.tenant: times.prepare_s + one.video.num_steps * step_s[one.tenant] + times.decode_s
        for one in scenario.streams
    }
    loop = EventLoop()
    cluster = VirtualCluster(loop, scenario.weights, scenario.num_gangs, times, window=max(8, scenario.num_gangs // 4))
    for stream in scenario.streams:
        for number, at in enumerate(stream.times(idle_s[stream.tenant])):
            ask = Ask(
                id=f"{stream.tenant}-{number:04d}",
                tenant=stream.tenant,
                num_steps=stream.video.num_steps,
                step_s=step_s[stream.tenant],
                priority=stream.priority,
                num_tokens=stream.video.num_tokens,
            )
            loop.at(at, partial(cluster.ask, ask))
    if scenario.ends is None:
        loop.run()
    else:
        loop.run(until=scenario.ends * idle_s[scenario.streams[0].tenant])
    return Observation(
        outcomes=[
            Outcome(
                tenant=record.ask.tenant,
                asked_at=record.asked_at,
                ready_at=record.ready_at,
                began_at=record.began_at,
                denoised_at=record.denoised_at,
                ended_at=record.ended_at,
            )
            for record in cluster.records.values()
        ],
        deliveries=[Delivery(at=at, tenant=tenant, cost=cost) for at, tenant, cost in cluster.delivered],
        idle_s=idle_s,
        step_s=step_s,
    )


def _step_s(video: Video) -> float:
    return step_seconds(StepShape(num_tokens=video.num_tokens, uses_guidance=False), {})
