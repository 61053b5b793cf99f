"""The ``recsys-ops`` program. The doctor is reached before anything that may be missing is imported."""

from __future__ import annotations

import sys

from recsys_ops import doctor
from recsys_ops._output import INTERRUPTED


def main() -> None:
    """Run the command line; exits 0 on success, 1 on a finding, 2 on wrong usage, 130 on Ctrl-C."""
    code: str | int | None
    try:
        if sys.argv[1:2] == ["doctor"]:
            code = doctor.main(sys.argv[2:])
        else:
            from recsys_ops._commands import app

            code = app(prog_name="recsys-ops")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", *doctor.REQUIRED):
            raise
        code = f"recsys-ops: {error.name} is not installed: pip install {error.name}"
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as ended:
        code = ended.code
    if code == INTERRUPTED:
        print("recsys-ops: interrupted", file=sys.stderr)
    sys.exit(code)
