"""``python -m ncfinetune``."""

import sys

from ncfinetune.cli import main

if __name__ == "__main__":
    sys.exit(main())
