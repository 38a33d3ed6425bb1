"""`python -m bilm_client.batch` is `bilm-embed`."""

import sys

from bilm_client.batch.main import main

sys.exit(main())
