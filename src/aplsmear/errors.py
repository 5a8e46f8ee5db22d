"""The base of every error that a user can correct."""

from __future__ import annotations


class UserError(Exception):
    """Something in the data, params.yaml or the surroundings must change; the message says what, and how.

    A new subclass is for a caller that treats this error in another way. A stage that ends with an error of
    this kind shows the message alone (`aplsmear.runs.stage`). Any other exception is a fault of this
    repository and shows its traceback.
    """


def brief(error: object) -> str:
    """The first line of the message of an error, or the name of its type if it has no message."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
