"""AllenNLP's `Elmo`: mixes of the biLM's layers as a module of a larger network.

Legend: B sentences, T tokens of the longest, D components of a vector.
"""

import logging
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TypedDict, cast

from torch import Tensor, nn

from bilm_model.bilm import Bilm
from bilm_model.elmo.batches import without_boundaries
from bilm_model.elmo.bilm_module import ElmoBilm
from bilm_model.elmo.mix import TrainableMix
from bilm_model.weights.loading import load

log = logging.getLogger(__name__)


class ElmoOutput(TypedDict):
    """What `Elmo` returns.

    Attributes:
        elmo_representations: (B, T, D) for each mix, zero where there is no token; T + 2 with the boundaries.
        mask: (B, T), true where there is a token.
    """

    elmo_representations: list[Tensor]
    mask: Tensor


class Elmo(nn.Module):
    """ELMo representations: trainable mixes of a biLM's layers (Peters et al. 2018).

    The arguments, their defaults and the names of the parameters are those of AllenNLP's `Elmo`, so its checkpoints
    load here and those of this module load there. One thing differs: a sentence starts from zero state unless
    `carry_state` is set, where AllenNLP goes on from the batch before.

    Args:
        options_file: path of the published options (JSON); None: `weight_file` is a model by itself.
        weight_file: path of the published weights (HDF5); or, without `options_file`, one of our `.safetensors` files,
            a folder with both published files, or "", the model that ships. None: `options_file` is that model.
        num_output_representations: how many mixes; the biLM runs once for all of them.
        requires_grad: train the biLM, too.
        do_layer_norm: normalise the layers before they are mixed, over the batch as AllenNLP does (see `TrainableMix`).
        dropout: applied to the representations in training.
        vocab_to_cache: words whose characters are computed once; `forward` then takes `word_inputs`, their places in
            this list. The first one stands for padding.
        keep_sentence_boundaries: return the rows of the boundaries, too.
        scalar_mix_parameters: weights of the layers before the softmax, for all mixes, which are not trained then.
        module: used instead of a biLM from files: with `num_layers` and a `forward` as that of `ElmoBilm`.
        carry_state: continue each row from the same row of the batch before, as AllenNLP does: a smaller batch leaves
            the other rows' states as they are, a larger one starts its new rows from zero; `reset_states` forgets.

    Raises:
        TypeError, ValueError: An argument is of no use, or two of them contradict each other.
        WeightsError, ConfigError: The files hold no model.
    """

    def __init__(  # noqa: PLR0917 - AllenNLP's
        self,
        options_file: str | PathLike[str] | None,
        weight_file: str | PathLike[str] | None,
        num_output_representations: int,
        requires_grad: bool = False,
        do_layer_norm: bool = False,
        dropout: float = 0.5,
        vocab_to_cache: Sequence[str] | None = None,
        keep_sentence_boundaries: bool = False,
        scalar_mix_parameters: Sequence[float] | None = None,
        module: nn.Module | None = None,
        *,
        carry_state: bool = False,
    ) -> None:
        super().__init__()
        if num_output_representations < 1:
            raise ValueError(f"num_output_representations: {num_output_representations} (expected at least 1)")
        if module is None:
            bilm = _load(options_file, weight_file)
            self._elmo_lstm: nn.Module = _embedder(bilm, requires_grad, vocab_to_cache, carry_state)
        else:
            _refuse_beside_module(options_file, weight_file, vocab_to_cache, carry_state)
            self._elmo_lstm = module
        self._keep_sentence_boundaries = keep_sentence_boundaries
        self._dropout = nn.Dropout(p=dropout)
        self.num_output_representations = num_output_representations
        n_layers = _layer_count(self._elmo_lstm)
        for k in range(num_output_representations):
            mix = TrainableMix(
                n_layers,
                layer_norm=do_layer_norm,
                weights=scalar_mix_parameters,
                trainable=scalar_mix_parameters is None,
            )
            self.add_module(f"scalar_mix_{k}", mix)

    def get_output_dim(self) -> int:
        """Return the components of a vector."""
        return cast(ElmoBilm, self._elmo_lstm).get_output_dim()

    def reset_states(self) -> None:
        """Forget the state of earlier batches; of no effect without `carry_state`."""
        cast(ElmoBilm, self._elmo_lstm).reset_states()

    def forward(self, inputs: Tensor, word_inputs: Tensor | None = None) -> ElmoOutput:
        """Embed a batch.

        Args:
            inputs: (B, T, 50) character ids as `batch_to_ids` makes them; more dimensions in front are kept.
            word_inputs: (B, T) places in `vocab_to_cache`, 0 where there is no token. A batch with a larger one is
                computed from `inputs`.

        Raises:
            TypeError, ValueError: A tensor is of another form.
            CharacterError: A character id is not in the alphabet.
        """
        outer = inputs.shape[:-2] if isinstance(inputs, Tensor) and inputs.dim() > 3 else None
        if outer is not None:
            inputs = inputs.flatten(0, -3)
            word_inputs = None if word_inputs is None else word_inputs.flatten(0, -2)
        found = self._elmo_lstm(inputs, word_inputs)
        vectors, mask = self._representations(found["activations"], found["mask"])
        if outer is not None:
            vectors = [each.reshape(*outer, *each.shape[-2:]) for each in vectors]
            mask = mask.reshape(*outer, mask.shape[-1])
        return {"elmo_representations": vectors, "mask": mask}

    def _representations(self, layers: list[Tensor], mask: Tensor) -> tuple[list[Tensor], Tensor]:
        mixes = [self.get_submodule(f"scalar_mix_{k}") for k in range(self.num_output_representations)]
        found, kept = [], mask
        for mix in mixes:
            vectors = mix(layers, mask)
            if not self._keep_sentence_boundaries:
                vectors, kept = without_boundaries(vectors, mask)
            found.append(self._dropout(vectors))
        return found, kept


def _load(options_file: str | PathLike[str] | None, weight_file: str | PathLike[str] | None) -> Bilm:
    if options_file is None and weight_file is None:
        raise ValueError('weight_file: None (expected a path; "" is the model that ships)')
    for name, path in (("options_file", options_file), ("weight_file", weight_file)):
        if path is not None and fspath(path).startswith(("http://", "https://", "s3://")):
            raise ValueError(f"{name}: {fspath(path)!r} (expected the path of a file: nothing is downloaded here)")
    if weight_file is None:
        return load(fspath(cast(str, options_file))).bilm
    return load(fspath(weight_file), None if options_file is None else Path(options_file)).bilm


def _embedder(bilm: Bilm, requires_grad: bool, vocabulary: Sequence[str] | None, carry_state: bool) -> ElmoBilm:
    embedder = ElmoBilm.from_bilm(bilm, requires_grad=requires_grad, carry_state=carry_state)
    if isinstance(vocabulary, str):
        raise TypeError(f"vocab_to_cache: the string {vocabulary[:40]!r} (expected a list of words)")
    if vocabulary:
        if requires_grad:
            log.warning("vocab_to_cache with requires_grad: cached words are trained apart from the biLM")
        embedder.create_cached_cnn_embeddings(vocabulary)
    return embedder


def _refuse_beside_module(options_file: object, weight_file: object, vocabulary: object, carry_state: bool) -> None:
    given = {"options_file": options_file, "weight_file": weight_file, "vocab_to_cache": vocabulary}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: {value!r} (expected None beside module)")
    if carry_state:
        raise ValueError("carry_state: True (expected False beside module, which keeps its own state)")


def _layer_count(module: nn.Module) -> int:
    found = getattr(module, "num_layers", None)
    if not isinstance(found, int):
        raise TypeError(f"module: {type(module).__name__}.num_layers is {found!r} (expected its number of layers)")
    return found
