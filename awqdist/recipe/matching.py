"""Name patterns, as compressed-tensors matches them.

`re:PATTERN` matches where `re.match(PATTERN, name)` does: anchored at the start, open at the end unless the pattern
ends in `$`. Anything else matches a module of exactly that name, or one whose class has that name ("Linear").
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

from awqdist.errors import RecipeError

_REGEX = "re:"


def is_regex(pattern: str) -> bool:
    """True for `re:...`."""
    return pattern.startswith(_REGEX)


def matches(pattern: str, name: str, kind: str | None = None) -> bool:
    """True where `pattern` matches the module `name`, or equals its class name `kind`."""
    if is_regex(pattern):
        return re.match(pattern.removeprefix(_REGEX), name) is not None
    return pattern in (name, kind)


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Raises RecipeError for the first pattern that is empty or whose regular expression does not compile."""
    for pattern in patterns:
        if not pattern.removeprefix(_REGEX):
            raise RecipeError(
                f"{where}: the pattern {pattern!r} is empty; give a module name, a class name or 're:' and a regex"
            )
        if is_regex(pattern):
            try:
                re.compile(pattern.removeprefix(_REGEX))
            except re.error as error:
                raise RecipeError(
                    f"{where}: {pattern!r} is not a valid regular expression ({error}); correct it"
                ) from error


def check_patterns_match(patterns: Iterable[str], names: Iterable[str], where: str) -> None:
    """Raises RecipeError for the first pattern that matches none of `names`, with the name that comes nearest to it.

    names: all module names that a pattern of this place may mean (and class names, where those are allowed too).
    """
    known = list(names)
    for pattern in patterns:
        check_patterns([pattern], where)
        if any(matches(pattern, name) for name in known):
            continue
        advice = f"the nearest is {_nearest_name(pattern, known)!r}" if known else "there are no names here at all"
        if not is_regex(pattern) and re.search(r"[*^$\\\[(|+?]", pattern):
            advice += f", and a regular expression is written {_REGEX + pattern!r}"
        raise RecipeError(f"{where}: {pattern!r} matches no module; {advice}")


def suggestion(name: str, valid: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The end of an error message: the valid name nearest to `name`, or all if none is alike by `cutoff` (0 to 1)."""
    known = sorted(valid)
    close = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(known)}"


def _nearest_name(pattern: str, names: list[str]) -> str:
    """Compares as many trailing parts of a name as the pattern has; of names differing in numbers, the first."""
    plain = re.sub(r"\.\*|[\^$\\?()]", "", pattern.removeprefix(_REGEX)).strip(".")
    num_parts = plain.count(".") + 1
    shapes: dict[str, str] = {}
    for name in names:
        shapes.setdefault(re.sub(r"\d+", "0", name), name)

    def likeness(name: str) -> float:
        tail = ".".join(name.split(".")[-num_parts:])
        return SequenceMatcher(None, plain, tail).ratio()

    return max(shapes.values(), key=likeness)
