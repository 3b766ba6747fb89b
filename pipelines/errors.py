"""How a wrong use is answered: one sentence on stderr and exit code 2, never a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right; its text is one sentence that says what and how."""


def run_cli(main: Callable[[], object]) -> None:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
