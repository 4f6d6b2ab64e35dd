"""Stand-ins for ``pusa_dist.worker.Worker``: the same calls, numbers for tensors, faults on request.

A request's prompt says what happens: ``nan``, ``nan-on-0`` (one rank only), ``too-large``, ``large`` (it
fits alone), ``bug``, ``sleep`` (asleep in the forward of step 2), ``slow`` (healthy steps of SLOW_STEP_S),
``foreign`` (its checkpoint is refused) or anything else (nothing).
"""

import os
import pickle
import time

import torch

from pusa_dist.errors import CheckpointError, DeviceMemoryError, NumericsError
from pusa_dist.worker import Worker

STEP_S = 0.05
SLOW_STEP_S = 2.5


class FakeWorker:
    def __init__(self):
        self.jobs = {}
        self.num_forwards = 0

    def join(self, rank, world_size, address, port):
        self.rank = rank

    def admit(self, job_id, request, context, negative, given):
        self.jobs[job_id] = [request, float(context.sum()), 0]

    def restore(self, job_id, data):
        request, value, step = pickle.loads(data)
        if request.prompt == "foreign":
            raise CheckpointError("of another revision")
        self.jobs[job_id] = [request, value, step]
        return step

    def checkpoint(self, job_id):
        return self.jobs[job_id][2], pickle.dumps(self.jobs[job_id])

    def signature(self, job_id):
        return self.jobs[job_id][0].height

    def step(self, job_ids):
        self.num_forwards += 1
        if len(job_ids) > 1 and any(self.jobs[job_id][0].prompt == "large" for job_id in job_ids):
            raise DeviceMemoryError("use a smaller size")
        for job_id in job_ids:
            self.step_one(*self.jobs[job_id])
        for job_id in job_ids:  # all of them or, as above, none
            self.jobs[job_id][2] += 1
        return {job_id: self.jobs[job_id][2] for job_id in job_ids}

    def step_one(self, request, _, done):
        if request.prompt == "nan" or (request.prompt == "nan-on-0" and self.rank == 0):
            raise NumericsError("step 1 is not finite")
        if request.prompt == "too-large":
            raise DeviceMemoryError("use a smaller size")
        if request.prompt == "bug":
            raise ValueError("a bug")
        if request.prompt == "sleep" and done == 1 and self.rank == 1:
            time.sleep(3600)
        time.sleep(SLOW_STEP_S if request.prompt == "slow" else STEP_S)

    def finish(self, job_id):
        return torch.full((4,), self.jobs.pop(job_id)[1])

    def drop(self, job_id):
        self.jobs.pop(job_id, None)


class SleepyWorker(Worker):
    """The real worker, whose rank 1 falls asleep inside the second step of a job that asks for it, once.

    A job asks by the prompt ``sleep``; a file remembers that one has been had, so that the next gang works.
    """

    def __init__(self, *args, memory):
        super().__init__(*args)
        self.memory = memory
        self.sleepy = set()

    def join(self, rank, *args):
        self.rank = rank
        super().join(rank, *args)

    def admit(self, job_id, request, *tensors):
        if request.prompt == "sleep" and not os.path.exists(self.memory):
            self.sleepy.add(job_id)
        super().admit(job_id, request, *tensors)

    def step(self, job_ids):
        done = super().step(job_ids)
        if self.rank == 1 and self.sleepy & {job_id for job_id, step in done.items() if step == 2}:
            with open(self.memory, "w") as file:
                file.write("slept")
            time.sleep(3600)
        return done
