import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, BilmState, initialize
from bilm_model.characters import character_ids
from bilm_model.config import BilmConfig, Residual
from bilm_training.data.streams import TextWindow, WindowPair
from bilm_training.errors import TargetError
from bilm_training.evaluation.perplexity import perplexity
from bilm_training.objectives.language_model import BilmObjective, check_targets, window_layers
from bilm_training.recipe import Softmax
from torch import Tensor, nn

from tests.unit.training.training_support import TEXT, TINY, naive_tokens, open_text, streams_of

CLIPPED = replace(TINY, cell_clip=0.5, proj_clip=0.3)
SOFTMAX = Softmax(cutoffs=(3, 6))


def sharp(config: BilmConfig, seed: int = 0) -> Bilm:
    """Random weights, large enough that the LSTMs' bounds are reached; no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    bilm = initialize(Bilm(config), generator)
    with torch.no_grad():
        for name, parameter in bilm.named_parameters():
            if "directions" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
            elif "bias" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return bilm


def new_objective(config: BilmConfig, n_classes: int, softmax: Softmax, dropout: float = 0.0) -> BilmObjective:
    torch.manual_seed(0)
    return BilmObjective(sharp(config), n_classes, softmax, dropout)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


# ---- the loss --------------------------------------------------------------------------------------------------------

Array = np.ndarray[Any, np.dtype[np.float64]]


class Reference:
    """A biLM in float64 numpy, a word at a time; keeps what the bounds are applied to."""

    def __init__(self, objective: BilmObjective) -> None:
        self.config, self.softmax = objective.bilm.config, objective.softmax
        self.w = {name: p.detach().double().numpy() for name, p in objective.bilm.named_parameters()}
        self.cells: list[Array] = []
        self.projected: list[Array] = []

    def vector(self, token: str) -> Array:
        inner = {"<S>": [257], "</S>": [258]}.get(token, [byte + 1 for byte in token.encode()])
        ids = [259, *inner, 260] + [261] * (48 - len(inner))
        characters, peaks = self.w["encoder.char_cnn.embedding"][ids], []
        for k, (width, _) in enumerate(self.config.filters):
            kernel = self.w[f"encoder.char_cnn.kernels.{k}"].transpose(0, 2, 1)
            places = [(kernel * characters[s : s + width]).sum(axis=(1, 2)) for s in range(51 - width)]
            peaks.append(np.max(places, axis=0) + self.w[f"encoder.char_cnn.biases.{k}"])
        x = np.concatenate(peaks)
        x = np.maximum(x, 0) if self.config.activation == "relu" else np.tanh(x)
        for k in range(self.config.n_highway):
            gate = 1 / (1 + np.exp(-self.affine(f"encoder.highways.{k}.gate", x)))
            x = gate * np.maximum(self.affine(f"encoder.highways.{k}.transform", x), 0) + (1 - gate) * x
        return self.affine("encoder.projection", x)

    def affine(self, name: str, x: Array) -> Array:
        bias = self.w.get(f"{name}.bias")
        return np.asarray(self.w[f"{name}.weight"] @ x + (0 if bias is None else bias))

    def outputs(self, direction: int, tokens: list[str]) -> list[Array]:
        xs = [self.vector(token) for token in tokens]
        outputs = xs
        for k in range(self.config.n_layers):
            ys = self.layer(f"directions.{direction}.layers.{k}", xs)
            outputs = [x + y for x, y in zip(xs, ys, strict=True)] if k and self.config.residual == "published" else ys
            summed = self.config.residual == "input_to_input"
            xs = [x + y for x, y in zip(xs, ys, strict=True)] if summed else outputs
        return outputs

    def layer(self, name: str, xs: list[Array]) -> list[Array]:
        c, h = np.zeros(self.config.cell_dim), np.zeros(self.config.projection_dim)
        outputs = []
        for x in xs:
            i, j, f, o = np.split(self.affine(f"{name}.input", x) + self.affine(f"{name}.recurrent", h), 4)
            i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f + 1, o))
            self.cells.append(f * c + i * np.tanh(j))
            c = np.clip(self.cells[-1], -self.config.cell_clip, self.config.cell_clip)
            self.projected.append(self.affine(f"{name}.projection", o * np.tanh(c)))
            h = np.clip(self.projected[-1], -self.config.proj_clip, self.config.proj_clip)
            outputs.append(h)
        return outputs

    @torch.no_grad()
    def loss(self, direction: int, tokens: list[str], classes: dict[str, int]) -> tuple[float, int]:
        """Nats, and words and ends of line that were predicted."""
        tokens = tokens[::-1] if direction else tokens
        begin, softmax = ("<S>", "</S>")[direction], self.softmax.double()
        total, count = 0.0, 0
        for output, follows in zip(self.outputs(direction, tokens)[:-1], tokens[1:], strict=True):
            if follows != begin:
                x = torch.from_numpy(output)[None]
                scores = softmax.log_prob(x) if isinstance(softmax, nn.AdaptiveLogSoftmaxWithLoss) else softmax(x)
                total -= float(scores.log_softmax(-1)[0, classes.get(follows, 0)])
                count += 1
        return total, count


@pytest.mark.parametrize(
    ("softmax", "config"),
    [
        (SOFTMAX, CLIPPED),
        (Softmax(cutoffs=(1, 2, 5), divisor=1.5), replace(CLIPPED, activation="tanh", residual="input_to_input")),
        (Softmax(cutoffs=(500,)), replace(CLIPPED, n_highway=2, residual="none")),
        (Softmax(kind="full"), CLIPPED),
    ],
    ids=["adaptive", "three clusters", "one cluster", "full"],
)
def test_the_loss_is_that_of_every_word_and_end_of_line(tmp_path: Path, softmax: Softmax, config: BilmConfig) -> None:
    corpus = open_text(tmp_path, TEXT)
    streams = streams_of(corpus, n_steps=5)
    objective = new_objective(config, len(streams.vocabulary.words), softmax)
    found = perplexity(objective, streams)
    reference = Reference(objective)
    classes = {word: n for n, word in enumerate(streams.vocabulary.words)}
    expected = [reference.loss(d, naive_tokens(corpus.path), classes) for d in range(2)]
    assert [count for _, count in expected] == [len(TEXT.split()) + TEXT.count("\n")] * 2
    assert found.tokens == expected[0][1]
    for figure, (total, count) in zip((found.forward, found.backward), expected, strict=True):
        assert figure == pytest.approx(math.exp(total / count), rel=1e-5)
    assert abs(found.forward - found.backward) > 0.01  # else the directions could have been mistaken for each other
    assert found.mean == (found.forward + found.backward) / 2

    sums = torch.zeros(2, dtype=torch.float64)
    objective.double()
    states = objective.zero_state(1)
    for pair in streams.windows():
        window_sums, _, states = objective(pair, states)
        sums += window_sums.detach()
    assert sums.tolist() == pytest.approx([total for total, _ in expected], rel=1e-11)


def test_what_has_no_number_is_an_infinite_perplexity() -> None:
    objective = new_objective(TINY, 5, SOFTMAX)
    assert objective.metric(math.log(7)) == pytest.approx(7)
    assert objective.metric(1e5) == math.inf


@pytest.mark.parametrize("softmax", [SOFTMAX, Softmax(kind="full")])
def test_a_window_may_have_nothing_to_predict(tmp_path: Path, softmax: Softmax) -> None:
    streams = streams_of(open_text(tmp_path, "a\nb\n"), n_steps=1)
    objective = new_objective(TINY, 10, softmax)
    pair = next(pair for pair in streams.windows() if not any(window.counted.any() for window in pair.directions))
    sums, counts, _ = objective(pair, objective.zero_state(1))
    assert sums.tolist() == counts.tolist() == [0, 0]
    sums.sum().backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in objective.parameters())


def test_dropout_stands_before_each_layer_and_the_softmax(tmp_path: Path) -> None:
    streams = streams_of(open_text(tmp_path, TEXT))
    (pair,) = streams.windows()
    objective = new_objective(TINY, len(streams.vocabulary.words), SOFTMAX, dropout=0.5)
    places: list[Tensor] = []
    objective.dropout.register_forward_hook(lambda module, inputs, output: places.append(inputs[0]))
    exact = objective.eval()(pair, objective.zero_state(1))[0]
    layers, _ = window_layers(objective.bilm, pair, objective.zero_state(1)[0], nn.Identity())
    expected = [layers[0][0], layers[0][1], layers[1][0], layers[1][1]]
    expected += [outputs[-1].flatten(0, 1) for outputs in layers]
    assert [distance(a, b) for a, b in zip(expected, places, strict=True)] == [0.0] * 6
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(objective.train()(pair, objective.zero_state(1))[0].tolist())
    assert losses[0] == losses[1] != losses[2]
    assert exact.tolist() not in losses


def test_a_target_without_a_class_is_named(tmp_path: Path) -> None:
    streams = streams_of(open_text(tmp_path, TEXT), n_streams=2, n_steps=4)
    _, pair, *_ = streams.windows()
    n_classes = len(streams.vocabulary.words)
    check_targets(pair, n_classes)
    pair.backward.targets[1, 0] = n_classes
    message = f"backward target of stream 0, step 5: expected a class from 0 to {n_classes - 1}, found {n_classes}$"
    objective = new_objective(TINY, n_classes, SOFTMAX)
    with pytest.raises(TargetError, match=message):
        objective(pair, objective.zero_state(2))
    pair.forward.targets[2, 1] = -1
    with pytest.raises(TargetError, match="^forward target of stream 1, step 6: .*, found -1$"):
        check_targets(pair, n_classes)


# ---- its gradient ----------------------------------------------------------------------------------------------------

FINITE_STEP = 1e-6


@pytest.mark.parametrize(
    ("softmax", "config"),
    [(SOFTMAX, CLIPPED), (Softmax(kind="full"), replace(CLIPPED, activation="tanh", residual="input_to_input"))],
    ids=["adaptive, relu, published", "full, tanh, input to input"],
)
def test_gradients_are_finite_differences(tmp_path: Path, softmax: Softmax, config: BilmConfig) -> None:
    corpus = open_text(tmp_path, TEXT)
    streams = streams_of(corpus)
    (pair,) = streams.windows()
    objective = new_objective(config, len(streams.vocabulary.words), softmax).double()
    check_bounds(objective, naive_tokens(corpus.path))

    def loss() -> Tensor:
        sums: Tensor = objective(pair, objective.zero_state(1))[0].sum()
        return sums

    torch.autograd.backward(loss())
    draw = torch.Generator().manual_seed(1)
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad.flatten()
        assert float(gradient.abs().max()) > 1e-3, name
        entries = {
            *gradient.abs().topk(2).indices.tolist(),
            *torch.randperm(len(gradient), generator=draw)[:2].tolist(),
        }
        for entry in entries:
            assert difference(loss, parameter, entry) == pytest.approx(float(gradient[entry]), abs=2e-6), (name, entry)


def test_gradients_are_the_same_bits_each_time_with_several_threads(tmp_path: Path) -> None:
    """Some of torch's gradients are sums in whatever order the threads come: the character embedding's was one."""
    text = " ".join(f"word{n}" for n in range(3000))  # much to sum up for each of few letters
    streams = streams_of(open_text(tmp_path, text), n_streams=8)
    (pair,) = streams.windows()
    objective = new_objective(replace(TINY, char_dim=16), len(streams.vocabulary.words), Softmax(cutoffs=(300, 1000)))
    found = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for _ in range(6):
            objective.zero_grad()
            torch.autograd.backward(objective(pair, objective.zero_state(8))[0].sum())
            found.append({name: cast(Tensor, p.grad).clone() for name, p in objective.named_parameters()})
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert [name for name, gradient in found[0].items() if not torch.equal(other[name], gradient)] == []


def check_bounds(objective: BilmObjective, tokens: list[str]) -> None:
    """Makes sure that some values are beyond each bound and some aren't, and that a finite step carries none across."""
    reference = Reference(objective)
    for direction in range(2):
        reference.outputs(direction, tokens[::-1] if direction else tokens)
    bounds = ((reference.cells, CLIPPED.cell_clip), (reference.projected, CLIPPED.proj_clip))
    for values, bound in bounds:
        beyond = np.abs(values) - bound
        assert 0.1 < (beyond > 0).mean() < 0.9
        assert np.abs(beyond).min() > 20 * FINITE_STEP


@torch.no_grad()
def difference(loss: Any, parameter: Tensor, entry: int) -> float:
    values = parameter.view(-1)
    before, found = float(values[entry]), []
    for step in (FINITE_STEP, -FINITE_STEP):
        values[entry] = before + step
        found.append(float(loss()))
    values[entry] = before
    return (found[0] - found[1]) / (2 * FINITE_STEP)


# ---- what the LSTMs are given and give -------------------------------------------------------------------------------


def pair_of(forward: Sequence[Sequence[str]], backward: Sequence[Sequence[str]]) -> WindowPair:
    """Windows of these streams, each as it is read."""
    types = list(dict.fromkeys(token for stream in (*forward, *backward) for token in stream))

    def window(streams: Sequence[Sequence[str]]) -> TextWindow:
        tokens = np.array([[types.index(token) for token in stream] for stream in streams], np.int64).T
        return TextWindow(tokens, np.zeros_like(tokens), np.ones_like(tokens, np.bool_))

    return WindowPair(character_ids(types), window(forward), window(backward), 0)


@pytest.mark.parametrize(
    ("filters", "activation"),
    [
        (((1, 4), (3, 4), (7, 5)), "relu"),
        (((2, 3), (30, 4)), "tanh"),
        (((50, 6),), "tanh"),
        (((1, 12),), "relu"),
    ],
)
@pytest.mark.parametrize("longest", [3, 8, 60])
def test_words_of_any_length_are_encoded_as_by_the_reference_network(
    filters: tuple[tuple[int, int], ...], activation: Any, longest: int
) -> None:
    """There each word has 50 places; here no more than it needs."""
    bilm = sharp(replace(TINY, filters=filters, activation=activation)).double()
    words = ["<S>", "</S>", *(chr(97 + n % 26) * n + "é" * (n % 2) for n in range(1, longest + 1))]
    pair = pair_of([words], [words[::-1]])
    encoder = dict(bilm.encoder.named_parameters())
    expected = bilm.encoder(torch.from_numpy(character_ids(words)).long())
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), list(encoder.values()))
    layers, _ = window_layers(bilm, pair, bilm.zero_state(1), nn.Identity())
    for found in (layers[0][0][:, 0], layers[1][0][:, 0].flip(0)):
        assert distance(found, expected) < 1e-12
        gradients = torch.autograd.grad((found * weight).sum(), list(encoder.values()), retain_graph=True)
        for name, a, b in zip(encoder, expected_gradients, gradients, strict=True):
            assert distance(a, b) < 1e-11, name
            assert float(a.abs().max()) > 1e-3, name


SENTENCES = ["the cat sat here", "a dog ran off", "one two three four"]


@pytest.mark.parametrize("residual", ["published", "input_to_input", "none"])
@pytest.mark.parametrize("cell_dim", [6, 9], ids=["without projection", "with projection"])
def test_layers_are_the_reference_networks(residual: Residual, cell_dim: int) -> None:
    bilm = sharp(replace(CLIPPED, residual=residual, n_layers=3, cell_dim=cell_dim)).double()
    streams = [["<S>", *sentence.split(), "</S>"] for sentence in SENTENCES]
    layers, state = window_layers(
        bilm,
        pair_of(streams, [stream[::-1] for stream in streams]),
        bilm.zero_state(len(streams)),
        nn.Identity(),
    )
    lengths = [len(stream) for stream in streams]
    ids = character_ids([token for stream in streams for token in stream])
    expected, expected_state = bilm(torch.from_numpy(ids).long(), lengths)
    forward, backward = (torch.stack(outputs).transpose(1, 2) for outputs in layers)  # (L, B, S, P)
    found = torch.cat([forward, backward.flip(2)], dim=-1).flatten(1, 2)
    assert distance(found, expected) < 1e-12
    assert distance(state.h, expected_state.h) < 1e-12
    assert distance(state.c, expected_state.c) < 1e-12
    assert 0 < float((state.c.abs() == CLIPPED.cell_clip).double().mean()) < 1


def test_the_state_goes_on_from_window_to_window_without_its_gradient(tmp_path: Path) -> None:
    corpus = open_text(tmp_path, TEXT)
    bilm = sharp(CLIPPED).double()
    (whole,) = streams_of(corpus, n_streams=2).windows()
    expected, end = window_layers(bilm, whole, bilm.zero_state(2), nn.Identity())
    state: BilmState = bilm.zero_state(2)
    parts = []
    for pair in streams_of(corpus, n_streams=2, n_steps=3).windows():
        layers, state = window_layers(bilm, pair, state, nn.Identity())
        assert not state.h.requires_grad
        assert not state.c.requires_grad
        parts.append(layers)
    for d in range(2):
        for k in range(3):
            found = torch.cat([layers[d][k] for layers in parts])
            assert distance(found, expected[d][k]) < 1e-13
    assert distance(state.h, end.h) < 1e-13
    assert distance(state.c, end.c) < 1e-13
