"""``python -m pyrovae`` is ``pyrovae``."""

import sys

from pyrovae.cli import main

sys.exit(main())
