"""``python -m mecq_cli`` is ``mecq``."""

from __future__ import annotations

from mecq_cli.cli.main import main

if __name__ == "__main__":
    main()
