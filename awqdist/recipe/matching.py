"""Name patterns, matched as compressed-tensors matches them.

`re:PATTERN` matches where `re.match(PATTERN, name)` does: anchored at the start, open at the end unless the pattern
ends in `$`. Any other pattern matches the module of exactly that name, and all modules whose class has that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

from awqdist.errors import RecipeError

_REGEX = "re:"


def is_regex(pattern: str) -> bool:
    """Returns whether the pattern is a regular expression, `re:...`."""
    return pattern.startswith(_REGEX)


def matches(pattern: str, name: str, kind: str | None = None) -> bool:
    """Returns whether `pattern` matches the module `name`, or equals the name of its class, `kind`."""
    if is_regex(pattern):
        return re.match(pattern.removeprefix(_REGEX), name) is not None
    return pattern in (name, kind)


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Raises RecipeError for the first pattern that is empty or is not a valid regular expression."""
    for pattern in patterns:
        if not pattern.removeprefix(_REGEX):
            raise RecipeError(
                f"{where}: the pattern {pattern!r} is empty; give a module name, a class name or 're:' and a regex"
            )
        try:
            re.compile(pattern.removeprefix(_REGEX) if is_regex(pattern) else "")
        except re.error as error:
            raise RecipeError(
                f"{where}: {pattern!r} is not a valid regular expression ({error}); correct it"
            ) from error


def check_patterns_match(patterns: Iterable[str], names: Iterable[str], where: str) -> None:
    """Raises RecipeError for the first pattern that matches none of `names`, with the name nearest to it.

    Args:
        patterns: The patterns to check.
        names: All module names that a pattern may match here, and class names where those are allowed.
        where: The place of the patterns in the recipe, for the message.
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


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Returns the end of an error message: the valid name nearest to `name`, or all valid names if none is alike."""
    known = sorted(valid)
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(known)}"


def _nearest_name(pattern: str, names: list[str]) -> str:
    """Compares as many trailing parts of each name as the pattern has. Names that differ in numbers count once."""
    plain = re.sub(r"\.\*|[\^$\\?()]", "", pattern.removeprefix(_REGEX)).strip(".")
    num_parts = plain.count(".") + 1
    distinct: dict[str, str] = {}
    for name in names:
        distinct.setdefault(re.sub(r"\d+", "0", name), name)

    def likeness(name: str) -> float:
        return SequenceMatcher(None, plain, ".".join(name.split(".")[-num_parts:])).ratio()

    return max(distinct.values(), key=likeness)
