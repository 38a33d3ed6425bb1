"""A caller that is killed with streams and calls under way; says on its standard output when they are."""

import sys
import time

import grpc
from bilm_api.v1 import embed_pb2_grpc

from tests.fault.known_answers import endless_items

_STREAMS = 3
_LIFE_S = 60.0


def main() -> None:
    """Opens streams to the server named by the first argument, reads one result of the first, and waits."""
    with grpc.insecure_channel(sys.argv[1]) as channel:
        stub = embed_pb2_grpc.EmbedServiceStub(channel)
        streams = [stub.EmbedStream(endless_items()) for _ in range(_STREAMS)]
        try:
            next(streams[0])
        except grpc.RpcError as error:
            print(error.code(), flush=True)
        print("under way", flush=True)
        time.sleep(_LIFE_S)


if __name__ == "__main__":
    main()
