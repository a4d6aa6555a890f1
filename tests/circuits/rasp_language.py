"""A small interpreter of RASP (Weiss, Goldberg and Yahav 2021): what emitted programs are held to.

It shares no code with the emitter. Operations bind as in the language's published grammar, `and` and `or` alike and
from the left; a value is a list with an entry for each position, and a selector a row for each query.
"""

import itertools
import operator
import re
from typing import NamedTuple

TOKEN = re.compile(r'\s+|#[^\n]*|"[^"\n]*"|\d+\.\d+|\d+|[A-Za-z_]\w*|==|<=|>=|!=|[-+*/%<>=(){}\[\],;]')
COMPARED = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}
BINDING = {
    "*": 8,
    "/": 8,
    "%": 7,
    "+": 6,
    "-": 6,
    **dict.fromkeys(set(COMPARED) - {"!="}, 5),
    "and": 4,
    "or": 4,
    "if": 3,
    "in": 2,
}
ELEMENTWISE = {
    "*": operator.mul,
    "/": operator.truediv,
    "%": operator.mod,
    "+": operator.add,
    "-": operator.sub,
    **COMPARED,
}


class Selector(NamedTuple):
    """Which keys each query selects."""

    rows: list


class Words(NamedTuple):
    """A list of constants."""

    values: list


def run_rasp(text, tokens):
    """The value that each name has in the end, at every position of the tokens."""
    names = {"tokens": tokens, "indices": list(range(len(tokens))), "length": [len(tokens)] * len(tokens)}
    parser = Parser(text, names, len(tokens))
    parser.statements(names)
    assert parser.here == ""
    return names


class Parser:
    def __init__(self, text, names, n):
        found = TOKEN.findall(text)
        assert "".join(found) == text, "a character that RASP does not know"
        self.words = [word for word in found if not word.isspace() and not word.startswith("#")]
        self.at, self.n, self.globals = 0, n, names

    @property
    def here(self):
        return self.words[self.at] if self.at < len(self.words) else ""

    def take(self, *wanted):
        word = self.here
        assert not wanted or word in wanted, f"{word!r} where {wanted} belongs"
        self.at += 1
        return word

    def statements(self, names):
        while self.here not in ("", "}", "return"):
            self.statement(names)

    def statement(self, names):
        if self.here == "def":
            self.take()
            name = self.take()
            self.take("(")
            arguments = self.names()
            self.take(")")
            names[name] = (arguments, self.skip_block())
        elif self.here == "for":
            self.take()
            [name] = self.names()
            self.take("in")
            values = self.expression(names).values
            start = self.at
            end = self.skip_block() and self.at
            for value in values:
                names[name], self.at = self.spread(value), start
                self.take("{")
                self.statements(names)
                self.take("}")
            self.at = end
        else:
            name = self.take()
            self.take("=")
            names[name] = self.expression(names)
            self.take(";")

    def names(self):
        found = [self.take()]
        while self.here == ",":
            self.take()
            found.append(self.take())
        return found

    def skip_block(self):
        """Where a block in braces begins; what follows it is next."""
        start, depth = self.at, 0
        while True:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
            if depth == 0:
                return start

    def spread(self, value):
        return [value] * self.n

    def expression(self, names, least=0):
        value = self.atom(names)
        while BINDING.get(self.here, -1) >= least:
            word = self.take()
            if word == "if":
                condition = self.expression(names, 0)
                self.take("else")
                # The language's grammar takes three of them from the left.
                other = self.expression(names, BINDING["if"] + 1)
                assert all(isinstance(each, bool) for each in condition)
                value = [one if holds else two for one, holds, two in zip(value, condition, other, strict=True)]
                continue
            other = self.expression(names, BINDING[word] + 1)
            value = self.joined(word, value, other)
        return value

    def joined(self, word, one, two):
        if word == "in":
            return [each in two.values for each in one]
        if isinstance(one, Selector):
            both = {"and": all, "or": any}[word]
            return Selector(
                [[both(pair) for pair in zip(*rows, strict=True)] for rows in zip(one.rows, two.rows, strict=True)]
            )
        if word in ("and", "or"):
            assert all(isinstance(each, bool) for each in (*one, *two))
            return [{"and": all, "or": any}[word](pair) for pair in zip(one, two, strict=True)]
        if word in COMPARED:
            # A word is never equal to a number, and to ask is a mistake.
            assert len({isinstance(each, str) for each in (*one, *two)}) == 1
        return [ELEMENTWISE[word](*pair) for pair in zip(one, two, strict=True)]

    def atom(self, names):
        word = self.take()
        if word == "(":
            value = self.expression(names)
            self.take(")")
            return value
        if word == "-":
            return [-each for each in self.expression(names, 9)]
        if word == "[":
            return Words([each[0] for each in self.arguments(names, "]")])
        if word.startswith('"'):
            return self.spread(word[1:-1])
        if word[0].isdigit():
            return self.spread(float(word) if "." in word else int(word))
        if self.here == "(":
            self.take()
            return self.called(word, names)
        return names[word] if word in names else self.globals[word]

    def arguments(self, names, close=")"):
        found = []
        while self.here != close:
            found.append(self.expression(names))
            if self.here == ",":
                self.take()
        self.take(close)
        return found

    def called(self, word, names):
        if word == "select":
            key = self.expression(names)
            self.take(",")
            query = self.expression(names)
            self.take(",")
            compare = COMPARED[self.take()]
            self.take(")")
            assert len({isinstance(each, str) for each in (*key, *query)}) == 1
            return Selector([[compare(one, other) for one in key] for other in query])
        arguments = self.arguments(names)
        if word in BUILT_IN:
            return BUILT_IN[word](*arguments)
        parameters, start = self.globals[word]
        after, self.at = self.at, start
        inner = dict(zip(parameters, arguments, strict=True))
        self.take("{")
        self.statements(inner)
        self.take("return")
        value = self.expression(inner)
        self.at = after
        return value


def aggregate(selector, values):
    """The mean of what is selected, of one its value, 0 of none."""
    found = []
    for row in selector.rows:
        chosen = list(itertools.compress(values, row))
        found.append(chosen[0] if len(chosen) == 1 else sum(chosen) / len(chosen) if chosen else 0)
    assert len({isinstance(each, str) for each in found}) == 1
    return found


BUILT_IN = {
    "aggregate": aggregate,
    "selector_width": lambda selector: [sum(row) for row in selector.rows],
    "has_focus": lambda selector: [any(row) for row in selector.rows],
    "round": lambda values: [round(each) for each in values],
    "indicator": lambda values: [int(each) for each in values],
    "max": lambda one, two: [max(pair) for pair in zip(one, two, strict=True)],
}
