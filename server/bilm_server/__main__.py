"""`python -m bilm_server` is `bilm-serve`."""

import sys

from bilm_server.main import main

sys.exit(main())
