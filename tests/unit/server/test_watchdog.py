import asyncio
import logging
from collections.abc import Mapping

import pytest
from bilm_server.errors import EngineLostError
from bilm_server.inference import watchdog
from bilm_server.inference.watchdog import Watchdog


class ScriptedEngine:
    """What a watchdog sees, with a script of what happens between its looks."""

    def __init__(self) -> None:
        self.alive = True
        self.models = {"a": True}
        self.lost = False
        self.heartbeats = 0
        self.has_work = False
        self.refusals = 0

    def refuse_pending(self) -> None:
        self.refusals += 1


class Watch:
    """Runs a watchdog look by look, without waiting."""

    def __init__(self, engine: ScriptedEngine, hang_s: float, give_up_s: float) -> None:
        self.said: list[bool] = []
        self.models: Mapping[str, bool] = {}
        self._watchdog = Watchdog(engine, lambda: engine.models, hang_s, give_up_s, self._hear)

    def _hear(self, works: Mapping[str, bool]) -> None:
        self.models = works
        self.said.append(works["a"])

    def look(self, times: int = 1) -> list[bool]:
        self.said.clear()
        for _ in range(times):
            self._watchdog.look()
        return self.said


def test_an_engine_that_moves_or_has_nothing_to_do_works() -> None:
    engine = ScriptedEngine()
    watch = Watch(engine, hang_s=1, give_up_s=2)
    assert watch.look(20) == [True] * 20
    engine.has_work = True
    for _ in range(20):
        engine.heartbeats += 1
        assert watch.look() == [True]


def test_an_engine_that_does_nothing_for_hang_s_hangs_until_it_moves(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine()
    watch = Watch(engine, hang_s=1, give_up_s=100)
    watch.look()
    engine.has_work = True
    assert watch.look(6) == [True, True, True, False, False, False]
    assert engine.refusals == 3
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    engine.heartbeats += 1
    assert watch.look() == [True]


def test_a_failing_model_is_lost_after_give_up_s() -> None:
    engine = ScriptedEngine()
    watch = Watch(engine, hang_s=1, give_up_s=1)
    engine.models["a"] = False
    assert watch.look(4) == [False] * 4
    engine.models["a"] = True
    assert watch.look() == [True]
    engine.models["a"] = False
    watch.look(4)
    with pytest.raises(EngineLostError, match="fails"):
        watch.look()


def test_a_model_that_fails_beside_one_that_works_is_tried_again_for_ever() -> None:
    engine = ScriptedEngine()
    watch = Watch(engine, hang_s=1, give_up_s=1)
    engine.models = {"a": False, "b": True}
    assert watch.look(100) == [False] * 100
    assert watch.models == {"a": False, "b": True}
    engine.models = {"a": False, "b": False}
    watch.look(4)
    with pytest.raises(EngineLostError, match="every model fails"):
        watch.look()


def test_while_the_thread_hangs_no_model_works() -> None:
    engine = ScriptedEngine()
    engine.models, engine.has_work = {"a": True, "b": True}, True
    watch = Watch(engine, hang_s=1, give_up_s=100)
    watch.look(6)
    assert watch.models == {"a": False, "b": False}


def test_a_hung_model_is_lost_after_hang_s_and_give_up_s() -> None:
    engine = ScriptedEngine()
    engine.has_work = True
    watch = Watch(engine, hang_s=1, give_up_s=1)
    watch.look(8)
    with pytest.raises(EngineLostError, match="hangs"):
        watch.look()


def test_a_dead_thread_is_lost_at_once() -> None:
    engine = ScriptedEngine()
    engine.alive = False
    watch = Watch(engine, hang_s=1, give_up_s=100)
    with pytest.raises(EngineLostError, match="ended"):
        watch.look()
    assert watch.said == [False]


def test_a_lost_device_is_lost_at_once() -> None:
    engine = ScriptedEngine()
    engine.models, engine.lost = {"a": False}, True
    watch = Watch(engine, hang_s=1, give_up_s=100)
    with pytest.raises(EngineLostError, match="for good"):
        watch.look()
    assert watch.said == [False]


async def test_it_goes_on_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_INTERVAL_S", 0.001)
    looks = asyncio.Semaphore(0)

    def hear(works: Mapping[str, bool]) -> None:
        looks.release()

    engine = ScriptedEngine()
    task = asyncio.create_task(Watchdog(engine, lambda: engine.models, 1, 1, hear).run())
    for _ in range(5):
        await asyncio.wait_for(looks.acquire(), 10)
    task.cancel()
