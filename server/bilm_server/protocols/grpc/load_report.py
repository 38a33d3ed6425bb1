"""The load of the server in a call's trailer, as gRPC's and Envoy's `weighted_round_robin` read it.

The message is `xds.data.orca.v3.OrcaLoadReport` (ORCA, per-request reporting; https://github.com/cncf/xds). Two of its
fields are sent, so its 18 bytes are written here instead of by generated code.
"""

import struct
from typing import Final

from bilm_api.constants import LOAD_REPORT_KEY

from bilm_server.inference.load import Load

_RPS_FRACTIONAL, _APPLICATION_UTILIZATION = 0x31, 0x49  # fields 6 and 9, each a double of 64 bits
_REPORT: Final = struct.Struct("<BdBd")

Trailer = tuple[tuple[str, str | bytes], ...]


def load_trailer(load: Load | None) -> Trailer:
    """Return trailing metadata with a load; none where there is none, since balancers take 0 for no report.

    `rps_fractional` are tokens and not calls, which differ in what they cost.
    """
    if load is None:
        return ()
    report = _REPORT.pack(_RPS_FRACTIONAL, load.tokens_per_s, _APPLICATION_UTILIZATION, load.utilization)
    return ((LOAD_REPORT_KEY, report),)
