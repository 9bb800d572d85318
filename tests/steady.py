"""python -m tests.steady: the server with fixed costs of passes, the same on every machine.

The widest pass then always pays. Everything else is as in `python -m service`.
"""

from collections.abc import Mapping, Sequence

import pytest

from service.__main__ import main
from service.engine.costs import Costs, Speed


class SteadyCosts(Costs):
    """A pass costs 2 ms plus 0.5 ms per row, whatever the measurements."""

    def __init__(
        self, measured: Mapping[int, float], speed: Speed | None = None, widths: Sequence[int] | None = None
    ) -> None:
        super().__init__({width: 0.002 + 0.0005 * width for width in widths or measured}, speed)

    def follow(self, rows: int, seconds: float) -> None:
        pass


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        for module in ("denoising", "warm_up"):
            patch.setattr(f"service.engine.{module}.Costs", SteadyCosts)
        main()
