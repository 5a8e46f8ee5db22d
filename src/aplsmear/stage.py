"""How every script of ``stages/`` starts and ends."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from aplsmear.errors import UserError

FAILED, MISUSED = 1, 2  # exit codes


def run(main: Callable[..., int | None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Call a stage's `main` with the words of its command line and end the process.

    The exit code is what `main` returns (None: 0); 1 after a `UserError`, whose message goes to stderr
    instead of a traceback; 2 where the words do not fit `main`, with the usage from its module's docstring.
    Any other exception passes through.

    Args:
        main: takes each word as a positional argument.
        arguments: the words; None: those of this process.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        print(inspect.getdoc(inspect.getmodule(main)), file=sys.stderr)
        sys.exit(MISUSED)
    try:
        code = main(*words)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(FAILED)
    sys.exit(code)
