"""A lane ends one sentence and begins the next within a round: the bits are those of each sentence alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bilm_model.bilm import random_bilm
from bilm_model.characters import character_ids
from bilm_model.config import SIZES
from bilm_model.engine.backend import Backend
from bilm_model.engine.cpu.backend import CpuBackend
from bilm_model.engine.cuda.backend import CudaBackend
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.planner import RoundPlan
from torch import Tensor

from tests.support.plans import plan_of

CPU = torch.device("cpu")
CONFIG = replace(SIZES["tiny"], n_layers=2)
LANES = [[5, 2, 4], [3, 7], [9]]
"""The lengths of the sentences of each lane."""


def backend_of(kind: str) -> Backend:
    bilm = random_bilm(CONFIG)
    if "bfloat16" in kind:
        bilm.to_bfloat16_products()
    options = EngineOptions(max_rows=4, max_tokens=64)
    memory = options.memory(CONFIG, CPU)
    memory.h.fill_(torch.nan)
    memory.c.fill_(torch.nan)
    backend: Backend
    if kind == "cuda":
        backend = CudaBackend(bilm, memory, max_rows=4, max_ticks=32)
    elif kind == "few rows":
        backend = CpuBackend(bilm, memory, 4, 0)
        assert backend.paths["recurrence"] == "one_kernel"
    else:
        backend = CpuBackend(bilm, memory, 4, 0, new_recurrence=lambda lstm, config: None)
        assert backend.paths["recurrence"] == "products"
    backend.prepare()
    backend.encode(np.arange(40), character_ids([f"word{i}" for i in range(40)]))
    return backend


def run(backend: Backend, plan: RoundPlan) -> Tensor:
    with torch.inference_mode():
        backend.run(plan, plan.places)
    return backend.memory.outputs.clone()


@pytest.mark.parametrize("kind", ["products", "products in bfloat16", "few rows", "cuda"])
def test_sentences_that_follow_one_another_in_a_lane(kind: str) -> None:
    backend = backend_of(kind)
    n_places = sum(map(sum, LANES))
    together = run(backend, plan_of(LANES))[:, :, :n_places]
    state = backend.memory.h[:, :, 0].clone()
    assert torch.isfinite(together).all()
    first = 0
    for length in [length for lane in LANES for length in lane]:
        places = slice(first, first + length)
        backend.memory.h.fill_(torch.nan)
        alone = run(backend, plan_of([[length]], first))[:, :, places]
        if kind == "cuda":
            assert torch.allclose(together[:, :, places], alone, atol=1e-6)  # plain products: no promise of bits
        else:
            assert torch.equal(together[:, :, places], alone)
        first += length
        if first == sum(LANES[0]):
            assert torch.allclose(backend.memory.h[:, :, 0], state, atol=1e-6)
