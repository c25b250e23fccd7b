"""`python -m g2rl_kernels.cli` is the command `g2rl`."""

import sys

from g2rl_kernels.cli.main import main

sys.exit(main())
