"""python -m tests.steady: the server, with costs of passes that are the same on every machine and at every time.

So a test can say which width pays: the widest. Everything else is `python -m service`.
"""

from collections.abc import Mapping

import pytest

from service.__main__ import main
from service.engine.costs import Costs


class SteadyCosts(Costs):
    """A pass costs 2 ms, and 0.5 ms more for each row. No measurement changes that."""

    def __init__(self, measured: Mapping[int, float], decoding: Costs | None = None) -> None:
        super().__init__({width: 0.002 + 0.0005 * width for width in measured}, decoding)

    def follow(self, rows: int, seconds: float) -> None:
        pass


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        for module in ("denoising", "warm_up"):
            patch.setattr(f"service.engine.{module}.Costs", SteadyCosts)
        main()
