"""Places in the queue: free for all until they run short, then shared."""

from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.fairness import Places
from service.http.keys import household

clients = st.sampled_from(("a", "b", "c", "d"))


def fill(places: Places, client: str) -> int:
    """Take as many places as possible."""
    taken = 0
    while places.refusal(client) is None:
        places.take(client)
        taken += 1
    return taken


@given(st.integers(1, 20), st.integers(1, 3), st.lists(st.tuples(st.booleans(), clients), max_size=60))
def test_places_are_free_until_they_run_short_and_then_for_who_holds_least(
    total: int, known: int, events: list[tuple[bool, str]]
) -> None:
    places = Places(total, known)
    held = Counter[str]()
    for comes, client in events:
        refusal = places.refusal(client)
        number = max(known, len({*held, client}))
        if held.total() < total:
            assert refusal is None
        elif number == 1:
            assert refusal == "full"
        elif held[client] * number >= total:
            assert refusal == "share"
        else:
            assert refusal == (None if held.total() < total + -(-total // 8) else "full")
        if comes and refusal is None:
            places.take(client)
            held[client] += 1
        elif not comes and held[client]:
            places.give_back(client)
            held = +(held - Counter((client,)))
        assert places.taken == held.total()
    assert places.taken <= total + -(-total // 8)


@pytest.mark.parametrize("total", [1, 2, 8, 100])
def test_a_lone_client_may_have_them_all(total: int) -> None:
    places = Places(total)
    assert fill(places, "a") == total
    assert places.refusal("a") == "full"
    assert places.total == total


def test_a_lone_client_of_several_may_have_them_all_and_no_more() -> None:
    places = Places(8, clients=2)
    assert fill(places, "a") == 8
    assert places.refusal("a") == "share"
    assert fill(places, "b") == 1


@pytest.mark.parametrize("total", [1, 2, 8, 100])
def test_another_client_is_let_in_where_one_holds_them_all(total: int) -> None:
    places = Places(total)
    fill(places, "a")
    assert places.refusal("b") is None
    assert fill(places, "b") == -(-total // 8)
    assert places.refusal("b") in ("share", "full")
    assert places.refusal("a") == "share"


@pytest.mark.parametrize("total", [2, 7, 8, 100])
@pytest.mark.parametrize("greedy_first", [True, False])
def test_two_clients_cannot_crowd_each_other_out(total: int, greedy_first: bool) -> None:
    """One client takes every free place, first and at every turn. The other still gets its half."""
    places = Places(total)
    fill(places, "greedy")
    line = deque(["greedy"] * total)
    held: list[int] = []
    for _ in range(10 * total):
        for client in ("greedy", "other") if greedy_first else ("other", "greedy"):
            if places.refusal(client) is None:
                places.take(client)
                line.append(client)
        held.append(line.count("other"))
        places.give_back(line.popleft())
    assert min(held[3 * total :]) >= total // 2 - 1
    assert line.count("greedy") >= total // 2 - 1


def test_a_place_given_back_is_free() -> None:
    places = Places(1)
    places.take("a")
    assert places.refusal("a") == "full"
    places.give_back("a")
    assert places.taken == 0
    assert places.refusal("a") is None


def test_who_has_left_is_no_longer_counted() -> None:
    """With two clients, each may hold two of four places. A lone client may hold all."""
    places = Places(4)
    places.take("b")
    places.give_back("b")
    assert fill(places, "a") == 4
    assert places.refusal("a") == "full"


def test_asking_takes_nothing() -> None:
    places = Places(2)
    for client in "abcdef":
        places.refusal(client)
    assert places.taken == 0
    assert fill(places, "a") == 2
    assert places.refusal("a") == "full"


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_who_owns_a_network_of_addresses_is_one_client(host: str, client: str) -> None:
    assert household(host) == client
