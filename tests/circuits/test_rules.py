"""Rules against the tables that they stand for."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from circuits.decompile.rules import Argument, condition, decision_list, write_rules

CELLS = st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 5)), st.sampled_from("abc"), min_size=1)


def argument(name, domain, *, ordered=True):
    write = str if ordered else (lambda value: repr(chr(97 + value)))
    return Argument(name=name, domain=frozenset(domain), write=write, ordered=ordered)


def run_rules(lines, **values):
    text = "\n".join(["def f(one, two):", *("    " + line for line in lines)])
    names = {}
    exec(text, {letter: letter for letter in "abc"}, names)
    return names["f"](**values)


@given(cells=CELLS, default=st.sampled_from("abc"), width=st.integers(20, 80))
def test_rules_say_what_the_table_says(cells, default, width):
    sides = [{cell[at] for cell in cells} for at in (0, 1)]
    arguments = [argument("one", sides[0]), argument("two", sides[1])]
    # What has the default's result alone is not listed; a default that nothing has is no default.
    if default not in cells.values():
        default = next(iter(cells.values()))
    lines = write_rules(decision_list(cells, default), default, arguments, width)
    for (one, two), result in cells.items():
        assert run_rules(lines, one=one, two=two) == result


def test_rules_are_few_where_the_table_is_simple():
    """What is on the left decides; above it, on the right, one row and one column do."""
    cells = {
        (row, column): "a" if column < 3 else "b" if row == 2 or column == 4 else "c"
        for row, column in itertools.product(range(6), range(6))
    }
    lines = write_rules(decision_list(cells, "c"), "c", [argument("one", range(6)), argument("two", range(6))], 80)
    assert lines == [
        "if two <= 2:",
        "    return a",
        "if two == 4:",
        "    return b",
        "if one == 2:",
        "    return b",
        "return c",
    ]


@given(domain=st.sets(st.integers(0, 9), min_size=1), data=st.data(), ordered=st.booleans())
def test_a_condition_is_membership(domain, data, ordered):
    inside = data.draw(st.sets(st.sampled_from(sorted(domain)), min_size=1))
    needed = data.draw(st.sets(st.sampled_from(sorted(inside)), min_size=1))
    test = condition(argument("one", domain, ordered=ordered), frozenset(inside), frozenset(needed))
    assert (test == "") == (inside == domain)
    for value in domain if test else ():
        found = eval(test, {"one": value if ordered else chr(97 + value)})
        assert found in ({True} if value in needed else {False} if value not in inside else {True, False})


def test_conditions_read_as_one_would_write_them():
    numbers = argument("one", range(8))
    words = argument("one", range(8), ordered=False)
    for of, inside, wanted in (
        (numbers, {3}, "one == 3"),
        (numbers, {0, 1, 2}, "one <= 2"),
        (numbers, {5, 6, 7}, "one >= 5"),
        (numbers, {2, 3, 4}, "2 <= one <= 4"),
        (numbers, set(range(8)) - {4}, "one != 4"),
        (numbers, set(range(8)) - {2, 5}, "one not in {2, 5}"),
        (numbers, {1, 4, 6}, "one in {1, 4, 6}"),
        (words, {0, 1}, "one in {'a', 'b'}"),
    ):
        assert condition(of, frozenset(inside), frozenset(inside)) == wanted
    # What need not be covered is where that is shorter, and is not where it is longer.
    assert condition(numbers, frozenset({1, 2, 4, 6}), frozenset({4})) == "one == 4"
    assert condition(numbers, frozenset({0, 1, 2}), frozenset({0, 2})) == "one <= 2"
