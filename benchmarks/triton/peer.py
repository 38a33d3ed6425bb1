"""The same weights behind NVIDIA Triton, by pytriton, in an environment of its own.

A sentence travels as one string, its tokens joined by spaces: so requests of all lengths have one shape, and Triton's
dynamic batcher may put them together. It doesn't wait for a batch to fill (that would only add latency: under load the
queue is never empty). Back come the three layers' means over the tokens.
"""

import argparse
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import PlainSentence
from bilm_model.scalar_mix import Selection
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.load import triton_caller
from benchmarks.references.published_order import PublishedOrder

Embed = Callable[[Sequence[Sequence[str]]], list[Tensor]]

_pooled = Selection("all", "mean")


def main() -> None:
    """Serve until it is terminated."""
    arguments = _arguments()
    config = SIZES[arguments.size]
    triton = import_module("pytriton.triton")
    models = import_module("pytriton.model_config")
    ports = triton.TritonConfig(
        http_port=arguments.port, grpc_port=arguments.port + 1, metrics_port=arguments.port + 2, allow_metrics=False
    )
    functions = [_inference(arguments.order, arguments.size) for _ in range(arguments.instances)]
    with triton.Triton(config=ports) as server:
        server.bind(
            model_name=triton_caller.MODEL,
            infer_func=functions,
            inputs=[models.Tensor(name=triton_caller.INPUT, dtype=bytes, shape=(1,))],
            outputs=[
                models.Tensor(name=triton_caller.OUTPUT, dtype=np.float32, shape=(config.layer_count, config.width))
            ],
            config=models.ModelConfig(
                max_batch_size=arguments.max_batch, batcher=models.DynamicBatcher(max_queue_delay_microseconds=0)
            ),
        )
        server.serve()


def _inference(order: str, size: str) -> Any:
    """Return what pytriton calls with a batch, in the instance's own thread."""
    thread = threading.local()

    def infer(sentence: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        if not hasattr(thread, "embed"):
            thread.embed = _engine(size) if order == "engine" else PublishedOrder(random_bilm(SIZES[size])).run
        embed: Embed = thread.embed
        batch = [row[0].decode().split() for row in sentence]
        return {triton_caller.OUTPUT: np.stack([_pooled(layers).numpy() for layers in embed(batch)])}

    return import_module("pytriton.decorators").batch(infer)


def _engine(size: str) -> Embed:
    engine = CellularBatch(random_bilm(SIZES[size]), torch.device("cpu"), EngineOptions())
    engine.warm_up()
    return lambda batch: [done.layers for done in engine.run([PlainSentence(tuple(tokens)) for tokens in batch])]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--order", choices=("published", "engine"), required=True)
    parser.add_argument("--size", default="small")
    parser.add_argument("--port", type=int, required=True, help="and the next two")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--max-batch", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
