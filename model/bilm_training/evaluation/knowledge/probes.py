"""What each layer knows of parts of speech, next to a random biLM and to the words alone, with and without typos."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bilm_model.bilm import Bilm, random_bilm
from tqdm import tqdm

from bilm_training.data.typos import with_typos
from bilm_training.errors import CorpusError
from bilm_training.evaluation.knowledge.linear import LinearProbe, Probed, Tags
from bilm_training.evaluation.knowledge.scores import ProbeScore, TreebankReport
from bilm_training.evaluation.knowledge.treebank import TaggedSentence, read_part, sample
from bilm_training.evaluation.knowledge.vectors import SentenceEmbedder

MAX_TRAIN_TOKENS = 100_000
"""All 204,577 of EWT's gave a probe of layer 1 of wikitext2-mini 0.3 points more (89.9 and 90.2 % of the dev part with
C = 0.01), in twice the time and memory."""

Words = Sequence[Sequence[str]]


def probe(
    bilm: Bilm,
    treebank_folder: Path,
    *,
    seed: int = 1,
    typo_share: float = 0.1,
    max_train_tokens: int | None = MAX_TRAIN_TOKENS,
    device: str = "auto",
) -> TreebankReport:
    """Probes every layer of a biLM for the universal parts of speech of a treebank.

    Args:
        bilm: in float32; left as it is.
        treebank_folder: with one *-ud-train.conllu, to fit to, and one *-ud-test.conllu, to measure on.
        seed: of the random biLM, the typos and the choice of training sentences.
        typo_share: of the test sentences' words, in 0 to 1, see `with_typos`.
        max_train_tokens: to fit to; None: all.
        device: to embed on, see `resolve_device`.

    Raises:
        CorpusError: if a part is missing or damaged, or has too little to fit to.
        ModelError: if there is no such device here.
    """
    task = _Task.of(treebank_folder, seed, typo_share, max_train_tokens)
    word_identity = task.word_identity()
    return TreebankReport(
        name=treebank_folder.resolve().name,
        train_tokens=len(task.train_tags),
        test_tokens=len(task.test_tags),
        typos=sum(a != b for a, b in zip(_flat(task.test), _flat(task.test_with_typos), strict=True)),
        tags=tuple(np.unique(task.train_tags).tolist()),
        seed=seed,
        model=task.layers(bilm, device, "model"),
        random=task.layers(random_bilm(bilm.config, seed), device, "random"),
        word_identity=word_identity,
    )


@dataclass(frozen=True, eq=False)
class _Task:
    """The same data for all probes."""

    name: str
    train: Words
    train_tags: Tags
    test: Words
    test_tags: Tags
    test_with_typos: Words

    @classmethod
    def of(cls, folder: Path, seed: int, typo_share: float, max_train_tokens: int | None) -> "_Task":
        train = sample(read_part(folder, "train"), max_train_tokens, seed)
        test = read_part(folder, "test")
        if len({tag for sentence in train for tag in sentence.tags}) < 2:
            raise CorpusError(f"{folder}: the training sentences, at most {max_train_tokens} tokens, have no two tags")
        words = [sentence.words for sentence in test]
        typos = with_typos(words, typo_share, seed)
        return cls(folder.name, [sentence.words for sentence in train], _tags(train), words, _tags(test), typos)

    def word_identity(self) -> ProbeScore:
        fitted = LinearProbe.on_words(_flat(self.train), self.train_tags)
        return self._score(None, fitted, _flat(self.test), _flat(self.test_with_typos))

    def layers(self, bilm: Bilm, device: str, title: str) -> tuple[ProbeScore, ...]:
        embedder, title = SentenceEmbedder(bilm, device), f"{self.name}: {title}"
        train, test, typos = (embedder.all(words, title) for words in (self.train, self.test, self.test_with_typos))
        scores = []
        for layer, vectors in enumerate(tqdm(train, desc=f"{title}, probes", unit="layer")):
            fitted = LinearProbe.on_vectors(vectors, self.train_tags)
            scores.append(self._score(layer, fitted, test[layer], typos[layer]))
        return tuple(scores)

    def _score(self, layer: int | None, fitted: LinearProbe, test: Probed, test_with_typos: Probed) -> ProbeScore:
        accuracy, with_typos = (fitted.accuracy(probed, self.test_tags) for probed in (test, test_with_typos))
        return ProbeScore(layer, accuracy, with_typos, fitted.converged)


def _flat(sentences: Words) -> list[str]:
    return [word for words in sentences for word in words]


def _tags(sentences: Sequence[TaggedSentence]) -> Tags:
    return np.array([tag for sentence in sentences for tag in sentence.tags])
