"""The client knows every field and every choice of the contract."""

import dataclasses

from bilm_api.v1 import embed_pb2 as pb
from bilm_client._core.options import DATA_TYPES, LAYERS, POOLING
from bilm_client.policy import RETRIED_METHODS, SERVICE_NAME
from bilm_client.results import Limits, ModelInfo
from google.protobuf.descriptor import EnumDescriptor


def _choices(enum: EnumDescriptor) -> set[int]:
    return {value.number for value in enum.values if not value.name.endswith("_UNSPECIFIED")}


def test_every_choice_has_a_name() -> None:
    enums = pb.DESCRIPTOR.enum_types_by_name
    assert set(LAYERS.values()) == _choices(enums["Layers"])
    assert set(POOLING.values()) == _choices(enums["Pooling"])
    assert set(DATA_TYPES.values()) == _choices(enums["DataType"])


def test_model_info_has_every_field() -> None:
    for message, kind in ((pb.GetModelResponse, ModelInfo), (pb.Limits, Limits)):
        assert {field.name for field in dataclasses.fields(kind)} == set(message.DESCRIPTOR.fields_by_name)


def test_retry_names_methods_that_exist() -> None:
    service = pb.DESCRIPTOR.services_by_name["EmbedService"]
    assert service.full_name == SERVICE_NAME
    assert set(RETRIED_METHODS) < set(service.methods_by_name)
