"""What is refused is refused in a sentence that says no more than it must."""

from dataclasses import replace

import pytest

from service.errors import Invalid
from tests.test_answers import MODEL, SERVED, planned


@pytest.mark.parametrize(
    ("class_names", "said"),
    [
        (("zero", "one", "two"), "must be 0 to 2, or one of zero, one, two, and is 12"),
        (("0", "2", "1"), "must be 0 to 2, or one of 0, 2, 1, and is 12"),
        (("0", "1", "2"), "must be 0 to 2, and is 12"),
        ((), "must be 0 to 2, and is 12"),
    ],
)
def test_class_names_are_told_where_they_are_more_than_the_numbers(class_names: tuple[str, ...], said: str) -> None:
    with pytest.raises(Invalid) as refused:
        planned(replace(SERVED, model=replace(MODEL, class_names=class_names)), class_label=12)
    assert str(refused.value) == f"class_label: {said}"
