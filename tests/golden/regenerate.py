"""Rewrites payloads.json: `python -m tests.golden.regenerate --i-changed-the-wire-format`.

Do this only together with a new VERSION in grace_ext/exchange/message.py: ranks with different releases must get an error, not misread each
other.
"""

from __future__ import annotations

import json
import pathlib
import sys

FLAG = "--i-changed-the-wire-format"
PATH = pathlib.Path(__file__).with_name("payloads.json")


def main(arguments: list[str]) -> int:
    if arguments != [FLAG]:
        print(__doc__, file=sys.stderr)
        return 2
    from grace_ext.testing.worlds import NUMPY

    from .messages import everything

    PATH.write_text(json.dumps(everything(NUMPY), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
