"""Stand-ins for ``pusa_dist.worker.Worker``: the same calls, numbers for tensors, faults on request.

A request's prompt says what happens: ``nan``, ``nan-on-0`` (one rank only), ``bug``, ``sleep`` (asleep in
the forward of step 2) or anything else (nothing).
"""

import os
import time

import torch

from pusa_dist.errors import NumericsError
from pusa_dist.worker import Worker

STEP_S = 0.05


class FakeWorker:
    def __init__(self):
        self.jobs = {}

    def join(self, rank, world_size, address, port):
        self.rank = rank

    def admit(self, job_id, request, context, negative, given):
        self.jobs[job_id] = [request, float(context.sum()), 0]

    def step(self, job_ids):
        (job_id,) = job_ids
        request, _, done = job = self.jobs[job_id]
        if request.prompt == "nan" or (request.prompt == "nan-on-0" and self.rank == 0):
            raise NumericsError("step 1 is not finite")
        if request.prompt == "bug":
            raise ValueError("a bug")
        if request.prompt == "sleep" and done == 1 and self.rank == 1:
            time.sleep(3600)
        time.sleep(STEP_S)
        job[2] += 1
        return {job_id: job[2]}

    def finish(self, job_id):
        return torch.full((4,), self.jobs.pop(job_id)[1])

    def drop(self, job_id):
        self.jobs.pop(job_id, None)


class SleepyWorker(Worker):
    """The real worker; rank 1 falls asleep inside its second step, on its first life only.

    Remembers in a file that it has slept, so that the next gang is healthy.
    """

    def __init__(self, *args, memory):
        super().__init__(*args)
        self.memory = memory
        self.num_steps = 0

    def join(self, rank, *args):
        self.rank = rank
        super().join(rank, *args)

    def step(self, job_ids):
        self.num_steps += 1
        if self.rank == 1 and self.num_steps == 2 and not os.path.exists(self.memory):
            with open(self.memory, "w") as file:
                file.write("slept")
            time.sleep(3600)
        return super().step(job_ids)
