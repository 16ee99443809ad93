"""Who holds which page: shared by key, never lost, and the least recently used goes first, the end of a text before
its beginning."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3dist.engine.pages import Pages, page_keys

SIZE = 4


def held(pages: Pages, tokens: list[int]) -> tuple[list[int], list[bytes]]:
    """A row comes with `tokens`: its table, with what is shared, and the keys of its full pages, all kept."""
    keys = page_keys(tokens, pages.page_size)
    table = pages.find(keys)
    pages.hold(table)
    table += [pages.take() for _ in range(pages.cover(len(tokens)) - len(table))]
    for page, key in zip(table, keys):
        pages.keep(page, key)
    return table, keys


def test_keys_are_of_all_tokens_up_to_their_page():
    a, b = page_keys([1] * 12, SIZE), page_keys([2] * 4 + [1] * 8, SIZE)
    assert len(a) == len(b) == 3
    assert len({*a, *b}) == 6  # the same tokens after others are others
    assert page_keys([1] * 13, SIZE) == a and page_keys([1] * 11, SIZE) == a[:2]
    assert page_keys([1, 2, 3, 256], SIZE) != page_keys([1, 2, 3, 0], SIZE)


def test_keys_go_on_from_those_that_are_known():
    tokens = list(range(200_000, 200_050))
    keys = page_keys(tokens, SIZE)
    for known in range(len(keys) + 1):
        assert page_keys(tokens, SIZE, keys[:known]) == keys[known:]


def test_page_0_is_never_given_out():
    pages = Pages(5, SIZE)
    assert sorted(pages.take() for _ in range(4)) == [1, 2, 3, 4]
    assert (pages.available, pages.used, pages.capacity) == (0, 4, 16)


def test_a_prefix_is_shared_and_stays():
    pages = Pages(10, SIZE)
    first, keys = held(pages, [1] * 10)
    pages.release(first, keys)
    assert (pages.used, pages.cached, pages.available) == (0, 2, 9)
    second, more = held(pages, [1] * 8 + [2] * 4)
    third, _ = held(pages, [1] * 8)
    assert second[:2] == first[:2] == third
    assert second[2] not in first[:2]
    pages.release(second, more)
    assert pages.used == 2  # the third has them still
    assert pages.find(more) == second


def test_what_was_not_kept_is_free_at_once():
    pages = Pages(10, SIZE)
    table, keys = held(pages, [1] * 10)
    pages.release(table, keys)
    assert pages.find(page_keys([1] * 12, SIZE)) == table[:2]
    assert pages.cached == 2


def test_the_least_recently_used_goes_first_from_its_end():
    pages = Pages(7, SIZE)
    texts = [[n] * 8 for n in (1, 2, 3)]
    for tokens in texts:
        pages.release(*held(pages, tokens))
    pages.release(*held(pages, texts[0]))  # used again
    left = []
    for _ in range(6):
        pages.take()
        left.append([len(pages.find(page_keys(tokens, SIZE))) for tokens in texts])
    assert left == [[2, 1, 2], [2, 0, 2], [2, 0, 1], [2, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_a_page_that_was_computed_twice_is_kept_once_and_before_what_continues_it():
    """Two rows compute the same first page; the one that did not get it kept goes on longer than the other."""
    pages = Pages(4, SIZE)
    keys = page_keys([1] * 8, SIZE)
    one, two = [pages.take()], [pages.take(), pages.take()]
    pages.keep(one[0], keys[0])
    pages.keep(two[0], keys[0])
    pages.keep(two[1], keys[1])
    pages.release(one, keys[:1])
    pages.release(two, keys)
    assert pages.find(keys) == [one[0], two[1]]
    assert [pages.take(), pages.take(), pages.take()] == [two[0], two[1], one[0]]


def test_a_page_that_is_gone_is_kept_again_by_who_computed_it_too():
    pages = Pages(4, SIZE)
    keys = page_keys([1] * 8, SIZE)
    one, two = [pages.take()], [pages.take(), pages.take()]
    pages.keep(one[0], keys[0])
    pages.keep(two[1], keys[1])
    pages.release(one, keys[:1])
    assert pages.take() == one[0] and pages.find(keys) == []
    pages.release(two, keys)
    assert pages.find(keys) == two


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 12), st.integers(0, 2**32))
def test_nothing_is_lost_and_no_end_outlives_its_beginning(count, seed):
    """Rows with texts that share beginnings come and go at random, some computing what others compute already."""
    chance = random.Random(seed)
    pages = Pages(count, 2)
    rows: list[tuple[list[int], list[bytes]]] = []
    texts = [
        [1] * 2 * chance.randint(0, 3) + [chance.randint(1, 2) for _ in range(chance.randint(0, 5))] for _ in "1234"
    ]
    for _ in range(40):
        tokens = chance.choice(texts)
        if rows and chance.random() < 0.5:
            pages.release(*rows.pop(chance.randrange(len(rows))))
        elif pages.cover(len(tokens)) <= pages.available:
            if chance.random() < 0.5:
                rows.append(held(pages, tokens))
            else:
                rows.append(([pages.take() for _ in range(pages.cover(len(tokens)))], page_keys(tokens, 2)))
                for page, key in zip(*rows[-1]):
                    pages.keep(page, key)
        assert pages.used == len({page for table, _ in rows for page in table})
        assert pages.used + pages.available == count - 1
        mine = {key for _, keys in rows for key in keys}
        for text in texts:
            there = [bool(pages.find([key])) for key in page_keys(text, 2) if key not in mine]
            assert there == sorted(there, reverse=True), "an end whose beginning is gone"
    for row in rows:
        pages.release(*row)
    assert (pages.used, pages.available) == (0, count - 1)
    assert len({pages.take() for _ in range(count - 1)} - {0}) == count - 1


def test_many_tokens_cost_little():
    """A prompt of 100,000 tokens is hashed once through, not once a page from the start."""
    calls = []

    class Counted(list):
        def __getitem__(self, part):
            calls.append(part)
            return super().__getitem__(part)

    tokens = Counted(range(100_000))
    assert len(page_keys(tokens, 128)) == len(calls) == 781
    assert sum(part.stop - part.start for part in calls) <= 100_000


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 8])
def test_cover(tokens):
    assert Pages(9, SIZE).cover(tokens) == (tokens + 3) // 4
