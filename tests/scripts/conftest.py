"""The scripts are programs, not a package: their folder goes on the path, as when Python runs them."""

import sys

from .launch import SCRIPTS

sys.path.insert(0, str(SCRIPTS))
