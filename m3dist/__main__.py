"""`python -m m3dist`: the way ranks are started."""

import sys

from m3dist.cli import main

sys.exit(main())
