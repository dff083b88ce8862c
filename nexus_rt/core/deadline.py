"""Calls with a time limit, in threads that no exit waits for: what hangs cannot be stopped, only
left."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

T = TypeVar("T")


def begin(call: Callable[[], T]) -> Future[T]:
    """A call in a thread of its own; its future can be cancelled, which leaves the call behind."""
    future: Future[T] = Future()

    def work() -> None:
        with contextlib.suppress(InvalidStateError):  # nobody waits any more
            try:
                result = call()
            except BaseException as error:  # the caller's
                future.set_exception(error)
            else:
                future.set_result(result)

    threading.Thread(target=work, daemon=True, name="nexus-rt call").start()
    return future


def result_within(future: Future[T], seconds: float) -> T:
    """A call's result.

    Raises:
        TimeoutError: none within `seconds`. CancelledError: the future was cancelled.
    """
    try:
        future.exception(seconds)
    except concurrent.futures.TimeoutError:  # in Python 3.10 not the built-in one
        raise TimeoutError(f"no answer within {seconds:.3g} s") from None
    return future.result()
