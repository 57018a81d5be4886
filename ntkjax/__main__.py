"""``python -m ntkjax``: the command line from a source tree that is not installed."""

import sys

from ntkjax.cli import main

sys.exit(main())
