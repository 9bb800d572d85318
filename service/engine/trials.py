"""Trials: passes at another width than the working one, to learn whether that has become better. Pure Python.

A width that looked bad is never run again, so a noisy start would last for ever. Trials take at most a small share of
the time of all passes.
"""

from collections.abc import Iterable, Mapping

SHARE = 0.02  # of the time of passes, for trials
_ABOUT = 0.9  # of the price of the next trial; prices move with the speed of the machine


class Trials:
    """The time that trials may take, and the width to try next.

    Args:
        widths: at which passes run.
    """

    def __init__(self, widths: Iterable[int]) -> None:
        self._seen = dict.fromkeys(widths, 0)  # by width, the number of the last pass that had it
        self._passes = 0
        self._saved = 0.0  # seconds
        self._enough = 0.0  # seconds; with less, no trial can be due
        self._trying: int | None = None

    @property
    def may_be_due(self) -> bool:
        """Whether the time saved is about enough for a trial. Each pass asks, so this is quick."""
        return self._saved >= self._enough

    def due(self, prices: Mapping[int, float], unknown: Iterable[int]) -> int | None:
        """The width to try now; None if trials have had their share of the time.

        Args:
            prices: the expected seconds of a trial, by width.
            unknown: widths that were never measured; they are tried first.
        """
        if not prices:
            return None
        self._saved = min(self._saved, max(prices.values()))  # so that no burst of trials comes
        candidates = [width for width in unknown if width in prices] or prices
        width = min(candidates, key=lambda one: (self._seen[one], one))
        self._enough = _ABOUT * prices[width]
        return width if prices[width] <= self._saved else None

    def begin(self, width: int) -> None:
        """The next pass is a trial of this width."""
        self._trying = width

    def note(self, width: int, is_full: bool, seconds: float) -> bool:
        """Note a pass that has ended. Returns whether it was a trial."""
        self._passes += 1
        is_trial = is_full and width == self._trying
        self._trying = None
        self._seen[width] = self._passes
        self._saved += SHARE * seconds - (seconds if is_trial else 0.0)
        return is_trial
