"""What is done after a failure, without a worker."""

import pytest
from bilm_model.engine.types import Capacity
from bilm_server.inference.recovery import Recovery
from bilm_server.inference.types import Call, Sentence

from tests.support.fake_engine import FakeEngine
from tests.support.sentences import new_sentence


@pytest.fixture
def engine() -> FakeEngine[Sentence]:
    return FakeEngine(Capacity(8, 100))


@pytest.fixture
def recovery(engine: FakeEngine[Sentence]) -> Recovery:
    return Recovery(engine)


def sentences(*words: str) -> list[Sentence]:
    return [new_sentence(Call(), word) for word in words]


def test_suspects_come_back_in_halves(recovery: Recovery) -> None:
    first, second, third, last = found = sentences("a", "b", "c", "d")
    recovery.bisect(found)
    assert recovery.n_suspects == 4
    assert recovery.next_group() == [first, second]
    recovery.bisect([first, second])
    assert [recovery.next_group() for _ in range(3)] == [[first], [second], [third, last]]
    assert not recovery
    assert recovery.n_suspects == 0


@pytest.mark.parametrize(("n", "sizes"), [(0, []), (1, [1]), (2, [1, 1]), (3, [1, 2])])
def test_no_group_is_empty(recovery: Recovery, n: int, sizes: list[int]) -> None:
    recovery.bisect(sentences(*["a"] * n))
    groups = []
    while recovery:
        groups.append(recovery.next_group())
    assert [len(group) for group in groups] == sizes


def test_draining_takes_all_suspects(recovery: Recovery) -> None:
    found = sentences("a", "b", "c")
    recovery.bisect(found)
    assert set(recovery.drain()) == set(found)
    assert not recovery


def test_sentences_that_can_join_do_so_although_others_cannot(recovery: Recovery, engine: FakeEngine[Sentence]) -> None:
    good, unfit, other = sentences("a", "unfit", "b")
    assert recovery.join([good, unfit, other]) == [unfit]
    assert engine.in_flight == 2
    assert recovery.join(sentences("c")) == []


def test_an_engine_that_can_drop_nothing_either_is_an_error(recovery: Recovery, engine: FakeEngine[Sentence]) -> None:
    class Stuck(FakeEngine[Sentence]):
        def drop(self, sentences: object) -> None:
            raise RuntimeError("it can't leave")

    with pytest.raises(RuntimeError, match="leave"):
        Recovery(Stuck()).join(sentences("unfit"))


def test_a_probe_drops_what_is_in_flight_and_says_whether_the_engine_works(
    recovery: Recovery, engine: FakeEngine[Sentence]
) -> None:
    recovery.join(sentences("a"))
    engine.broken = 1
    assert not recovery.probe()
    assert engine.in_flight == 0
    assert recovery.probe()


def test_a_self_check_says_whether_the_result_is_the_expected_one(
    recovery: Recovery, engine: FakeEngine[Sentence]
) -> None:
    assert recovery.check()
    engine.broken = 1
    assert not recovery.check()
