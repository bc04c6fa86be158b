"""``python -m addenda``."""

from __future__ import annotations

from addenda.cli.app import main

if __name__ == "__main__":
    main()
