"""``python -m mecq_cli`` is ``mecq``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process."""
    try:
        from mecq_cli.cli.main import main as run
    except KeyboardInterrupt:  # while the first modules load
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
