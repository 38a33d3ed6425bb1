"""`python -m bilm_client.bench` is `bilm-bench`."""

import sys

from bilm_client.bench.main import main

sys.exit(main())
