"""Signals that the suite inherits: `nohup`, a shell's background job and some CI runners ignore or block a few."""

import signal
from types import FrameType

# Python itself ignores these, and `subprocess` restores them in each child.
_RESTORED_BY_SUBPROCESS = {signal.SIGPIPE, signal.SIGXFSZ}


def reset_inherited_signals() -> None:
    """Let every process that is started from now on have the default action of each signal, none blocked.

    An ignored signal stays without effect in this process: `nohup` goes on protecting the run. It gets a handler that
    does nothing, because a handler, unlike SIG_IGN, isn't inherited by another program. Call this in the main thread,
    before there are others: threads inherit the mask.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - _RESTORED_BY_SUBPROCESS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _do_nothing)
            signal.siginterrupt(number, False)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal by nothing."""
