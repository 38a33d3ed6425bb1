"""What the contract fixes beside its messages, for server and client: reasons, priorities, metadata keys, limits."""

from enum import StrEnum
from typing import Final

MAX_REQUEST_BYTES: Final = 4 * 2**20
"""Size of the largest request message. Not a setting: parsing holds the server's event loop."""
MAX_RESPONSE_BYTES: Final = 16 * 2**20
"""Size of the largest response message. Not a setting: serialising holds the server's event loop."""

MAX_CHOSEN_PER_TOKEN: Final = 64
"""How often each token of a sentence may be chosen, on average. Not a setting: to read it so often takes as long as to
compute it, and bounds a round of the engine."""

ERROR_DOMAIN: Final = "bilm-serve"
"""`domain` of every ErrorInfo that the server makes."""
ERROR_INFO_REQUEST_ID: Final = "request_id"
"""Key in an ErrorInfo's metadata of the client's own name of the call."""

REQUEST_ID_KEY: Final = "x-request-id"
"""Metadata with the client's own name of a call."""
MAX_REQUEST_ID_CHARACTERS: Final = 64
"""Length of the longest such name; a longer one is ignored."""
NO_LOG_KEY: Final = "x-bilm-no-log"
"""Metadata that keeps a call out of the access log, whatever its value, if the caller has that right."""

PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
"""Trailing metadata of every RESOURCE_EXHAUSTED and of MODEL_LOADING: milliseconds until another attempt, or
`NEVER_RETRY`."""
NEVER_RETRY: Final = -1
"""Pushback of a call that no retry can help."""
STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"
"""Trailing metadata with the `google.rpc.Status` of a refused call."""
LOAD_REPORT_KEY: Final = "endpoint-load-metrics-bin"
"""Trailing metadata with an `xds.data.orca.v3.OrcaLoadReport`: the load of the server that took the call."""

MODEL_HEALTH: Final = "model:"
"""Name of the health service's for a model, with the model's name behind it."""


class Priority(StrEnum):
    """How urgent a request is, as configurations, JSON and arguments name it. Never renamed."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Feature(StrEnum):
    """What `GetModelResponse.features` may name. Never renamed."""

    PRIORITY = "priority"
    SELECTION = "selection"


class Reason(StrEnum):
    """Reasons as they stand in an ErrorInfo: the names of `ErrorReason` without prefix. Never renamed."""

    MALFORMED_REQUEST = "MALFORMED_REQUEST"
    METHOD_NOT_FOUND = "METHOD_NOT_FOUND"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    MODEL_VERSION_MISMATCH = "MODEL_VERSION_MISMATCH"
    OPTIONS_MISSING = "OPTIONS_MISSING"
    LAYERS_INVALID = "LAYERS_INVALID"
    POOLING_INVALID = "POOLING_INVALID"
    DATA_TYPE_INVALID = "DATA_TYPE_INVALID"
    MIX_INVALID = "MIX_INVALID"
    SENTENCES_MISSING = "SENTENCES_MISSING"
    TOO_MANY_SENTENCES = "TOO_MANY_SENTENCES"
    TOO_MANY_TOKENS = "TOO_MANY_TOKENS"
    RESPONSE_TOO_LARGE = "RESPONSE_TOO_LARGE"
    STREAM_ORDER = "STREAM_ORDER"
    ID_IN_USE = "ID_IN_USE"
    SENTENCE_MISSING = "SENTENCE_MISSING"
    SENTENCE_TOO_LONG = "SENTENCE_TOO_LONG"
    TOKEN_EMPTY = "TOKEN_EMPTY"
    TEXT_NOT_TOKENIZABLE = "TEXT_NOT_TOKENIZABLE"
    STATE_INVALID = "STATE_INVALID"
    POOLING_EMPTY = "POOLING_EMPTY"
    OVERLOADED = "OVERLOADED"
    CALLER_LIMIT = "CALLER_LIMIT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    STREAM_STALLED = "STREAM_STALLED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    MODEL_FAILING = "MODEL_FAILING"
    INTERNAL = "INTERNAL"
    MODEL_LOADING = "MODEL_LOADING"
    SELECTION_INVALID = "SELECTION_INVALID"
    PRIORITY_INVALID = "PRIORITY_INVALID"
    RIGHT_MISSING = "RIGHT_MISSING"
    RELOAD_FAILED = "RELOAD_FAILED"
