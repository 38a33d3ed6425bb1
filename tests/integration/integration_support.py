"""Messages of the contract, and stubs."""

from typing import Any

import grpc
from bilm_api.v1 import embed_pb2
from grpc_health.v1 import health_pb2_grpc

PLAIN = embed_pb2.EmbedOptions(
    layers=embed_pb2.LAYERS_ALL, pooling=embed_pb2.POOLING_NONE, data_type=embed_pb2.DATA_TYPE_FLOAT32
)


def health_stub(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)  # its stubs lack the methods


def tokens(*words: str, **fields: Any) -> embed_pb2.Sentence:
    return embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=words), **fields)


def options(**changes: Any) -> embed_pb2.EmbedOptions:
    found = embed_pb2.EmbedOptions()
    found.CopyFrom(PLAIN)
    found.MergeFrom(embed_pb2.EmbedOptions(**changes))
    return found
