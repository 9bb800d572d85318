"""Compare two checkouts: images a second through HTTP of the new one, relative to the old one.

    python -m bench.versions OLD_CHECKOUT NEW_CHECKOUT [--pairs 15]

Both servers get the same bursts (bench/bursts.py), in turn, pair by pair; one is frozen while the other is measured.
Both have the same costs of passes, which the old server measures once for each model. Otherwise a server that starts at
a noisy moment chooses a poor width and keeps it. Both are started several times. Prints a Markdown table. Takes about
six minutes on two cores.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx

from bench.bursts import BURSTS, Burst, weights_of
from bench.pairs import Pairs, Quartiles, quartiles
from bench.servers import ROOT, Server, frozen

STARTS = 3
STEADY = (ROOT / "bench" / "steady_costs.py").read_text()  # run as text, because an old checkout lacks the file


def costs(checkout: Path, weights: Path) -> str:
    """The costs of passes by width, as a server of this checkout measures them: JSON."""
    measuring = Server("measuring", ["-m", "service"], {"STEPWISE_WEIGHTS": str(weights)}, checkout)
    with frozen(measuring) as server, server.awake():
        info = httpx.get(f"{server.url}/info", trust_env=False).raise_for_status().json()
    return json.dumps(info["seconds_per_step"])


def compared(old: Path, new: Path, burst: Burst, weights: Path, pairs: int) -> Pairs:
    """Images a second of both checkouts."""
    found = Pairs()
    settings = {"STEPWISE_WEIGHTS": str(weights), "COSTS": costs(old, weights)}
    for start in range(STARTS):
        with ExitStack() as stack:
            before, after = (
                stack.enter_context(frozen(Server(name, ["-c", STEADY], settings, checkout)))
                for name, checkout in (("old", old), ("new", new))
            )
            for pair in range(start, pairs, STARTS):
                rates = (partial(burst.images_per_s, server, seed=1000 * pair) for server in (before, after))
                found.measure(*rates)
    return found


def text(of: Quartiles, form: str) -> str:
    return f"{of.median:{form}} ({of.lower:{form}} to {of.upper:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="a folder with the code before")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT", help="a folder with the code now")
    parser.add_argument("--pairs", type=int, default=15, help="how often both are measured; at least 3")
    args = parser.parse_args()
    print("| | old, images/s | new, images/s | new ÷ old | pairs |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for burst in BURSTS:
            weights = weights_of(burst, Path(work))
            found = compared(args.old.resolve(), args.new.resolve(), burst, weights, args.pairs)
            rates = [text(quartiles(rates), ".3g") for rates in (found.first, found.second)]
            print(f"| {burst.name} | {' | '.join(rates)} | {text(found.ratios, '.3f')} | {args.pairs} |", flush=True)


if __name__ == "__main__":
    main()
