"""Which groups are served: as many of those that are wanted as fit into memory."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from model.rows import Group

log = logging.getLogger(__name__)

Made = TypeVar("Made")


def fitting(groups: Sequence[Group], make: Callable[[Group, Made | None], Made | None]) -> dict[Group, Made]:
    """What works on each group, up to the first group that does not fit. The log names those that are left out.

    Args:
        make: makes it, like that of an earlier group; None if it does not fit.
    """
    made: dict[Group, Made] = {}
    for i, group in enumerate(groups):
        one = make(group, next(reversed(made.values()), None))
        if one is None:
            left_out = ", ".join(map(str, groups[i:]))
            log.warning("left out for want of memory: %s; STEPWISE_SIZES names the sizes that must be served", left_out)
            break
        made[group] = one
    return made
