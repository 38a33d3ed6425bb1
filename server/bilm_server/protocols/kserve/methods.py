"""The Open Inference Protocol's methods, as gRPC takes them; cheap to import, as it is needed before the model."""

from collections.abc import Collection
from typing import Final

import grpc
from bilm_api.inference import open_inference_pb2 as pb
from google.protobuf.message_factory import GetMessageClass

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE_NAME: Final[str] = _SERVICE.full_name
OPEN_METHODS: Final = ("ServerLive", "ServerReady", "ModelReady")
"""Methods that need no token and no model: as health, they say nothing but whether something works."""
MODEL_METHODS: Final = ("ServerMetadata", "ModelMetadata", "ModelInfer")
"""All others."""
INFER_METHOD: Final = f"{SERVICE_NAME}/ModelInfer"
"""How metrics and log call the method that computes."""


def handler_of(service: object, methods: Collection[str]) -> grpc.GenericRpcHandler:
    """Return what answers calls of some of the methods, by those of `service` that have their names."""
    types = {name: _SERVICE.methods_by_name[name] for name in methods}
    return grpc.method_handlers_generic_handler(
        SERVICE_NAME,
        {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(service, name),
                GetMessageClass(method.input_type).FromString,
                GetMessageClass(method.output_type).SerializeToString,
            )
            for name, method in types.items()
        },
    )
