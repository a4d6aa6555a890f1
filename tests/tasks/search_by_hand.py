"""Search in plain Python, on sets and dictionaries: what the bit masks are held to."""

from __future__ import annotations

from collections.abc import Mapping

Children = Mapping[int, set[int]]


def reachable(children: Children, start: int) -> set[int]:
    """All vertices on some path from the start, without the start unless it is on a cycle."""
    found: set[int] = set()
    waiting = list(children.get(start, ()))
    while waiting:
        vertex = waiting.pop()
        if vertex not in found:
            found.add(vertex)
            waiting.extend(children.get(vertex, ()))
    return found


def useful(children: Children, start: int, goal: int) -> set[int]:
    """Children of the start that are the goal or lead there."""
    return {child for child in children.get(start, ()) if child == goal or goal in reachable(children, child)}


def lookahead(children: Children, start: int, goal: int) -> int:
    """Levels of a search from all children until the goal is seen or no wrong branch goes on."""
    right = useful(children, start, goal)
    wrong = set(children.get(start, ())) - right
    seen, level = right | wrong, 0
    while wrong:
        level += 1
        if goal in right:
            return level
        after = {vertex for parent in right for vertex in children.get(parent, ())} - seen
        wrong = {vertex for parent in wrong for vertex in children.get(parent, ())} - seen - after
        right, seen = after, seen | after | wrong
    return level


def distance(children: Children, start: int, goal: int) -> int:
    """Edges on the shortest path; -1 where there is none."""
    frontier, seen, steps = {start}, {start}, 0
    while frontier:
        if goal in frontier:
            return steps
        frontier = {vertex for parent in frontier for vertex in children.get(parent, ())} - seen
        seen, steps = seen | frontier, steps + 1
    return -1


def parse_edges(body: list[int], *, edge: int) -> tuple[dict[int, set[int]], int]:
    """Children of each vertex, and the number of edges, from a prompt without its tail."""
    children: dict[int, set[int]] = {}
    places = [place for place, token in enumerate(body) if token == edge]
    for place in places:
        children.setdefault(body[place + 1], set()).add(body[place + 2])
    return children, len(places)


def parse(tokens: list[int], *, edge: int) -> tuple[dict[int, set[int]], int, int, int]:
    """Children of each vertex, start, goal, and the number of edges, from a prompt."""
    children, n_edges = parse_edges(tokens[:-5], edge=edge)
    return children, tokens[-4], tokens[-3], n_edges
