"""``python -m optima`` is the ``optima`` command."""

import sys

from optima.cli import entry_point

sys.exit(entry_point())
