"""The command `transhume`: a client of the daemon on this machine, and what starts and stops that daemon."""

from __future__ import annotations

import os
import sys

EXIT_INTERRUPTED = 130


def run() -> None:
    """The entry point. Ends with an exit code that tells what happened; shows no traceback."""
    try:
        # Loaded here, so that a Ctrl-C while Python is still loading is told in words too.
        from transhume.cli.commands import app
        from transhume.cli.session import exit_code_of, tell_error
        from transhume.model.errors import TranshumeError

        try:
            app()
        except TranshumeError as error:
            tell_error(error, "--json" in sys.argv[1:])
            sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        print("transhume: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # the outermost edge: whatever it is, it is told in words
        if os.environ.get("TRANSHUME_DEBUG"):
            raise
        where = "set TRANSHUME_DEBUG=1 to see where"
        print(f"transhume: unexpected {type(error).__name__}: {error}; {where}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
