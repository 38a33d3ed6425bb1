import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np
from bilm_model.scalar_mix import Selection
from bilm_server.inference import Call, Computed, InferenceThread, Job
from bilm_server.requests import PreparedSentence, Wanted

JOB = Job(
    sentence=PreparedSentence(("a",), (), (), truncated=False, state=None, return_state=False),
    wanted=Wanted(Selection(), "float32", omit_tokens=False),
    state=None,
    want_state=False,
    call=Call(float("inf")),
)


class Zeros:
    def run(self, jobs: Sequence[Job], abandoned: Callable[[], bool]) -> list[Computed] | None:
        return [Computed(np.zeros(1), None) for _ in jobs]

    def probe(self) -> None:
        pass


async def test_the_thread_holds_no_result_while_it_waits() -> None:
    thread = InferenceThread(Zeros(), 100, lambda serving: None)
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
