"""Jobs that threads take: the helper's life, and that each job is done once, whoever takes it."""

import ctypes
import gc
import threading
from collections.abc import Callable

import pytest
import torch
from bilm_model.config import SIZES
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.engine.cpu.jobs import Helper
from bilm_model.engine.cpu.recurrence import LaneWork, PanelRecurrence, RecurrenceTeam, Threads
from torch import Tensor

CONFIG = SIZES["tiny"]
TIME_LIMIT_S = 60
N_ROWS, N_TICKS = 100, 5


def noting(rounds: list[int], looked: threading.Semaphore) -> Callable[[int], None]:
    """Return what a helper does: note the board that it looks at, and fall asleep."""

    def follow(board: int) -> None:
        (ctypes.c_int64 * 24).from_address(board)[16] = 1
        rounds.append(board)
        looked.release()

    return follow


def test_a_helper_looks_at_its_board_each_time_it_is_woken() -> None:
    rounds: list[int] = []
    looked = threading.Semaphore(0)
    helper = Helper(noting(rounds, looked))
    assert not rounds
    for n in range(1, 4):
        helper.wake()
        assert looked.acquire(timeout=TIME_LIMIT_S)
        assert rounds == [helper.board] * n


def test_a_helper_ends_with_its_owner() -> None:
    looked = threading.Semaphore(0)
    helper = Helper(noting([], looked))
    before = set(threading.enumerate())
    helper.wake()
    (thread,) = set(threading.enumerate()) - before
    assert looked.acquire(timeout=TIME_LIMIT_S)
    del helper
    gc.collect()
    thread.join(TIME_LIMIT_S)
    assert not thread.is_alive()


def test_a_helper_whose_thread_is_gone_is_started_again() -> None:
    def follow(board: int) -> None:  # it ends the thread, as a fork does for the child
        (ctypes.c_int64 * 24).from_address(board)[16:18] = [1, 1]
        looked.release()

    looked = threading.Semaphore(0)
    helper = Helper(follow)
    before = set(threading.enumerate())
    helper.wake()
    (thread,) = set(threading.enumerate()) - before
    assert looked.acquire(timeout=TIME_LIMIT_S)
    helper.wake()
    thread.join(TIME_LIMIT_S)
    assert not thread.is_alive()
    helper.wake()
    assert looked.acquire(timeout=TIME_LIMIT_S)


def cells() -> list[tuple[PanelRecurrence, LaneWork]]:
    """Two cells, and work for them in which rows end and begin."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for table in (True, False):
        lstm = ClippedProjectedLstm(CONFIG)
        for parameter in lstm.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        recurrence = PanelRecurrence.of(lstm, CONFIG)
        if recurrence is None:
            pytest.skip("oneDNN's order of sums isn't known here")
        sizes = [N_ROWS - 7 * tick for tick in range(N_TICKS)]
        n_steps = sum(sizes)
        work = LaneWork(
            x=torch.randn(n_steps, 4 * CONFIG.cell_dim if table else CONFIG.projection_dim, generator=generator),
            index=torch.randperm(n_steps, generator=generator) if table else None,
            h=torch.randn(N_ROWS, CONFIG.projection_dim, generator=generator),
            c=torch.randn(N_ROWS, CONFIG.cell_dim, generator=generator),
            slots=torch.randperm(N_ROWS, generator=generator),
            fresh=torch.rand(n_steps, generator=generator) < 0.2,
            ticks=torch.tensor(sizes),
        )
        found.append((recurrence, work))
    return found


def run(n_threads: int, threads: Threads, times: int = 1) -> list[Tensor]:
    """Return what the cells give, and their state, after the last of so many runs."""
    its_cells = cells()
    team = RecurrenceTeam(its_cells[0][0], n_threads)
    outputs: list[Tensor] = []
    for _ in range(times):
        outputs = team.run(its_cells, threads)
    return [*outputs, *(state for _, work in its_cells for state in (work.h, work.c))]


@pytest.mark.parametrize(("n_threads", "threads"), [(2, "helper"), (2, "team"), (5, "team"), (1, "team")])
def test_the_threads_change_no_bit(n_threads: int, threads: Threads) -> None:
    expected = run(1, "caller", times=20)
    found = run(n_threads, threads, times=20)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
