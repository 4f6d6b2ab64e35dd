from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.policy.tick import Claim, Resident, next_step, precedence, preempts


def resident(job_id, virtual_time=0.0, *, tenant=None, step=0, urgent=True, signature=None, **claim):
    values = {"weight": 1.0, "num_steps": 10, "step_cost": 1.0, "created_at": 0.0, **claim}
    return Resident(
        job_id=job_id,
        claim=Claim(tenant=tenant or job_id, virtual_time=virtual_time, step=0, is_urgent=urgent, **values),
        step=step,
        signature=signature,
    )


def test_nobody_steps_when_nobody_is_there():
    assert next_step([], running=None) == ()


def test_steps_move_a_jobs_virtual_time_by_cost_and_weight():
    one = resident("a", 5.0, step=4, weight=2.0, step_cost=3.0)
    assert one.virtual_time == 5.0 + 4 * 3.0 / 2.0
    assert one.cost == 6 * 3.0
    # One that came with three of them done was at its virtual time then.
    assert replace(one, claim=replace(one.claim, step=3)).virtual_time == 5.0 + 3.0 / 2.0


@pytest.mark.parametrize(
    ("jobs", "first"),
    [
        ([resident("a", 2.0), resident("b", 1.0)], "b"),  # the least virtual time
        ([resident("a", 1.0, urgent=False), resident("b", 1.0)], "b"),  # then the class
        ([resident("a", 1.0), resident("b", 0.0, step=1)], "b"),  # then the one that has begun
        ([resident("a", created_at=2.0), resident("b", created_at=1.0)], "b"),  # then age
        ([resident("b"), resident("a")], "a"),
    ],
)
def test_at_a_job_boundary(jobs, first):
    assert next_step(jobs, running=None) == (first,)
    assert next_step(jobs, running="one that has ended") == (first,)


def test_a_job_runs_to_its_end():
    """Although the other's virtual time is less: it could not end before it has come as far."""
    running, other = resident("a", 0.0, step=7), resident("b", 0.0)
    assert next_step([running, other], running="a") == ("a",)


def test_a_tenant_far_behind_interrupts():
    running = resident("a", 0.0, step=7)
    assert next_step([running, resident("b", -3.0)], running="a") == ("b",)  # 10 steps bring it to 7
    assert next_step([running, resident("b", -2.9)], running="a") == ("a",)
    assert next_step([running, resident("b", 0.0, num_steps=7)], running="a") == ("b",)
    assert next_step([running, resident("b", -8.0, weight=0.6)], running="a") == ("a",)


def test_a_change_of_strength_there_and_back_counts():
    running, other = resident("a", 0.0, step=9, lora=1.4), resident("b", -3.0, lora=1.0)
    assert next_step([running, other], running="a", lora=1.4, switch_s=1.0) == ("b",)
    assert next_step([running, other], running="a", lora=1.4, switch_s=1.1) == ("a",)


def test_between_jobs_the_merged_strength_is_preferred_as_far_as_a_change_costs():
    jobs = [resident("a", 0.0, lora=1.0), resident("b", 1.5, lora=1.4)]
    assert next_step(jobs, running=None, lora=1.4, switch_s=2.0) == ("b",)
    assert next_step(jobs, running=None, lora=1.4, switch_s=1.0) == ("a",)


def test_an_urgent_job_interrupts_a_batch_job_of_its_own_tenant_only():
    batch = resident("batch", tenant="t", step=1, urgent=False)
    mine, others = resident("mine", 50.0, tenant="t"), resident("others", 0.0)
    assert next_step([batch, mine, others], running="batch") == ("mine",)
    assert next_step([batch, others], running="batch") == ("batch",)
    assert next_step([replace(batch, claim=replace(batch.claim, is_urgent=True)), mine], running="batch") == ("batch",)


def test_an_interrupted_batch_job_goes_after_its_tenants_urgent_ones():
    batch = resident("batch", 0.0, tenant="t", step=1, urgent=False)
    assert next_step([batch, resident("urgent", 30.0, tenant="t")], running=None) == ("urgent",)
    # That gives the tenant no turn that another should have.
    jobs = [batch, resident("urgent", 30.0, tenant="t"), resident("other", 20.0)]
    assert next_step(jobs, running=None) == ("other",)


def test_alike_jobs_share_a_forward_up_to_a_number_of_tokens():
    jobs = [resident(name, n, signature="s", num_tokens=100) for n, name in enumerate("abc")]
    other = resident("d", 0.5, signature="other", num_tokens=1)
    assert next_step([*jobs, other], running=None, share_tokens=300) == ("a", "b", "c")
    assert next_step([*jobs, other], running=None, share_tokens=299) == ("a", "b")
    assert next_step([*jobs, other], running="b", share_tokens=200) == ("b", "a")
    assert next_step([*jobs, other], running=None, share_tokens=0) == ("a",)
    alone = [replace(job, signature=None) for job in jobs]
    assert next_step(alone, running=None, share_tokens=1000) == ("a",)


residents = st.builds(
    resident,
    st.sampled_from(["p", "q"]),
    st.floats(-50, 50),
    tenant=st.sampled_from(["t", "u"]),
    step=st.integers(0, 9),
    urgent=st.booleans(),
    weight=st.floats(0.1, 10.0),
    step_cost=st.floats(0.1, 10.0),
    lora=st.sampled_from([1.0, 1.4]),
)


@settings(max_examples=300)
@given(one=residents, other=residents, switch_s=st.floats(0, 3))
def test_two_jobs_never_turn_round(one, other, switch_s):
    """Whatever steps the interrupting one makes, the interrupted one does not interrupt it in turn."""
    if not preempts(one, other, switch_s):
        return
    for step in range(one.step, one.claim.num_steps):
        assert not preempts(other, replace(one, step=step), switch_s)


@settings(max_examples=100)
@given(jobs=st.lists(residents, min_size=1, max_size=4), switch_s=st.floats(0, 3), share=st.sampled_from([0, 1000]))
def test_somebody_always_steps_and_interruptions_obey_the_rule(jobs, switch_s, share):
    jobs = [replace(job, job_id=f"{job.job_id}{n}") for n, job in enumerate(jobs)]
    by_id = {job.job_id: job for job in jobs}
    for running in by_id.values():
        first, *_ = next_step(jobs, running=running.job_id, lora=1.0, switch_s=switch_s, share_tokens=share)
        assert first == running.job_id or preempts(by_id[first], running, switch_s)
    first, *_ = next_step(jobs, running=None, share_tokens=share)
    least = min(jobs, key=precedence)
    assert by_id[first].virtual_time == least.virtual_time or not least.claim.is_urgent
