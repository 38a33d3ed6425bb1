"""Stages 2 and 3: the tests that need a GPU, and the numbers of the model that ships against float64."""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from bilm_model.bilm import Bilm
from bilm_model.characters import character_ids, with_boundaries
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import EmbeddedSentence
from torch import Tensor

from benchmarks.gpu.setting import PRECISIONS, Facts, Setting
from benchmarks.load.engines import as_engine_sentences, load_bilm
from benchmarks.paths import ROOT

_SENTENCES, _ALONE = 600, 100
_MAX_ERROR, _MIN_COSINE = 1e-5, 0.9995
_TESTS = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/parity")


def gpu_tests(_: Setting) -> Facts:
    """Run the tests marked `gpu`; without one they are collected and skipped, which is no failure."""
    run = subprocess.run([sys.executable, *_TESTS], cwd=ROOT, capture_output=True, text=True, check=False)
    print(run.stdout, run.stderr, sep="\n")
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", run.stdout)}
    red = run.returncode != 0
    return {
        **counts,
        **({"failed": f"pytest ended with {run.returncode}", "output": run.stdout[-2000:]} if red else {}),
    }


def precision(setting: Setting) -> Facts:
    """Compare the model that ships, on the device, with the plain network in float64; and company with being alone.

    Legend: L layers with the token layer, N tokens with boundaries, D width.
    """
    sentences = setting.sentences(_SENTENCES)
    expected = _reference(load_bilm("").double(), sentences)
    facts: Facts = {"sentences": len(sentences), "tokens": sum(map(len, sentences))}
    for name in PRECISIONS:
        batch = setting.batch(load_bilm(""), replace(EngineOptions(), precision=name, input_cache_mib=0))
        together = [_layers(found) for found in batch.run(as_engine_sentences(sentences))]
        alone = [_layers(batch.run([one])[0]) for one in as_engine_sentences(sentences[:_ALONE])]
        facts[name] = {
            "backend": batch.backend,
            "largest_error": max(_largest(a, b) for a, b in zip(together, expected, strict=True)),
            "worst_cosine_by_layer": _worst_cosines(together, expected),
            "largest_difference_of_company": max(_largest(*pair) for pair in zip(alone, together, strict=False)),
            "worst_cosine_of_company": min(_worst_cosines(alone, together)),
        }
    too_far = facts["float32"]["largest_error"] >= _MAX_ERROR
    too_coarse = min(facts["bfloat16"]["worst_cosine_by_layer"]) < _MIN_COSINE
    if too_far or too_coarse:
        facts["failed"] = f"expected errors below {_MAX_ERROR:g} in float32, cosines of {_MIN_COSINE} in bfloat16"
    return facts


def _reference(bilm: Bilm, sentences: Sequence[Sequence[str]]) -> list[Tensor]:
    """Return each sentence's layers (L, N, D)."""
    found = []
    for sentence in sentences:  # one by one: all of them in float64 would take gigabytes
        ids = torch.from_numpy(character_ids(with_boundaries(sentence))).long()
        found.append(bilm(ids, [len(ids)])[0])
    return found


def _layers(found: EmbeddedSentence) -> Tensor:
    return found.layers.cpu().double()


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def _worst_cosines(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return the smallest cosine of any token, for each layer."""
    cosines = [torch.cosine_similarity(a, b, dim=-1).amin(1) for a, b in zip(found, expected, strict=False)]
    worst: list[float] = torch.stack(cosines).amin(0).tolist()
    return worst
