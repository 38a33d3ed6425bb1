"""`python -m bilm_bench` is `bilm-bench`."""

import sys

from bilm_bench.main import main

sys.exit(main())
