"""What tests of a gang give it, and how they read what it says."""

from contextlib import aclosing

from pusa_dist.request import GenerationRequest
from serve.policy.tick import Claim
from serve.stages import Assignment, Checkpointed, Conditions, Progress, TensorRef


def request_of(prompt, steps=4):
    return GenerationRequest(
        model="debug", prompt=prompt, negative_prompt="", width=64, height=64, num_frames=5, fps=8,
        num_inference_steps=steps, guidance_scale=1.0, shift=5.0, seed=0, lora_alpha={},
    )  # fmt: skip


def claim_of(steps, **changes):
    values = {
        "tenant": "local", "weight": 1.0, "virtual_time": 0.0, "step": 0, "num_steps": steps, "step_cost": 1.0,
        "is_urgent": True, "created_at": 0.0, "num_tokens": 10,
    }  # fmt: skip
    return Claim(**values | changes)


def assignment(context, prompt, steps=4, attempt=1, source=None, **claim):
    """A job called after its prompt.

    Args:
        context: what ``TensorRef`` holds for its embedding.
        prompt: also says what goes wrong with it, see ``gang_workers``.
        steps: of the generation.
        attempt: at the job.
        source: a checkpoint to go on from.
        claim: changes of its claim to the next step.
    """
    if source is None:
        source = Conditions(context=TensorRef(context), negative=None, given=None)
    return Assignment(
        job_id=f"job-{prompt}", attempt=attempt, owner="dispatcher", request=request_of(prompt, steps), source=source,
        claim=claim_of(steps, **claim),
    )  # fmt: skip


async def publishing(denoiser, given):
    """Messages of a job whose checkpoints are published as they come."""
    async with aclosing(denoiser.generate(given)) as messages:
        async for message in messages:
            if isinstance(message, Checkpointed):
                await denoiser.published(given.job_id, given.attempt, message.checkpoint.step)
            yield message


async def collect(messages):
    return [message async for message in messages]


async def until_step(messages, step):
    """Read a stream up to that step."""
    async for message in messages:
        if isinstance(message, Progress) and message.step >= step:
            return


def steps_of(messages):
    return [message.step for message in messages if isinstance(message, Progress)]
