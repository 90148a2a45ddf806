"""The one exception that reaches users: a mistake they can mend, told in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message names file, field and value, and says how to mend it.

    Commands print it as one line and exit with code 2 (`core.cli.run`).
    """


def shown(value: object) -> str:
    """A value as a message shows it: at most 60 characters of its `repr`."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'r50_1x'?` for a misspelt word, or the empty string when nothing known is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
