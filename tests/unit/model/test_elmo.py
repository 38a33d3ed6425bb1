"""`Elmo` and `batch_to_ids`: what AllenNLP's users rely on, and what is refused."""

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bilm_model.characters import character_ids
from bilm_model.elmo import Elmo, batch_to_ids
from bilm_model.elmo.module import ElmoOutput
from bilm_model.errors import CharacterError, ConfigError, WeightsError
from bilm_model.weights.convert import convert
from bilm_model.weights.loading import load
from torch import Tensor, nn

TINY = "random:tiny"
SENTENCES = [["The", "play", "was", "a", "success"], ["naïve"], [], ["two", "words"]]
GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "relu-2highway"


def elmo(n_mixes: int = 1, **options: Any) -> Elmo:
    return Elmo(None, TINY, n_mixes, **options)


def vectors(module: Elmo, batch: list[list[str]]) -> Tensor:
    found: ElmoOutput = module(batch_to_ids(batch))
    return found["elmo_representations"][0]


# ---- batch_to_ids ---------------------------------------------------------------------------------------------------


def test_ids_are_padded_with_zeros() -> None:
    ids = batch_to_ids(SENTENCES)
    assert (ids.shape, ids.dtype) == ((4, 5, 50), torch.int64)
    for row, sentence in zip(ids, SENTENCES, strict=True):
        assert torch.equal(row[: len(sentence)], torch.from_numpy(character_ids(sentence)).long())
        assert not row[len(sentence) :].any()


@pytest.mark.parametrize(("batch", "shape"), [([], (0, 0, 50)), ([[]], (1, 0, 50)), ([[], []], (2, 0, 50))])
def test_batches_without_tokens(batch: list[list[str]], shape: tuple[int, ...]) -> None:
    ids = batch_to_ids(batch)
    assert ids.shape == shape
    found = elmo()(ids)
    assert found["elmo_representations"][0].shape == (*shape[:2], 16)
    assert found["mask"].shape == shape[:2]


def test_a_text_is_no_sentence() -> None:
    with pytest.raises(TypeError, match=r"sentence 1 is the string 'a text' \(expected a list of tokens\)"):
        batch_to_ids([["fine"], "a text"])
    with pytest.raises(CharacterError, match="empty"):
        batch_to_ids([[""]])


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_the_mask_says_where_tokens_are_and_padding_is_zero() -> None:
    found = elmo(2, dropout=0.0)(batch_to_ids(SENTENCES))
    assert found["mask"].dtype == torch.bool
    assert found["mask"].sum(dim=1).tolist() == [5, 1, 0, 2]
    for each in found["elmo_representations"]:
        assert each.shape == (4, 5, 16)
        assert torch.equal(each.abs().sum(dim=-1) > 0, found["mask"])


def test_the_layers_are_the_reference_networks() -> None:
    bilm = load(TINY).bilm
    ids = torch.from_numpy(character_ids(["<S>", *SENTENCES[0], "</S>"])).long()
    layers, _ = bilm(ids, [7])
    found = elmo(keep_sentence_boundaries=True, scalar_mix_parameters=[0.0, 0.0, 0.0])
    found.eval()
    torch.testing.assert_close(vectors(found, SENTENCES)[0], layers.mean(dim=0), atol=1e-6, rtol=0)


def test_padding_and_company_change_nothing() -> None:
    module = elmo(dropout=0.0)
    together = vectors(module, SENTENCES)
    wider = torch.cat([batch_to_ids(SENTENCES), torch.zeros(4, 3, 50, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(module(wider)["elmo_representations"][0][:, :5], together, atol=1e-6, rtol=0)
    for row, sentence in zip(together, SENTENCES, strict=True):
        alone = vectors(module, [sentence])[0]
        torch.testing.assert_close(row[: len(sentence)], alone, atol=1e-6, rtol=0)


def test_boundaries_are_kept_on_demand() -> None:
    kept = elmo(dropout=0.0, keep_sentence_boundaries=True)(batch_to_ids(SENTENCES))
    assert kept["mask"].sum(dim=1).tolist() == [7, 3, 2, 4]
    inner = vectors(elmo(dropout=0.0), SENTENCES)
    for row, outer, sentence in zip(inner, kept["elmo_representations"][0], SENTENCES, strict=True):
        assert torch.equal(row[: len(sentence)], outer[1 : 1 + len(sentence)])
        assert outer[0].any()


def test_layer_norm_is_over_the_batch() -> None:
    module = elmo(dropout=0.0, do_layer_norm=True, keep_sentence_boundaries=True)
    plain = elmo(3, dropout=0.0, keep_sentence_boundaries=True)
    one_layer_each(plain)
    found, layers = module(batch_to_ids(SENTENCES)), plain(batch_to_ids(SENTENCES))["elmo_representations"]
    rows = [layer[found["mask"]] for layer in layers]
    normed = [(layer - row.mean()) / row.std(correction=0) for layer, row in zip(layers, rows, strict=True)]
    expected = torch.stack(normed).mean(dim=0)  # what is behind a sentence is shifted, too, as in AllenNLP
    torch.testing.assert_close(found["elmo_representations"][0], expected, atol=1e-5, rtol=0)
    inner = vectors(elmo(dropout=0.0, do_layer_norm=True), SENTENCES)
    torch.testing.assert_close(inner[0], expected[0, 1:-1], atol=1e-5, rtol=0)
    assert not inner[2].any()
    alone = module(batch_to_ids(SENTENCES[:1]))["elmo_representations"][0]
    assert (alone[0] - found["elmo_representations"][0][0]).abs().max() > 1e-3


def one_layer_each(module: Elmo) -> None:
    state = module.state_dict()
    for k in range(module.num_output_representations):
        state[f"scalar_mix_{k}.scalar_parameters.{k}"] = torch.tensor([1e4])
    module.load_state_dict(state)


def test_dropout_is_for_training_only() -> None:
    module = elmo(dropout=0.5)
    torch.manual_seed(0)
    training = vectors(module, SENTENCES[:1])
    evaluated = vectors(module.eval(), SENTENCES[:1])
    dropped = training == 0
    assert 0.2 < dropped.float().mean() < 0.8
    torch.testing.assert_close(training[~dropped], 2 * evaluated[~dropped])
    assert torch.equal(evaluated, vectors(module, SENTENCES[:1]))


def test_more_dimensions_stay() -> None:
    ids = batch_to_ids(SENTENCES)
    flat, nested = elmo(dropout=0.0)(ids), elmo(dropout=0.0)(ids.view(2, 2, 5, 50))
    assert torch.equal(nested["elmo_representations"][0], flat["elmo_representations"][0].view(2, 2, 5, 16))
    assert torch.equal(nested["mask"], flat["mask"].view(2, 2, 5))


# ---- state ----------------------------------------------------------------------------------------------------------


def test_the_same_sentence_has_the_same_vectors_every_time() -> None:
    module = elmo(dropout=0.0)
    assert torch.equal(vectors(module, SENTENCES), vectors(module, SENTENCES))


def test_carried_state_goes_row_by_row() -> None:
    carrying = elmo(dropout=0.0, carry_state=True)
    fresh = elmo(dropout=0.0)
    first = vectors(carrying, SENTENCES[:2])
    torch.testing.assert_close(first, vectors(fresh, SENTENCES[:2]), atol=0, rtol=0)
    vectors(carrying, SENTENCES[:1])  # the second row waits
    third = vectors(carrying, [["a"], ["play"], ["new"]])
    other = elmo(dropout=0.0, carry_state=True)
    vectors(other, [["any"], SENTENCES[1]])
    assert torch.equal(third[1], vectors(other, [["a"], ["play"]])[1])
    assert torch.equal(third[2], vectors(fresh, [["a"], ["play"], ["new"]])[2])
    assert not torch.equal(third[0], vectors(fresh, [["a"], ["play"], ["new"]])[0])
    carrying.reset_states()
    assert torch.equal(vectors(carrying, SENTENCES[:2]), first)


# ---- training -------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_mixes_alone_unless_the_bilm_is_trained() -> None:
    for fine_tuned in (False, True):
        module = elmo(2, requires_grad=fine_tuned)
        sum(each.square().sum() for each in module(batch_to_ids(SENTENCES))["elmo_representations"]).backward()
        reached = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        mixes = {name for name, _ in module.named_parameters() if name.startswith("scalar_mix_")}
        assert len(mixes) == 8
        assert reached == ({name for name, _ in module.named_parameters()} if fine_tuned else mixes)
        assert all(parameter.grad.any() for parameter in module.parameters() if parameter.grad is not None)


def test_given_mixes_are_not_trained() -> None:
    module = elmo(2, scalar_mix_parameters=[-9e10, 1.0, -9e10], dropout=0.0)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    one_each = elmo(3, dropout=0.0)
    one_layer_each(one_each)
    second = one_each(batch_to_ids(SENTENCES))["elmo_representations"][1]
    torch.testing.assert_close(vectors(module, SENTENCES), second, atol=1e-6, rtol=0)


def test_a_step_of_training_makes_the_loss_smaller() -> None:
    module = elmo(requires_grad=True, dropout=0.0)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = (vectors(module, SENTENCES) - 1).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


# ---- cached words ---------------------------------------------------------------------------------------------------

VOCABULARY = ["@@PADDING@@", "The", "play", "was", "a", "success", "naïve", "two", "words"]


def words(batch: list[list[str]]) -> Tensor:
    rows = [[VOCABULARY.index(token) for token in sentence] for sentence in batch]
    return torch.tensor([row + [0] * (5 - len(row)) for row in rows])


def test_cached_words_have_the_same_vectors() -> None:
    module, plain = elmo(dropout=0.0, vocab_to_cache=VOCABULARY), elmo(dropout=0.0)
    nothing = torch.zeros(4, 5, 50, dtype=torch.int64)  # the characters aren't read
    found, expected = module(nothing, words(SENTENCES)), plain(batch_to_ids(SENTENCES))
    assert torch.equal(found["mask"], expected["mask"])
    pair = (found["elmo_representations"][0], expected["elmo_representations"][0])
    torch.testing.assert_close(*pair, atol=1e-6, rtol=0)
    nested = module(nothing.view(2, 2, 5, 50), words(SENTENCES).view(2, 2, 5))["elmo_representations"][0]
    assert torch.equal(nested, found["elmo_representations"][0].view(2, 2, 5, 16))


def test_unknown_words_are_computed_from_their_characters(caplog: pytest.LogCaptureFixture) -> None:
    module, plain = elmo(dropout=0.0, vocab_to_cache=VOCABULARY), elmo(dropout=0.0)
    ids = batch_to_ids([["The", "newcomer"]])
    for _ in range(2):
        found = module(ids, torch.tensor([[1, len(VOCABULARY)]]))["elmo_representations"][0]
        assert torch.equal(found, plain(ids)["elmo_representations"][0])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "word_inputs: 9 (expected 0 to 8" in caplog.text
    with pytest.raises(ValueError, match="word_inputs: -1"):
        module(ids, torch.tensor([[1, -1]]))


def test_words_without_a_cache_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    ids, module = batch_to_ids(SENTENCES), elmo(dropout=0.0)
    assert torch.equal(module(ids, words(SENTENCES))["elmo_representations"][0], vectors(module, SENTENCES))
    assert "without vocab_to_cache" in caplog.text


def test_the_cache_of_a_trained_bilm_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        module = elmo(requires_grad=True, vocab_to_cache=VOCABULARY)
    assert "vocab_to_cache with requires_grad" in caplog.text
    assert module.state_dict()["_elmo_lstm._word_embedding.weight"].shape == (9, 8)


# ---- models, checkpoints, copies ------------------------------------------------------------------------------------


def test_all_forms_of_a_model(tmp_path: Path) -> None:
    options, weights = GOLDEN / "options.json", GOLDEN / "weights.hdf5"
    convert(load(str(GOLDEN)), tmp_path / "model.safetensors", "float32")
    single = str(tmp_path / "model.safetensors")
    expected = vectors(Elmo(options, weights, 1, dropout=0.0), SENTENCES)
    for files in [(str(options), str(weights)), (None, single), (single, None), (None, str(GOLDEN))]:
        assert torch.equal(vectors(Elmo(*files, 1, dropout=0.0), SENTENCES), expected), files


def test_a_saved_module_is_the_same_when_loaded(tmp_path: Path) -> None:
    module = elmo(2, requires_grad=True, dropout=0.0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
    torch.save(module.state_dict(), tmp_path / "checkpoint.pt")
    other = elmo(2, dropout=0.0)
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    expected = vectors(module, SENTENCES)
    for each in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(vectors(each, SENTENCES), expected)


def test_parameters_have_the_published_names_and_shapes() -> None:
    options = json.loads((GOLDEN / "options.json").read_text(encoding="utf-8"))
    cell, projection = options["lstm"]["dim"], options["lstm"]["projection_dim"]
    state = Elmo(GOLDEN / "options.json", GOLDEN / "weights.hdf5", 1).state_dict()
    assert state["_elmo_lstm._token_embedder._char_embedding_weights"].shape[0] == 262
    assert state["_elmo_lstm._elmo_lstm.forward_layer_0.input_linearity.weight"].shape == (4 * cell, projection)
    assert state["_elmo_lstm._elmo_lstm.backward_layer_1.state_linearity.bias"].shape == (4 * cell,)
    assert state["_elmo_lstm._elmo_lstm.backward_layer_1.state_projection.weight"].shape == (projection, cell)
    assert state["scalar_mix_0.gamma"].tolist() == [1.0]
    assert state["scalar_mix_0.scalar_parameters.2"].tolist() == [0.0]


class TwoLayers(nn.Module):
    """Stands in for a biLM: one vector everywhere, twice."""

    num_layers = 2

    def forward(self, inputs: Tensor, word_inputs: Tensor | None) -> dict[str, Any]:
        layer = torch.ones(inputs.shape[0], inputs.shape[1] + 2, 3)
        return {"activations": [layer, 3 * layer], "mask": torch.ones(layer.shape[:2], dtype=torch.bool)}


def test_another_module_in_the_bilms_place() -> None:
    module = Elmo(None, None, 1, dropout=0.0, module=TwoLayers())
    assert torch.equal(vectors(module, [["a", "b"]]), torch.full((1, 2, 3), 2.0))


def test_a_module_that_was_moved() -> None:
    module = elmo(dropout=0.0, vocab_to_cache=VOCABULARY).double()
    assert vectors(module, SENTENCES).dtype == torch.float64
    assert module(batch_to_ids(SENTENCES), words(SENTENCES))["elmo_representations"][0].dtype == torch.float64


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, TINY, 0), {}, ValueError, r"num_output_representations: 0 \(expected at least 1\)"),
        ((None, None, 1), {}, ValueError, r"weight_file: None \(expected a path"),
        ((None, "https://example.org/w.hdf5", 1), {}, ValueError, "nothing is downloaded"),
        ((None, "absent.safetensors", 1), {}, WeightsError, "no such file or folder"),
        ((GOLDEN / "options.json", None, 1), {}, WeightsError, "JSON; expected a .safetensors file"),
        ((GOLDEN / "weights.hdf5", GOLDEN / "weights.hdf5", 1), {}, ConfigError, "weights.hdf5"),
        ((None, TINY, 1), {"scalar_mix_parameters": [1.0]}, ValueError, r"1 weights \(expected 3"),
        ((None, TINY, 1), {"vocab_to_cache": "words"}, TypeError, r"the string 'words' \(expected a list of words\)"),
        ((None, TINY, 1), {"dropout": 2.0}, ValueError, "dropout"),
        ((None, TINY, 1), {"module": TwoLayers()}, ValueError, r"weight_file: .* \(expected None beside module\)"),
        ((None, None, 1), {"module": TwoLayers(), "carry_state": True}, ValueError, "carry_state"),
        ((None, None, 1), {"module": nn.Linear(1, 1)}, TypeError, "Linear.num_layers is None"),
    ],
)
def test_arguments_of_no_use(
    arguments: tuple[Any, Any, int], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Elmo(*arguments, **options)


def test_inputs_of_no_use() -> None:
    module = elmo()
    ids = batch_to_ids([["a", "b"]])
    with pytest.raises(TypeError, match=r"inputs: list \(expected a tensor of character ids; see batch_to_ids\)"):
        module([["a", "b"]])
    with pytest.raises(ValueError, match=r"shape \(2, 50\) \(expected \(batch, tokens, 50\)\)"):
        module(ids[0])
    with pytest.raises(TypeError, match=r"inputs: torch.float32 \(expected integers"):
        module(ids.float())
    with pytest.raises(CharacterError, match="expected 0 to 261, found 262"):
        module(torch.full((1, 1, 50), 262))
    with pytest.raises(ValueError, match="inputs: sentence 0 has padding before a token"):
        module(torch.cat([torch.zeros(1, 1, 50, dtype=torch.int64), ids], dim=1))
    with pytest.raises(ValueError, match=r"word_inputs: shape \(1, 3\) \(expected \(1, 2\)\)"):
        elmo(vocab_to_cache=VOCABULARY)(ids, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"inputs: on meta \(expected cpu, where the module is\)"):
        module(ids.to("meta"))
