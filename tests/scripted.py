"""Clients of the engine of tests.engines. They follow a script, and know which results are allowed."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from hypothesis import strategies as st

from service.engine.requests import Finished
from service.errors import ComputationFailed, DeadlinePassed, Failed, Invalid, Unavailable
from tests.engines import LONG, Diary, Setting, a_decoded, a_row, an_image, images_of


@dataclass(frozen=True)
class Submit:
    """A request.

    Attributes:
        rows: for each row its steps, whether it is guided, and its fate.
        latent: whether the client wants latents, which are not decoded.
    """

    rows: tuple[tuple[int, bool, str], ...]
    timeout_s: float
    client: str
    watched: bool
    latent: bool = False


@dataclass(frozen=True)
class Cancel:
    pick: int  # index in the list of all requests, modulo its length


@dataclass(frozen=True)
class Wait:
    """Time passes during a call. Then the health check looks whether the engine is stuck."""

    seconds: float


Action = Submit | Cancel | Wait
Script = list[tuple[str, list[Action]]]  # actions inside one of the engine's calls to its runner or VAE

FATES = ("good", "good", "good", "good", "refused", "breaking", "poisoned")
DECODED_FATES = ("breaks when decoded", "is NaN when decoded")


def scripts(calls: Sequence[str], fates: Sequence[str], latents: bool = False) -> st.SearchStrategy[Script]:
    submissions = st.builds(
        Submit,
        st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.sampled_from(fates)), min_size=1, max_size=4).map(
            tuple
        ),
        st.sampled_from((LONG, LONG, 3.0, 6.0, 12.0)),
        st.sampled_from("abc"),
        st.booleans(),
        st.booleans() if latents else st.just(False),
    )
    actions = st.one_of(
        submissions, submissions, st.integers(0, 99).map(Cancel), st.sampled_from((0.1, 2.0, 16.0)).map(Wait)
    )
    return st.lists(st.tuples(st.sampled_from(calls), st.lists(actions)), max_size=16)


class Client:
    """Plays a script of actions, and records their results."""

    def __init__(self, s: Setting) -> None:
        self.s = s
        self.jobs: dict[Future[Finished], tuple[Submit, list[int]]] = {}
        self.refused = 0
        self.seeds = itertools.count(1)
        self.fated = {
            "good": set[int](),
            "refused": s.runner.refused,
            "breaking": s.runner.breaking,
            "poisoned": s.runner.poisoned,
        }
        if s.decoder is not None:
            self.fated |= dict(zip(DECODED_FATES, (s.decoder.breaking, s.decoder.poisoned), strict=True))

    def play(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Submit():
                    self.submit(action)
                case Cancel() if self.jobs:
                    list(self.jobs)[action.pick % len(self.jobs)].cancel()
                case Wait():
                    self.s.clock.advance(action.seconds)
                    self.s.engine.check_health()

    def submit(self, action: Submit) -> Future[Finished] | None:
        """The request's Future; None if it was refused."""
        mine = [next(self.seeds) for _ in action.rows]
        rows = []
        for seed, (steps, guided, fate) in zip(mine, action.rows, strict=True):
            rows.append(a_row(seed, steps, guided, action.latent))
            self.fated[fate].add(seed)
        try:
            watcher = Diary(preview_every=1) if action.watched else None
            job = self.s.accept(*rows, timeout_s=action.timeout_s, client=action.client, watcher=watcher).future
        except (Unavailable, Invalid):
            self.refused += 1
            return None
        self.jobs[job] = action, mine
        return job

    def check_ends(self) -> None:
        """Check that every request has an allowed result, and that the observer recorded it."""
        ends: Counter[str] = Counter()
        for job, (submitted, mine) in self.jobs.items():
            decoded = self.s.decoder is not None and not submitted.latent
            harmless = {"good"} if decoded else {"good", *DECODED_FATES}
            is_good = {fate for _, _, fate in submitted.rows} <= harmless
            if job.cancelled():
                ends["disconnect"] += 1
            elif (error := job.exception(0)) is None:
                ends["finished"] += 1
                assert is_good
                steps = [steps for steps, _, _ in submitted.rows]
                made = a_decoded if decoded else an_image
                assert images_of(job) == [made(*row) for row in zip(mine, steps, strict=True)]
            elif isinstance(error, DeadlinePassed):
                ends["timeout"] += 1
                assert submitted.timeout_s < LONG
            else:
                ends["failed"] += 1
                assert isinstance(error, Failed) or (isinstance(error, ComputationFailed) and not is_good)
        told = Counter(end if isinstance(end, str) else "finished" for end in self.s.observer.ended)
        assert told == ends
        assert self.s.observer.accepted == len(self.jobs)
        assert len(self.s.observer.refused) == self.refused
