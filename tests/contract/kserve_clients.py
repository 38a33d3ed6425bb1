"""Calls of the clients of Triton and KServe, as a program for an environment of theirs; it imports nothing of ours.

    python kserve_clients.py triton|kserve TARGET MODEL FILE

What came back goes to FILE as arrays, what else there is to say to standard output as JSON.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

TEXTS = ["Naïve “quotes”, don't they?", "The play was a success."]
TOKENS = [["The", "play", "was", "a", "success", "."], [], ["one", "naïve"]]
BAD_PARAMETERS = {"layers": "last"}


def flat(sentences: list[list[str]]) -> tuple[Any, Any]:
    """Return all tokens, and how many each sentence has."""
    words = np.array([token.encode() for sentence in sentences for token in sentence], np.object_)
    return words, np.array(list(map(len, sentences)), np.int32)


def triton(target: str, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Call by tritonclient's synchronous client."""
    from tritonclient import grpc as triton_grpc
    from tritonclient.utils import InferenceServerException

    client: Any = triton_grpc.InferenceServerClient(target)
    words, lengths = flat(TOKENS)

    def given(**arrays: Any) -> list[Any]:
        inputs = []
        for name, array in arrays.items():
            inputs.append(triton_grpc.InferInput(name, array.shape, "INT32" if name == "lengths" else "BYTES"))
            inputs[-1].set_data_from_numpy(array)
        return inputs

    text = given(text=np.array([each.encode() for each in TEXTS], np.object_))
    pooled = {"layers": "top", "pooling": "mean", "l2_normalize": True, "data_type": "FP16"}
    requested = [triton_grpc.InferRequestedOutput(name) for name in ("embeddings", "tokens")]
    one = client.infer(model, given(tokens=words, lengths=lengths), request_id="r-1")
    two = client.infer(model, text, parameters=pooled, timeout=20_000_000, priority=1)
    three = client.infer(model, text, outputs=requested, parameters={"layers": "mix", "mix_weights": "1,2,3"})
    empty = client.infer(model, given(tokens=words[:0], lengths=np.zeros(1, np.int32)))
    errors, calls = {}, dict[str, Callable[[], Any]]()
    calls |= {
        "parameter": lambda: client.infer(model, text, parameters=BAD_PARAMETERS),
        "model": lambda: client.infer("other", text),
        "output": lambda: client.infer(model, text, outputs=[triton_grpc.InferRequestedOutput("OUTPUT0")]),
        "batch": lambda: client.infer(model, given(text=np.zeros(0, np.object_))),
    }
    for name, call in calls.items():
        try:
            call()
        except InferenceServerException as error:
            errors[name] = [str(error.status()), error.message()]
    metadata = client.get_model_metadata(model, as_json=True)
    said = {
        "ready": [client.is_server_live(), client.is_server_ready(), client.is_model_ready(model)],
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(as_json=True)["name"],
        "model": metadata["name"],
        "outputs": [output["name"] for output in metadata["outputs"]],
        "id": one.get_response().id,
        "dtypes": [str(each.as_numpy("embeddings").dtype) for each in (one, two)],
        "tokens": [token.decode() for token in three.as_numpy("tokens")],
        "empty": list(empty.as_numpy("embeddings").shape),
        "errors": errors,
    }
    found = {"ragged": one, "pooled": two, "mixed": three}
    arrays = {name: each.as_numpy("embeddings") for name, each in found.items()}
    return said, {**arrays, "lengths": one.as_numpy("lengths")}


async def kserve(target: str, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Call by KServe's asynchronous client, with raw and with typed contents."""
    import grpc
    from kserve import InferenceGRPCClient, InferInput, InferRequest
    from kserve.protocol.infer_type import RequestedOutput

    client = InferenceGRPCClient(target)
    words, lengths = flat(TOKENS)
    raw = [InferInput("tokens", [len(words)], "BYTES"), InferInput("lengths", [len(lengths)], "INT32")]
    raw[0].set_data_from_numpy(words)
    raw[1].set_data_from_numpy(lengths)
    typed = [
        InferInput("tokens", [len(words)], "BYTES", [token.decode() for token in words]),
        InferInput("lengths", [len(lengths)], "INT32", lengths.tolist()),
    ]
    text = [InferInput("text", [len(TEXTS)], "BYTES", TEXTS)]
    pooled = {"layers": "top", "pooling": "mean", "l2_normalize": True, "data_type": "FP16"}
    mixed = {"layers": "mix", "mix_weights": "1,2,3"}
    requested = [RequestedOutput(name, parameters={"binary_data": True}) for name in ("embeddings", "tokens")]

    def request(inputs: list[Any], **fields: Any) -> Any:
        return InferRequest(model_name=model, infer_inputs=inputs, **fields)

    one = await client.infer(request(raw, request_id="r-1"))
    again = await client.infer(request(typed))
    two = await client.infer(request(text, parameters=pooled))
    three = await client.infer(request(text, parameters=mixed, request_outputs=requested))
    errors = {}
    for name, wrong in {
        "parameter": request(text, parameters=BAD_PARAMETERS),
        "model": InferRequest(model_name="other", infer_inputs=text),
        "output": request(text, request_outputs=[RequestedOutput("OUTPUT0")]),
        "batch": request([InferInput("text", [0], "BYTES", [])]),
    }.items():
        try:
            await client.infer(wrong)
        except grpc.RpcError as error:
            errors[name] = [f"StatusCode.{error.code().name}", error.details()]
    said = {
        "ready": [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready(model)],
        "other_ready": await client.is_model_ready("other"),
        "id": one.id,
        "dtypes": [str(each.get_output_by_name("embeddings").as_numpy().dtype) for each in (one, two)],
        "tokens": [_decoded(token) for token in three.get_output_by_name("tokens").as_numpy()],
        "errors": errors,
    }
    await client.close()
    found = {"ragged": one, "typed": again, "pooled": two, "mixed": three}
    arrays = {name: each.get_output_by_name("embeddings").as_numpy() for name, each in found.items()}
    return said, {**arrays, "lengths": one.get_output_by_name("lengths").as_numpy()}


def _decoded(token: bytes | str) -> str:
    return token if isinstance(token, str) else token.decode()


def main() -> None:
    """Call, and write what came back."""
    name, target, model, file = sys.argv[1:]
    said, arrays = triton(target, model) if name == "triton" else asyncio.run(kserve(target, model))
    np.savez(file, **arrays)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
