"""``python -m dfed``."""

import sys

from dfed.cli import main

sys.exit(main())
