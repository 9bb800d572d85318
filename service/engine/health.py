"""The health of the engine: the state of its threads, and the reactions to it.

Questions are answered at once from the known state. `check`, called every second, finds out more: it notices stuck
calls, starts the engine's own probe in doubt, and gives up when only a new process helps.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace

from model.rows import Group, Row
from service.engine.queue import Queue
from service.engine.requests import Clock, Finished, Request, dead, draining, stuck
from service.engine.stage_health import SHORTEST_CALL, Overdue, StageHealth
from service.errors import ComputationFailed

log = logging.getLogger(__name__)

_STALE_AFTER = 20.0  # times a probe's seconds, without work; so probes take at most 5 % of an idle server's time
_GIVE_UP_AFTER = 3.0  # times the seconds that the call was given, from when it is found stuck

PASSES = "a forward pass"
ENCODING = "encoding a text or an upload"
DECODING = "decoding"
CHECKING = "checking an image"


class Health:
    """Knows whether the engine works.

    Args:
        queue: the requests, with the probe among them. Its lock guards this object's state.
        probes: for each group, a row that shows that the model works. The first one runs if no group is suspected.
        begin: hands a probe to its first stage.
        clock: seconds, never falling.

    Attributes:
        stages: the health of each thread, by its work.
        stopped: whether a thread has ended. The other threads then end too.
        beyond_help: why only a new process helps; None while the engine may recover.
    """

    def __init__(
        self,
        queue: Queue,
        probes: Mapping[Group, Row],
        begin: Callable[[Request], None],
        clock: Clock,
    ) -> None:
        self._queue = queue
        self._rows = probes
        self._begin = begin
        self._clock = clock
        self.stages: dict[str, StageHealth] = {}
        self._probe: tuple[Group, Future[Finished]] | None = None  # running, or its end is not noted yet
        self._asked = False  # since the last probe
        self._stuck_since: float | None = None  # when a stuck call was noticed
        self.stopped = False
        self.beyond_help: str | None = None

    def new_stage(self, work: str) -> StageHealth:
        """The health of a new thread, by its work."""
        self.stages[work] = StageHealth(self._clock)
        return self.stages[work]

    # The known state.

    @property
    def overdue(self) -> tuple[str, Overdue] | None:
        """The overdue work and its times, whether or not `check` has noticed."""
        for work, stage in self.stages.items():
            if (overdue := stage.overdue) is not None:
                return work, overdue
        return None

    @property
    def alive(self) -> bool:
        """Whether the engine goes on: no thread has ended, and none is stuck."""
        with self._queue.lock:
            is_stuck = self._stuck_since is not None and self.overdue is not None
            return not (self.stopped or is_stuck or self.beyond_help is not None)

    @property
    def broken(self) -> bool:
        """Whether the probe has failed, and nothing has worked since."""
        return any(stage.broken for stage in self.stages.values())

    @property
    def suspected(self) -> bool:
        """Whether the last call failed. A request may be at fault."""
        return any(stage.suspected for stage in self.stages.values())

    @property
    def in_doubt(self) -> bool:
        """Whether only a probe can tell: the last call failed, or nothing has run for long."""
        return self.suspected or self.stale

    @property
    def stale(self) -> bool:
        """Whether nothing has run for so long that the known state is old."""
        scheduler = self._queue.scheduler
        if scheduler is None:
            return False
        group, row = next(iter(self._rows.items()))
        a_probe_s = len(row.table) * scheduler.machine.passes[group].seconds(1)
        rested_s = min(stage.rest_s for stage in self.stages.values())
        return rested_s > _STALE_AFTER * max(SHORTEST_CALL, a_probe_s)

    # Reactions.

    def asked(self) -> None:
        """Note a question about health. If the known state is stale, the next check starts a probe."""
        self._asked = True

    def probe(self) -> Future[Finished]:
        """The running probe, or a new one. It runs in a suspected group.

        Its text is encoded only if encoding failed last, and its image is decoded only if decoding failed last.

        Raises:
            Unavailable: the engine is loading, stuck or dead.
        """
        with self._queue.lock:
            if not self.alive:
                raise dead() if self.stopped or self.beyond_help is not None else stuck()
            self._note_probe()
            if self._probe is None:
                suspected = {work: stage.suspected for work, stage in self.stages.items()}
                groups = (group for group in self._rows if any(group in its for its in suspected.values()))
                group = next(groups, next(iter(self._rows)))
                row = replace(self._rows[group], latent=group not in suspected.get(DECODING, ()))
                request = self._queue.accept_probe(
                    row.without_contexts() if group in suspected.get(ENCODING, ()) else row
                )
                self._probe = group, request.future
                self._asked = False
                self._begin(request)
            return self._probe[1]

    def _note_probe(self) -> None:
        """Note whether the last probe has failed. A probe that `fail_all` ended, at a hang, has not."""
        if self._probe is None or not self._probe[1].done():
            return
        (group, ended), self._probe = self._probe, None
        if not ended.cancelled() and isinstance(error := ended.exception(), ComputationFailed):
            log.warning("the probe of %s failed: %s", group, error)
            for stage in self.stages.values():
                if group in stage.suspected:  # at least the stage in which the probe failed
                    stage.probe_failed(group)

    def check(self) -> None:
        """Check the engine. To be called every second."""
        with self._queue.lock:
            if self.stopped or self.beyond_help is not None:
                return
            self.reopen()
            self._note_probe()
            found, now = self.overdue, self._clock()
            is_new = found is not None and self._stuck_since is None
            if is_new:
                self._stuck_since = now
                self._queue.close(stuck)
        if found is not None:
            work, (taken_s, given_s) = found
            if is_new:
                log.error("%s has not returned for %.0f s", work, taken_s)
                self._queue.fail_all(stuck)
            elif self._stuck_since is not None and now - self._stuck_since >= _GIVE_UP_AFTER * given_s:
                self.give_up(f"{work} has not returned for {taken_s:.0f} s")
        elif any(stage.hopeless for stage in self.stages.values()):
            self.give_up("the model fails whatever it is given, time after time")
        elif self._queue.scheduler is not None and self._wants_probe(now):
            self.probe()

    def _wants_probe(self, now: float) -> bool:
        """Whether a probe is due.

        Health may be in doubt. Or the present speed alone led to a refusal, and no pass runs to measure the speed.
        """
        idle = not len(self._queue)
        return self.suspected or (self._asked and self.stale) or (idle and now < self._queue.slow_until)

    def reopen(self) -> None:
        """Accept requests again if the stuck call has returned."""
        if self._stuck_since is None or self.overdue is not None or self.stopped or self.beyond_help is not None:
            return
        log.warning("nothing is stuck any longer")
        self._stuck_since = None
        if self._queue.scheduler is not None:
            self._queue.open(self._queue.scheduler)

    def end(self) -> None:
        """Note that a thread has ended. The other threads end too, and all remaining requests get an answer."""
        with self._queue.lock:
            self.stopped = True
            self._queue.stop()
            self._queue.close(dead)
        self._queue.fail_all(draining if self._queue.is_draining else dead)

    def give_up(self, why: str) -> None:
        """Note that only a new process helps, and answer all requests. The server then ends the process."""
        with self._queue.lock:
            if self.beyond_help is not None:
                return
            self.beyond_help = why
            self._queue.close(dead)
            is_loading = self._queue.scheduler is None
        if not is_loading:  # during loading, the start itself reports the reason
            log.critical("%s: only a new process helps", why)
        self._queue.fail_all(dead)
