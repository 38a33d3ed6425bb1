"""The reasons of refusals, which stand in five places: contract, constants, server, page and client."""

import re
from pathlib import Path
from typing import Any

import grpc
from bilm_api.constants import Reason
from bilm_api.v1 import embed_pb2
from bilm_client.errors import sentence_error, service_error
from bilm_server.errors import RefusalError
from bilm_server.protocols.grpc.status import STATUS_CODES, status_of, trailing_metadata

ROOT = Path(__file__).parents[3]
CONTRACT = ROOT / "proto" / "bilm_api" / "v1" / "embed.proto"
PREFIX = "ERROR_REASON_"


class EndedCall:
    """A call that was refused, as the client sees it."""

    def __init__(self, refusal: RefusalError) -> None:
        self._refusal = refusal

    def code(self) -> grpc.StatusCode:
        return STATUS_CODES[self._refusal.code]

    def details(self) -> str:
        return str(self._refusal)

    def trailing_metadata(self) -> Any:
        return trailing_metadata(self._refusal, "a-1")


def statuses_of_the_contract() -> dict[str, str]:
    """The status that the comment of each value of the enum begins with."""
    block = CONTRACT.read_text(encoding="utf-8").partition("enum ErrorReason {")[2].partition("}")[0]
    return {
        name: comment.partition(":")[0].partition(",")[0].partition(" ")[0]
        for comment, name in re.findall(rf"((?:  // .*\n)+)  {PREFIX}(\w+) = \d+;", block)
        for comment in [comment.replace("  // ", " ").strip()]
    }


def statuses_of_the_page() -> dict[str, str]:
    found = {}
    for line in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        for reason in re.findall(r"`([A-Z_]+)`", cells[1]) if len(cells) > 3 else ():
            found[reason] = cells[2].partition(",")[0]
    return found


def test_contract_constants_server_page_and_client_have_the_same_reasons() -> None:
    statuses = {reason.value: RefusalError(reason, "").code.name for reason in Reason}
    assert embed_pb2.ErrorReason.keys() == [f"{PREFIX}UNSPECIFIED", *(PREFIX + name for name in statuses)]
    assert {name: status for name, status in statuses_of_the_contract().items() if name != "UNSPECIFIED"} == statuses
    assert statuses_of_the_page() == statuses
    for reason in Reason:
        refusal = RefusalError(reason, "a message")
        error = service_error(EndedCall(refusal))
        assert (error.reason, error.code, error.metadata) == (reason, STATUS_CODES[refusal.code], {"request_id": "a-1"})
        assert sentence_error(status_of(refusal), 0).reason == reason
