"""Cuts long work in Python into pieces. Between two pieces, passes get the interpreter's lock.

A thread that waits for the lock gets it after 5 ms, and a pass asks for it several times. Without rests between
pieces, a few large uploads make a pass of 2 ms take five times as long.
"""

import time
from collections.abc import Iterator

Bytes = bytes | bytearray  # of a body, or of a file in it

PIECE = 2**16  # bytes; searching a piece takes less than half a millisecond
_REST_S = 1e-5  # any rest gives the lock away; the system makes about 70 µs of it


def pieces(size: int) -> Iterator[int]:
    """The first byte of each piece of `size` bytes. The event loop's thread must not call this: the call rests."""
    for begin in range(0, size, PIECE):
        if begin:
            rest()
        yield begin


def rest() -> None:
    """Give the lock to the threads that wait for it."""
    time.sleep(_REST_S)
