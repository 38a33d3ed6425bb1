"""Keeps forks and calls apart: what gRPC's core does in another thread is never ended in a forked process."""

import os
import threading
import time

_FORK_TIMEOUT_S = 2.0
# gRPC's threads work on a call for a moment after its caller has the result, and nothing says when they are done.
_SETTLE_S = 0.02


class ForkGate:
    """Lets a fork wait for the calls that are under way, and calls that come then for the fork; neither for ever."""

    def __init__(self) -> None:
        self._reset()

    def call(self) -> "_GatedCall":
        """Return a context in which a call counts as under way."""
        return _GatedCall(self)

    def enter(self) -> threading.Condition:
        """Count a call; return what `leave` takes."""
        state = self._changed
        with state:
            if self._forking:
                state.wait_for(lambda: not self._forking, _FORK_TIMEOUT_S)
            self._under_way += 1
            self._used = True
        return state

    def leave(self, state: threading.Condition) -> None:
        """Count a call no more."""
        with state:
            self._under_way -= 1
            if self._forking:
                state.notify_all()

    def before_fork(self) -> None:
        """Hold new calls, and wait for the others."""
        with self._changed:
            self._forking = True
            self._changed.wait_for(lambda: not self._under_way, _FORK_TIMEOUT_S)
        if self._used:
            time.sleep(_SETTLE_S)

    def after_fork(self) -> None:
        """Let calls continue, in the parent."""
        with self._changed:
            self._forking = False
            self._changed.notify_all()

    def _reset(self) -> None:
        """Start anew, in the child: the parent's calls and locks are not its own."""
        self._changed = threading.Condition()
        self._forking = False
        self._under_way = 0
        self._used = False

    def register(self) -> None:
        """Take part in the forks of this process."""
        os.register_at_fork(before=self.before_fork, after_in_parent=self.after_fork, after_in_child=self._reset)


class _GatedCall:
    """A call under way; a class, because a generator's context costs a call as much again."""

    __slots__ = ("_gate", "_state")

    def __init__(self, gate: ForkGate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._state = self._gate.enter()

    def __exit__(self, *_: object) -> None:
        self._gate.leave(self._state)


FORK_GATE = ForkGate()
FORK_GATE.register()
