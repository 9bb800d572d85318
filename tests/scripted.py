"""Clients of the engine of tests.engines. They follow a script, and know which results are allowed."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from service.engine.requests import Finished, Upload
from service.errors import ComputationFailed, DeadlinePassed, Failed, Invalid, Refused, Unavailable
from tests.engines import LONG, Diary, FakeEncoding, Setting, a_decoded, a_row, a_text_row, an_image, images_of, pixels


@dataclass(frozen=True)
class Submit:
    """A request.

    Attributes:
        rows: for each row its steps, whether it is guided, and its fate.
        latent: whether the client wants latents, which are not decoded.
        answer: whether the answer is encoded, and its fate.
        uploaded: whether it has an upload, which is encoded first.
        tokens: of the texts of all of its rows, which are encoded first; none for rows without texts.
    """

    rows: tuple[tuple[int, bool, str], ...]
    timeout_s: float
    client: str
    watched: bool
    latent: bool = False
    answer: str = "none"
    uploaded: bool = False
    tokens: tuple[int, ...] = ()


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
ANSWERS = ("good", "good", "whole at the end", "breaks")
DECODED_FATES = ("breaks when decoded", "is NaN when decoded")
TEXT_FATES = {"breaks": 90, "is NaN": 91}  # tokens
CHECK_FATES = ("is refused", "breaks when checked", "fails when checked")


def scripts(
    calls: Sequence[str], fates: Sequence[str], latents: bool = False, texts: bool = False
) -> st.SearchStrategy[Script]:
    """Scripts. With `texts`, rows have texts, and their images are checked."""
    fates = (*fates, *CHECK_FATES) if texts else fates
    tokens = st.lists(st.sampled_from((1, 2, 3, 4, 5, 6, *TEXT_FATES.values())), min_size=1, max_size=3, unique=True)
    submissions = st.builds(
        Submit,
        st.lists(
            st.tuples(st.integers(0 if latents else 1, 4), st.booleans(), st.sampled_from(fates)),
            min_size=1,
            max_size=4,
        ).map(tuple),
        st.sampled_from((LONG, LONG, 3.0, 6.0, 12.0)),
        st.sampled_from("abc"),
        st.booleans(),
        st.booleans() if latents else st.just(False),
        st.sampled_from(("none", *ANSWERS)),
        st.booleans() if latents else st.just(False),
        tokens.map(tuple) if texts else st.just(()),
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
        if s.image_check is not None:
            check = s.image_check
            self.fated |= dict(zip(CHECK_FATES, (check.refusing, check.breaking, check.failing), strict=True))

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
            row = a_row(seed, steps, guided, action.latent)
            if action.tokens:
                row = a_text_row(seed, *action.tokens, steps=steps, latent=action.latent)
            rows.append(row if steps else replace(row, start=pixels(seed, 0)))
            self.fated[fate].add(seed)
        encoding = None if action.answer == "none" else FakeEncoding(*((0, 1) if "whole" in action.answer else (1, 0)))
        if encoding is not None and action.answer == "breaks":
            encoding.breaking = {0}
        upload = Upload([pixels(mine[0], 0)], lambda _: (rows, encoding)) if action.uploaded else None
        try:
            watcher = Diary(preview_every=1) if action.watched else None
            accepted = self.s.engine.submit(rows, action.timeout_s, action.client, encoding, watcher, upload)
        except (Unavailable, Invalid):
            self.refused += 1
            return None
        self.jobs[accepted.future] = action, mine
        return accepted.future

    def check_ends(self) -> None:
        """Check that every request has an allowed result, and that the observer recorded it."""
        ends: Counter[str] = Counter()
        for job, (submitted, mine) in self.jobs.items():
            decoded = self.s.decoder is not None and not submitted.latent
            harmless = {"good"} if decoded else {"good", *DECODED_FATES}
            # Rows without steps meet no runner, and rows of an upload meet the VAE too.
            fates = {fate for steps, _, fate in submitted.rows if steps or fate in ("good", *DECODED_FATES)}
            is_good = fates <= harmless and submitted.answer != "breaks"
            is_good = is_good and not set(submitted.tokens) & set(TEXT_FATES.values())
            if submitted.uploaded and submitted.rows[0][2] in DECODED_FATES:
                is_good = False
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
            elif isinstance(error, Refused):
                ends["refused"] += 1
                assert "is refused" in fates
            else:
                ends["failed"] += 1
                assert isinstance(error, Failed) or (isinstance(error, ComputationFailed) and not is_good)
        told = Counter(end if isinstance(end, str) else "finished" for end in self.s.observer.ended)
        assert told == ends
        assert self.s.observer.accepted == len(self.jobs)
        assert len(self.s.observer.refused) == self.refused
