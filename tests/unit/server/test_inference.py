import asyncio
import gc
import time
import weakref

import numpy as np
from bilm_model.scalar_mix import Selection
from bilm_server.inference import Call, Computed, InferenceThread, Job
from bilm_server.requests import PreparedSentence, Wanted
from bilm_server.scheduler import Room

JOB = Job(
    sentence=PreparedSentence(("a",), (), (), truncated=False, state=None, return_state=False),
    wanted=Wanted(Selection(), "float32", omit_tokens=False),
    state=None,
    want_state=False,
    call=Call(float("inf")),
)


class Zeros:
    """Everything ends in its first round."""

    def __init__(self) -> None:
        self.room = Room(2, 100)
        self.jobs: list[Job] = []

    def join(self, job: Job) -> None:
        self.jobs.append(job)

    def leave(self, job: Job) -> None:
        self.jobs.remove(job)

    def advance(self) -> list[tuple[Job, Computed]]:
        ended, self.jobs = self.jobs, []
        return [(job, Computed(np.zeros(1), None)) for job in ended]

    def probe(self) -> None:
        self.jobs.clear()


async def test_the_thread_holds_no_result_while_it_waits() -> None:
    thread = InferenceThread(Zeros(), lambda serving: None)
    await thread.start()
    outcome = await thread.submit(JOB)
    held = weakref.ref(outcome)
    del outcome
    deadline = time.monotonic() + 10
    while held() is not None:
        assert time.monotonic() < deadline, "somebody still has it"
        gc.collect()
        await asyncio.sleep(0.002)
    await thread.stop()
