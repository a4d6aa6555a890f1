"""A discrete program in RASP, the language of Weiss, Goldberg and Yahav, "Thinking Like Transformers" (2021).

Its input is the sequence with its frame, `<s>` first; its output is `answer`, at every letter. A line that gives a name
a new value where something holds is a rule; of several that hold the last decides. What is asked stands in brackets, so
that no order of operations matters. A categorical head may have many matches, which RASP would average: `nearest` finds
the place first, and what stands there is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

import numpy as np

from circuits.decompile.layout import quoted
from circuits.decompile.python import Interface, Names
from circuits.decompile.ranges import Ranges
from circuits.decompile.rules import Argument, Cell, decision_list
from circuits.decompile.simplify import Live
from circuits.decompile.votes import tally
from circuits.decompile.writing import closed_forms
from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    NumericalHead,
    NumericalMLP,
    NumericalTree,
    Part,
    Split,
)

NEAREST = """# The nearest place of a selector: of two the earlier, the own place last; place 0 if there is none.
def nearest(matches) {{
    found = indices if has_focus(matches and select(indices, indices, ==)) else 0;
    for step in [{steps}] {{
        found = (indices + step) if has_focus(matches and select(indices, indices + step, ==)) else found;
        found = (indices - step) if has_focus(matches and select(indices, indices - step, ==)) else found;
    }}
    return found;
}}
"""
INPUTS = {"positions": "indices", "ones": "1"}
NO_WORD, NO_NUMBER = '""', "-1"
"""What is wanted where nothing is."""


def emit_rasp(program: DiscreteProgram, ranges: Ranges, live: Live, interface: Interface) -> str:
    """The program's text."""
    names = Names(program, ranges)
    parts = live.parts(program)
    lines = [
        f"# {interface.title}",
        "# Written by the Interp Workbench from a discretised Transformer Program (Friedman et al. 2023).",
        f"# Input: {_frame(program, interface)}. Output: answer, at the letters.",
        "",
    ]
    if any(isinstance(part.does, CategoricalHead) for part in parts):
        steps = ", ".join(str(step) for step in reversed(range(1, program.shape.n_ctx)))
        lines += NEAREST.format(steps=steps).splitlines() + [""]
    if program.shape.causal:
        lines += ["seen = select(indices, indices, <=);", ""]
    body = _codes(program, names, interface)
    for part in parts:
        body += _part(part, program, names)
    body += ["", *_votes(program, names, live), ""]
    # Only what is used is written.
    used = "\n".join(body)
    lines += [f"{name} = {text};" for name, text in INPUTS.items() if name in used]
    return "\n".join([*lines, used])


def _frame(program: DiscreteProgram, interface: Interface) -> str:
    end = "" if interface.end is None else f', "{program.vocab[interface.end]}"'
    return f'["{program.vocab[interface.begin]}", 1 to {interface.longest} letters{end}]'


def _codes(program: DiscreteProgram, names: Names, interface: Interface) -> list[str]:
    """The variables that tokens are made of, where these are not the tokens themselves."""
    if names.plain:
        return []
    ends = [] if interface.end is None else [interface.end]
    tokens = [*range(interface.letters), interface.begin, *ends]
    words = Argument(name="tokens", domain=frozenset(tokens), write=lambda at: quoted(program.vocab[at]), ordered=False)
    return [
        line
        for column in range(program.embedding.shape[1])
        for line in _rules(
            names.categorical[column], {(token, 0): str(program.embedding[token, column]) for token in tokens}, [words]
        )
    ]


def _part(part: Part, program: DiscreteProgram, names: Names) -> list[str]:
    """The lines of one variable."""
    match part.does:
        case CategoricalHead() as head:
            lines = _matches(part.name, head, program, names)
            places = f"select(indices, nearest(found_by_{part.name}), ==)"
            return [*lines, f"{part.name} = aggregate({places}, {names.categorical[head.value]});"]
        case NumericalHead() as head:
            lines, found = _matches(part.name, head, program, names), f"found_by_{part.name}"
            # A mean times the number of what it is of.
            mean = f" * aggregate({found}, {names.numerical[head.value]})" if head.value else ""
            return [*lines, f"{part.name} = round(selector_width({found}){mean});"]
        case CategoricalTable() as mlp:
            pairs = names.ranges.pairs[part.name]
            assert pairs is not None
            arguments = [names.argument(names.categorical[read], read) for read in mlp.reads]
            return _rules(part.name, {pair: str(mlp.table[pair]) for pair in pairs}, arguments)
        case NumericalTree() as tree:
            return _leaves(part.name, tree.root, [names.numerical[read] for read in tree.reads])
        case NumericalMLP() as mlp:
            pairs = names.ranges.pairs[part.name]
            if pairs is None:
                return _arithmetic(part.name, mlp, [names.numerical[read] for read in mlp.reads])
            listed = sorted(pairs)
            domains = [frozenset(column) for column in zip(*listed, strict=True)]
            arguments = [
                Argument(name=names.numerical[read], domain=domain, write=str, ordered=True)
                for read, domain in zip(mlp.reads, domains, strict=True)
            ]
            results = map(str, mlp(np.array(listed)).tolist())
            return _rules(part.name, dict(zip(listed, results, strict=True)), arguments)


def _matches(name: str, head: CategoricalHead | NumericalHead, program: DiscreteProgram, names: Names) -> list[str]:
    """The selector of a head, and above it what is wanted where that is more than a copy of the query."""
    query, key = (names.argument(names.categorical[each], each) for each in (head.query, head.key))
    wanted = {value: int(head.predicate[value]) for value in sorted(query.domain)}
    none = NO_NUMBER if key.ordered else NO_WORD
    form, agrees = max(closed_forms(wanted, query, key), key=lambda each: len(each[1]))
    text = form.replace("query", query.name).replace("None", none)
    lines = []
    if len(agrees) < len(wanted):
        texts = {value: key.write(found) if found in key.domain else none for value, found in wanted.items()}
        cells = {(value, 0): text if value in agrees else found for value, found in texts.items()}
        lines = _rules(f"wanted_by_{name}", cells, [query], default=text)
        text = f"wanted_by_{name}"
    select = f"select({key.name}, {text}, ==)" + (" and seen" if program.shape.causal else "")
    return [*lines, f"found_by_{name} = {select};"]


def _rules(
    name: str, results: Mapping[Cell, str], arguments: Sequence[Argument], default: str | None = None
) -> list[str]:
    """A function of one or two variables: its commonest value unless another is given, and rules for the others."""
    if len(arguments) == 2 and arguments[0].name == arguments[1].name:
        arguments = arguments[:1]
        results = {(one, 0): result for (one, _), result in results.items()}
    values = list(results.values())
    default = default or max(dict.fromkeys(sorted(values)), key=values.count)
    lines = [f"{name} = {default};"]
    for rule in reversed(decision_list(results, default)):
        tests = [
            _test(argument, inside, needed)
            for argument, inside, needed in zip(arguments, rule.inside, rule.needed, strict=False)
        ]
        lines.append(f"{name} = {rule.result} if {_all(filter(None, tests))} else {name};")
    return lines


def _all(tests: Iterable[str]) -> str:
    """Whether all hold."""
    first, *others = tests
    for each in others:
        first = f"({first} and {each})"
    return first


def _test(argument: Argument, inside: frozenset[int], needed: frozenset[int]) -> str:
    """Whether an argument is one of the values, in brackets; empty where it always is."""
    domain = sorted(argument.domain)
    if argument.domain <= inside:
        return ""
    values = sorted(needed)
    first, last = domain.index(values[0]), domain.index(values[-1])
    if len(values) == 1:
        return f"({argument.name} == {argument.write(values[0])})"
    if argument.ordered and last - first + 1 == len(values):
        low, high = (f"({argument.name} {sign} {end})" for sign, end in ((">=", values[0]), ("<=", values[-1])))
        return high if first == 0 else low if last == len(domain) - 1 else f"({low} and {high})"
    return f"({argument.name} in [{', '.join(map(argument.write, values))}])"


def _leaves(name: str, node: Split | int, numbers: Sequence[str]) -> list[str]:
    """A tree: the value of its first leaf, and a rule for each other one."""

    def paths(node: Split | int, tests: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
        if isinstance(node, int):
            return [(node, tests)]
        number = numbers[node.reads]
        below, above = f"({number} <= {node.at_most})", f"({number} > {node.at_most})"
        return paths(node.below, (*tests, below)) + paths(node.above, (*tests, above))

    (default, _), *others = paths(node, ())
    return [f"{name} = {default};", *(f"{name} = {value} if {_all(tests)} else {name};" for value, tests in others)]


def _arithmetic(name: str, mlp: NumericalMLP, numbers: Sequence[str]) -> list[str]:
    """A function of too many numbers to list, as the sums that it is."""
    lines = []
    hidden = [f"{name}_hidden_{at}" for at in range(len(mlp.b_in))]
    for unit, weights, bias in zip(hidden, mlp.W_in.T, mlp.b_in, strict=True):
        lines.append(f"{unit} = max({_weighted(numbers, weights)} + {_number(bias)}, 0);")
    outputs = [f"{name}_output_{at}" for at in range(len(mlp.b_out))]
    for output, weights, bias in zip(outputs, mlp.W_out.T, mlp.b_out, strict=True):
        lines.append(f"{output} = {_weighted(hidden, weights)} + {_number(bias)};")
    return lines + _first_largest(name, {str(at): output for at, output in enumerate(outputs)})


def _votes(program: DiscreteProgram, names: Names, live: Live) -> list[str]:
    """The votes for each word, and the word that has most."""
    summed = tally(program, names.ranges, live)
    words = [quoted(word) for word, allowed in zip(program.classes, program.allowed, strict=True) if allowed]
    totals = {word: f"votes_{at}" for at, word in enumerate(words)}
    lines = []
    for at, (word, total) in enumerate(totals.items()):
        lines += [f"# Votes for {word}.", f"{total} = {_number(summed.bias[at])};"]
        for place, rows in summed.categorical.items():
            voter = names.argument(names.categorical[place], place)
            terms = [
                f"({_number(vote)} * indicator{test})" if test else _number(vote)
                for vote in sorted({row[at] for row in rows.values()} - {0})
                for values in [frozenset(value for value, row in rows.items() if row[at] == vote)]
                for test in [_test(voter, values, values)]
            ]
            lines += [f"{total} = {total} + {' + '.join(terms)};"] if terms else []
        lines += [
            f"{total} = {total} + ({_number(row[at])} * {names.numerical[place]});"
            for place, row in summed.numerical.items()
            if row[at]
        ]
    return [*lines, "", "# The word with most votes, the first of equals.", *_first_largest("answer", totals)]


def _first_largest(name: str, sums: Mapping[str, str]) -> list[str]:
    """The result whose sum is largest, by the name of its sum."""
    (first, most), *others = sums.items()
    lines = [f"{name} = {first};", f"most_for_{name} = {most};"]
    for result, total in others:
        lines.append(f"{name} = {result} if ({total} > most_for_{name}) else {name};")
        lines.append(f"most_for_{name} = max(most_for_{name}, {total});")
    return lines


def _weighted(names: Sequence[str], weights: np.ndarray) -> str:
    return " + ".join(f"({_number(weight)} * {name})" for name, weight in zip(names, weights, strict=True))


def _number(value: np.generic) -> str:
    """A number as RASP writes it: without an exponent."""
    return format(Decimal(repr(value.item())), "f")
