"""``python -m optima`` is the ``optima`` command."""

import sys

from optima.cli import main

sys.exit(main())
