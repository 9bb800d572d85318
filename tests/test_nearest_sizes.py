"""The served size for a size that is not served."""

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from model.rows import Group
from service.plan.sizes import nearest
from tests.properties import examples

SIDES = st.integers(1, 4096)
GROUPS = st.builds(Group, SIDES, SIDES)
SERVED = st.lists(GROUPS, min_size=1, max_size=8, unique=True)


@examples(100)
@given(SERVED, GROUPS)
def test_no_served_size_is_nearer_in_aspect_and_among_equals_none_in_pixels(served: list[Group], wanted: Group) -> None:
    found = nearest(*wanted, served)
    assert found in served

    def distance(group: Group) -> tuple[float, float]:
        aspect = Fraction(group.width * wanted.height, group.height * wanted.width)
        pixels = Fraction(group.height * group.width, wanted.height * wanted.width)
        return abs(math.log(aspect)), abs(math.log(pixels))

    assert all(distance(found)[0] <= distance(group)[0] + 1e-8 for group in served)
    equals = [group for group in served if group.width * found.height == group.height * found.width]
    assert all(distance(found)[1] <= distance(group)[1] + 1e-8 for group in equals)


@examples(50)
@given(SERVED, st.data())
def test_a_served_size_is_nearest_to_itself_and_turning_all_turns_the_answer(
    served: list[Group], data: st.DataObject
) -> None:
    group = data.draw(st.sampled_from(served))
    assert nearest(*group, served) == group
    turned = [Group(width, height) for height, width in served]
    assert nearest(group.width, group.height, turned) == Group(group.width, group.height)


def test_a_square_is_drawn_for_any_square_and_a_portrait_for_a_portrait() -> None:
    served = [Group(512, 512), Group(768, 512), Group(512, 768), Group(640, 640)]
    assert nearest(1024, 1024, served) == Group(640, 640)
    assert nearest(256, 256, served) == Group(512, 512)
    assert nearest(1792, 1024, served) == Group(768, 512)
    assert nearest(1, 4096, served) == Group(512, 768)
