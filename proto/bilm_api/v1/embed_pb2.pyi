import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Layers(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYERS_UNSPECIFIED: _ClassVar[Layers]
    LAYERS_ALL: _ClassVar[Layers]
    LAYERS_TOP: _ClassVar[Layers]
    LAYERS_AVERAGE: _ClassVar[Layers]
    LAYERS_MIX: _ClassVar[Layers]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_UNSPECIFIED: _ClassVar[Pooling]
    POOLING_NONE: _ClassVar[Pooling]
    POOLING_MEAN: _ClassVar[Pooling]
    POOLING_MAX: _ClassVar[Pooling]

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_BATCH: _ClassVar[Priority]

class SpanUnit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPAN_UNIT_UNSPECIFIED: _ClassVar[SpanUnit]
    SPAN_UNIT_TOKENS: _ClassVar[SpanUnit]
    SPAN_UNIT_BYTES: _ClassVar[SpanUnit]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_MALFORMED_REQUEST: _ClassVar[ErrorReason]
    ERROR_REASON_METHOD_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_VERSION_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_OPTIONS_MISSING: _ClassVar[ErrorReason]
    ERROR_REASON_LAYERS_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_POOLING_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_DATA_TYPE_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_MIX_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_SENTENCES_MISSING: _ClassVar[ErrorReason]
    ERROR_REASON_TOO_MANY_SENTENCES: _ClassVar[ErrorReason]
    ERROR_REASON_TOO_MANY_TOKENS: _ClassVar[ErrorReason]
    ERROR_REASON_RESPONSE_TOO_LARGE: _ClassVar[ErrorReason]
    ERROR_REASON_STREAM_ORDER: _ClassVar[ErrorReason]
    ERROR_REASON_ID_IN_USE: _ClassVar[ErrorReason]
    ERROR_REASON_SENTENCE_MISSING: _ClassVar[ErrorReason]
    ERROR_REASON_SENTENCE_TOO_LONG: _ClassVar[ErrorReason]
    ERROR_REASON_TOKEN_EMPTY: _ClassVar[ErrorReason]
    ERROR_REASON_TEXT_NOT_TOKENIZABLE: _ClassVar[ErrorReason]
    ERROR_REASON_STATE_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_POOLING_EMPTY: _ClassVar[ErrorReason]
    ERROR_REASON_OVERLOADED: _ClassVar[ErrorReason]
    ERROR_REASON_CALLER_LIMIT: _ClassVar[ErrorReason]
    ERROR_REASON_UNAUTHENTICATED: _ClassVar[ErrorReason]
    ERROR_REASON_DEADLINE_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_STREAM_STALLED: _ClassVar[ErrorReason]
    ERROR_REASON_SHUTTING_DOWN: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_FAILING: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_LOADING: _ClassVar[ErrorReason]
    ERROR_REASON_SELECTION_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_PRIORITY_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_RIGHT_MISSING: _ClassVar[ErrorReason]
    ERROR_REASON_RELOAD_FAILED: _ClassVar[ErrorReason]
LAYERS_UNSPECIFIED: Layers
LAYERS_ALL: Layers
LAYERS_TOP: Layers
LAYERS_AVERAGE: Layers
LAYERS_MIX: Layers
POOLING_UNSPECIFIED: Pooling
POOLING_NONE: Pooling
POOLING_MEAN: Pooling
POOLING_MAX: Pooling
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_BATCH: Priority
SPAN_UNIT_UNSPECIFIED: SpanUnit
SPAN_UNIT_TOKENS: SpanUnit
SPAN_UNIT_BYTES: SpanUnit
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_MALFORMED_REQUEST: ErrorReason
ERROR_REASON_METHOD_NOT_FOUND: ErrorReason
ERROR_REASON_MODEL_NOT_FOUND: ErrorReason
ERROR_REASON_MODEL_VERSION_MISMATCH: ErrorReason
ERROR_REASON_OPTIONS_MISSING: ErrorReason
ERROR_REASON_LAYERS_INVALID: ErrorReason
ERROR_REASON_POOLING_INVALID: ErrorReason
ERROR_REASON_DATA_TYPE_INVALID: ErrorReason
ERROR_REASON_MIX_INVALID: ErrorReason
ERROR_REASON_SENTENCES_MISSING: ErrorReason
ERROR_REASON_TOO_MANY_SENTENCES: ErrorReason
ERROR_REASON_TOO_MANY_TOKENS: ErrorReason
ERROR_REASON_RESPONSE_TOO_LARGE: ErrorReason
ERROR_REASON_STREAM_ORDER: ErrorReason
ERROR_REASON_ID_IN_USE: ErrorReason
ERROR_REASON_SENTENCE_MISSING: ErrorReason
ERROR_REASON_SENTENCE_TOO_LONG: ErrorReason
ERROR_REASON_TOKEN_EMPTY: ErrorReason
ERROR_REASON_TEXT_NOT_TOKENIZABLE: ErrorReason
ERROR_REASON_STATE_INVALID: ErrorReason
ERROR_REASON_POOLING_EMPTY: ErrorReason
ERROR_REASON_OVERLOADED: ErrorReason
ERROR_REASON_CALLER_LIMIT: ErrorReason
ERROR_REASON_UNAUTHENTICATED: ErrorReason
ERROR_REASON_DEADLINE_EXCEEDED: ErrorReason
ERROR_REASON_STREAM_STALLED: ErrorReason
ERROR_REASON_SHUTTING_DOWN: ErrorReason
ERROR_REASON_MODEL_FAILING: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_MODEL_LOADING: ErrorReason
ERROR_REASON_SELECTION_INVALID: ErrorReason
ERROR_REASON_PRIORITY_INVALID: ErrorReason
ERROR_REASON_RIGHT_MISSING: ErrorReason
ERROR_REASON_RELOAD_FAILED: ErrorReason

class ScalarMix(_message.Message):
    __slots__ = ("weights", "gamma", "layer_norm")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    LAYER_NORM_FIELD_NUMBER: _ClassVar[int]
    weights: _containers.RepeatedScalarFieldContainer[float]
    gamma: float
    layer_norm: bool
    def __init__(self, weights: _Optional[_Iterable[float]] = ..., gamma: _Optional[float] = ..., layer_norm: bool = ...) -> None: ...

class EmbedOptions(_message.Message):
    __slots__ = ("layers", "mix", "pooling", "l2_normalize", "data_type", "omit_tokens")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MIX_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    L2_NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    OMIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    layers: Layers
    mix: ScalarMix
    pooling: Pooling
    l2_normalize: bool
    data_type: DataType
    omit_tokens: bool
    def __init__(self, layers: _Optional[_Union[Layers, str]] = ..., mix: _Optional[_Union[ScalarMix, _Mapping]] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., l2_normalize: bool = ..., data_type: _Optional[_Union[DataType, str]] = ..., omit_tokens: bool = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, rows: _Optional[_Iterable[int]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Spans(_message.Message):
    __slots__ = ("unit", "spans")
    UNIT_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    unit: SpanUnit
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, unit: _Optional[_Union[SpanUnit, str]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class Sentence(_message.Message):
    __slots__ = ("text", "tokens", "state", "return_state", "rows", "spans")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RETURN_STATE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: Tokens
    state: bytes
    return_state: bool
    rows: Rows
    spans: Spans
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., state: _Optional[bytes] = ..., return_state: bool = ..., rows: _Optional[_Union[Rows, _Mapping]] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("data", "shape", "data_type")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    shape: _containers.RepeatedScalarFieldContainer[int]
    data_type: DataType
    def __init__(self, data: _Optional[bytes] = ..., shape: _Optional[_Iterable[int]] = ..., data_type: _Optional[_Union[DataType, str]] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("tokens", "token_starts", "token_ends", "truncated", "tensor", "state")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STARTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ENDS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    token_starts: _containers.RepeatedScalarFieldContainer[int]
    token_ends: _containers.RepeatedScalarFieldContainer[int]
    truncated: bool
    tensor: Tensor
    state: bytes
    def __init__(self, tokens: _Optional[_Iterable[str]] = ..., token_starts: _Optional[_Iterable[int]] = ..., token_ends: _Optional[_Iterable[int]] = ..., truncated: bool = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., state: _Optional[bytes] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("queue_time", "inference_time", "tokens", "model_version")
    QUEUE_TIME_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_TIME_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    queue_time: _duration_pb2.Duration
    inference_time: _duration_pb2.Duration
    tokens: int
    model_version: str
    def __init__(self, queue_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., inference_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., tokens: _Optional[int] = ..., model_version: _Optional[str] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("model", "expected_model_version", "options", "sentences", "priority")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SENTENCES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    expected_model_version: str
    options: EmbedOptions
    sentences: _containers.RepeatedCompositeFieldContainer[Sentence]
    priority: Priority
    def __init__(self, model: _Optional[str] = ..., expected_model_version: _Optional[str] = ..., options: _Optional[_Union[EmbedOptions, _Mapping]] = ..., sentences: _Optional[_Iterable[_Union[Sentence, _Mapping]]] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class EmbedResult(_message.Message):
    __slots__ = ("embedding", "error")
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    embedding: Embedding
    error: _status_pb2.Status
    def __init__(self, embedding: _Optional[_Union[Embedding, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("results", "usage")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[EmbedResult]
    usage: Usage
    def __init__(self, results: _Optional[_Iterable[_Union[EmbedResult, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class StreamStart(_message.Message):
    __slots__ = ("model", "expected_model_version", "options", "carry_state", "return_state_every", "priority")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    CARRY_STATE_FIELD_NUMBER: _ClassVar[int]
    RETURN_STATE_EVERY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    expected_model_version: str
    options: EmbedOptions
    carry_state: bool
    return_state_every: int
    priority: Priority
    def __init__(self, model: _Optional[str] = ..., expected_model_version: _Optional[str] = ..., options: _Optional[_Union[EmbedOptions, _Mapping]] = ..., carry_state: bool = ..., return_state_every: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class StreamItem(_message.Message):
    __slots__ = ("id", "sentence")
    ID_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    id: int
    sentence: Sentence
    def __init__(self, id: _Optional[int] = ..., sentence: _Optional[_Union[Sentence, _Mapping]] = ...) -> None: ...

class EmbedStreamRequest(_message.Message):
    __slots__ = ("start", "item")
    START_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    start: StreamStart
    item: StreamItem
    def __init__(self, start: _Optional[_Union[StreamStart, _Mapping]] = ..., item: _Optional[_Union[StreamItem, _Mapping]] = ...) -> None: ...

class EmbeddingRows(_message.Message):
    __slots__ = ("embedding", "first_row", "total_rows", "last")
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROWS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    embedding: Embedding
    first_row: int
    total_rows: int
    last: bool
    def __init__(self, embedding: _Optional[_Union[Embedding, _Mapping]] = ..., first_row: _Optional[int] = ..., total_rows: _Optional[int] = ..., last: bool = ...) -> None: ...

class EmbedStreamResponse(_message.Message):
    __slots__ = ("id", "rows", "error", "usage")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    id: int
    rows: EmbeddingRows
    error: _status_pb2.Status
    usage: Usage
    def __init__(self, id: _Optional[int] = ..., rows: _Optional[_Union[EmbeddingRows, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model", "expected_model_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    expected_model_version: str
    def __init__(self, model: _Optional[str] = ..., expected_model_version: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[GetModelResponse]
    def __init__(self, models: _Optional[_Iterable[_Union[GetModelResponse, _Mapping]]] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("added", "replaced", "removed", "kept")
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    added: _containers.RepeatedScalarFieldContainer[str]
    replaced: _containers.RepeatedScalarFieldContainer[str]
    removed: _containers.RepeatedScalarFieldContainer[str]
    kept: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, added: _Optional[_Iterable[str]] = ..., replaced: _Optional[_Iterable[str]] = ..., removed: _Optional[_Iterable[str]] = ..., kept: _Optional[_Iterable[str]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_sentences_per_request", "max_tokens_per_request", "max_tokens_per_sentence", "max_request_bytes", "max_response_bytes", "max_stream_items_in_flight")
    MAX_SENTENCES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_SENTENCE_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RESPONSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAM_ITEMS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    max_sentences_per_request: int
    max_tokens_per_request: int
    max_tokens_per_sentence: int
    max_request_bytes: int
    max_response_bytes: int
    max_stream_items_in_flight: int
    def __init__(self, max_sentences_per_request: _Optional[int] = ..., max_tokens_per_request: _Optional[int] = ..., max_tokens_per_sentence: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., max_response_bytes: _Optional[int] = ..., max_stream_items_in_flight: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "version", "layer_count", "width", "cell_size", "parameter_count", "precision", "backend", "tokenizer", "max_token_bytes", "state_bytes", "limits", "server_version", "inputs", "contexts", "features", "members")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CELL_SIZE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    layer_count: int
    width: int
    cell_size: int
    parameter_count: int
    precision: str
    backend: str
    tokenizer: str
    max_token_bytes: int
    state_bytes: int
    limits: Limits
    server_version: str
    inputs: str
    contexts: str
    features: _containers.RepeatedScalarFieldContainer[str]
    members: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., layer_count: _Optional[int] = ..., width: _Optional[int] = ..., cell_size: _Optional[int] = ..., parameter_count: _Optional[int] = ..., precision: _Optional[str] = ..., backend: _Optional[str] = ..., tokenizer: _Optional[str] = ..., max_token_bytes: _Optional[int] = ..., state_bytes: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., server_version: _Optional[str] = ..., inputs: _Optional[str] = ..., contexts: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., members: _Optional[_Iterable[str]] = ...) -> None: ...
