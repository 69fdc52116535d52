"""Making items ahead: all of them, in order, and no more than were allowed."""

import threading
from collections.abc import Iterator

import pytest

from qwenref.ahead import ahead


@pytest.mark.parametrize("most", [1, 2, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 100])
def test_items_come_in_order(most: int, count: int) -> None:
    assert list(ahead(iter(range(count)), most)) == list(range(count))


@pytest.mark.parametrize("most", [1, 2, 16])
def test_no_more_are_made_ahead_than_allowed(most: int) -> None:
    made = 0
    all_made = threading.Semaphore(0)

    def items() -> Iterator[int]:
        nonlocal made
        for item in range(50):
            made += 1
            all_made.release()
            yield item

    for item in ahead(items(), most):
        while made < min(50, item + 1 + most):
            assert all_made.acquire(timeout=60)
        assert made == min(50, item + 1 + most)


@pytest.mark.parametrize("most", [1, 2, 16])
def test_an_error_comes_where_it_happened(most: int) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("here")

    coming = ahead(items(), most)
    assert [next(coming) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="here"):
        next(coming)


def test_what_is_abandoned_is_not_made_to_the_end() -> None:
    made, go_on = [], threading.Event()

    def items() -> Iterator[int]:
        for item in range(100):
            made.append(item)
            yield item
            assert go_on.wait(60)

    coming = ahead(items(), 16)
    assert next(coming) == 0
    threading.Timer(0.05, go_on.set).start()
    coming.close()
    assert len(made) <= 2
