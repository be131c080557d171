"""Waiting for a state with a ceiling. The only place in the tests that lets time pass."""
import time


class NeverHappened(AssertionError):
    """What was waited for, for how long, and what was seen last."""


class StopWaiting(AssertionError):
    """Raised by a probe that has seen that it will never happen any more."""


def eventually(what, probe, *, within, every=0.05):
    """Calls `probe` until it returns something true, and returns that.

    A probe that raises counts as "not yet" (but for StopWaiting); the last thing seen, value or error, is in the failure.
    """
    deadline = time.monotonic() + within
    while True:
        error = None
        try:
            seen = probe()
            if seen:
                return seen
        except StopWaiting:
            raise
        except Exception as problem:  # Whatever it is, it is shown when the time is over.
            seen, error = f"{type(problem).__name__}: {problem}", problem
        if time.monotonic() >= deadline:
            raise NeverHappened(f"waited {within:g} s for: {what}. Last seen: {seen!r}") from error
        time.sleep(every)
