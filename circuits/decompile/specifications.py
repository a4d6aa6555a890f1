"""What the tasks of sequences ask for, as formulas of the letters: the definitions that programs are proved against.

They share no code with `workbench.tasks.sequence_functions`, which they are tested against on whole domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from circuits.decompile.symbols import Formula, Value, all_of, any_of, negated, same, summed

Specification = Callable[[Sequence[Value], int], list[Value]]
"""From the letter at each place and the size of the alphabet to the output at each place."""


def reverse(letters: Sequence[Value], _n: int) -> list[Value]:
    """The letter as far from the end."""
    return list(reversed(letters))


def sort(letters: Sequence[Value], n: int) -> list[Value]:
    """Letter v at place t if at most t letters are smaller, and more than t are not larger."""
    by_name = sorted(range(n), key=str)
    found: list[Value] = [{} for _ in letters]
    for rank, letter in enumerate(by_name):
        below = _count(letters, by_name[:rank])
        up_to = _count(letters, by_name[: rank + 1])
        for place, value in enumerate(found):
            value[letter] = all_of(
                any_of(*(held for count, held in below.items() if count <= place)),
                any_of(*(held for count, held in up_to.items() if count > place)),
            )
    return found


def hist(letters: Sequence[Value], _n: int) -> list[Value]:
    """How many places have the same letter; output 0 is one."""
    counts = [summed([(same(own, other), {1: True}) for other in letters]) for own in letters]
    return [{count - 1: held for count, held in each.items() if count} for each in counts]


def double_hist(letters: Sequence[Value], n: int) -> list[Value]:
    """How many letters occur as often as the one here; output 0 is one."""
    counts = [_count(letters, [letter]) for letter in range(n)]
    found = []
    for own in letters:
        as_often = [
            any_of(*(all_of(held, same(counts[letter], counts[other])) for letter, held in own.items()))
            for other in range(n)
        ]
        number = summed([(held, {1: True}) for held in as_often])
        found.append({count - 1: held for count, held in number.items() if count})
    return found


def most_freq(letters: Sequence[Value], n: int) -> list[Value]:
    """Letter v at place t if t letters are ahead of it: more frequent, or as frequent and earlier; else output n."""
    counts = [_count(letters, [letter]) for letter in range(n)]

    def earlier(one: int, two: int) -> Formula:
        """Whether some place has the first letter, and none up to it the second."""
        found, none_before = [], True
        for each in letters:
            none_before = all_of(none_before, negated(each.get(two, False)))
            found.append(all_of(none_before, each.get(one, False)))
        return any_of(*found)

    def ahead(one: int, two: int) -> Formula:
        more = (
            all_of(held, also)
            for count, held in counts[one].items()
            for fewer, also in counts[two].items()
            if fewer < count
        )
        return any_of(*more, all_of(same(counts[one], counts[two]), earlier(one, two)))

    found: list[Value] = [{} for _ in letters]
    for letter in range(n):
        rank = summed([(ahead(other, letter), {1: True}) for other in range(n) if other != letter])
        present = negated(counts[letter].get(0, False))
        for place, value in enumerate(found):
            value[letter] = all_of(present, rank.get(place, False))
    for value in found:
        value[n] = negated(any_of(*value.values()))
    return found


def induction(letters: Sequence[Value], n: int) -> list[Value]:
    """At each letter the digit that followed it last, or output n/2 where none did; nothing is asked at digits."""
    half = n // 2
    found = []
    for place, own in enumerate(letters):
        value: dict[int, list[Formula]] = {}
        for letter in range(half):
            unknown = own.get(letter, False)
            for at in range(place - 1, 0, -1):
                follows = all_of(unknown, letters[at - 1].get(letter, False))
                digits = {digit: letters[at].get(half + digit, False) for digit in range(half)}
                for digit, held in digits.items():
                    value.setdefault(digit, []).append(all_of(follows, held))
                unknown = all_of(unknown, negated(all_of(follows, any_of(*digits.values()))))
            value.setdefault(half, []).append(unknown)
        found.append({one: any_of(*parts) for one, parts in value.items()})
    return found


def dyck(letters: Sequence[Value], n: int) -> list[Value]:
    """Brackets that are open, outermost first, as one number of digits 1 + kind; and whether one did not fit."""
    base = n // 2 + 1
    stack: Value = {0: True}
    failed: Formula = False
    found = []
    for letter in letters:
        after: dict[int, list[Formula]] = {}
        wrong = [failed]
        for open_now, held in stack.items():
            for one, also in letter.items():
                kind, closes, both = one // 2, one % 2 == 1, all_of(held, also)
                if not closes:
                    after.setdefault(open_now * base + 1 + kind, []).append(both)
                elif open_now % base == 1 + kind:
                    after.setdefault(open_now // base, []).append(both)
                else:
                    wrong.append(both)
        failed = any_of(*wrong)
        stack = {one: any_of(*parts) for one, parts in after.items()}
        balanced = all_of(stack.get(0, False), negated(failed))
        found.append({0: all_of(negated(failed), negated(balanced)), 1: balanced, 2: failed})
    return found


def _count(letters: Sequence[Value], wanted: Sequence[int]) -> Value:
    """How many places have one of the letters."""
    return summed([(any_of(*(each.get(letter, False) for letter in wanted)), {1: True}) for each in letters])


SPECIFICATIONS: dict[str, Specification] = {
    "reverse": reverse,
    "sort": sort,
    "hist": hist,
    "double_hist": double_hist,
    "most_freq": most_freq,
    "dyck": dyck,
    "induction": induction,
}
