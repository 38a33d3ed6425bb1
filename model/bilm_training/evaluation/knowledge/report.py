"""All that was found, as JSON and as Markdown for a model card."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bilm_model.errors import ModelError
from pydantic import TypeAdapter, ValidationError

from bilm_training.evaluation.knowledge.neighbours import WordNeighbours
from bilm_training.evaluation.knowledge.scores import ProbeScore, TreebankReport, best
from bilm_training.evaluation.perplexity import Perplexity


@dataclass(frozen=True)
class Neighbourhood:
    """Neighbours in a text.

    Attributes:
        text: its name.
        layer: whose vectors were compared.
        words: the ambiguous words.
    """

    text: str
    layer: int
    words: tuple[WordNeighbours, ...]


@dataclass(frozen=True)
class Knowledge:
    """What a biLM's vectors know.

    Attributes:
        treebanks: parts of speech.
        neighbourhoods: senses of ambiguous words.
        perplexity: by the text's name.
    """

    treebanks: tuple[TreebankReport, ...] = ()
    neighbourhoods: tuple[Neighbourhood, ...] = ()
    perplexity: dict[str, Perplexity] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; accuracies are shares, in 0 to 1."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object) -> "Knowledge":
        """Return the object that `to_dict` gave, through JSON or not.

        Raises:
            ModelError: listing everything that is missing or of another kind.
        """
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            bad = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise ModelError("knowledge: " + "; ".join(bad)) from error

    def markdown(self) -> str:
        """Tables and lists, each under a heading of the third level."""
        lines = list(_perplexities(self.perplexity)) if self.perplexity else []
        lines += [line for treebank in self.treebanks for line in _treebank(treebank)]
        lines += [line for neighbourhood in self.neighbourhoods for line in _neighbourhood(neighbourhood)]
        return "\n".join(lines)


def read_knowledge(path: Path) -> Knowledge:
    """Read an eval.json.

    Raises:
        ModelError: if it is damaged.
    """
    try:
        return Knowledge.from_dict(json.loads(path.read_bytes()))
    except (ValueError, ModelError) as error:
        raise ModelError(f"{path}: {error}") from error


def _perplexities(found: Mapping[str, Perplexity]) -> Iterator[str]:
    yield "### Perplexity"
    yield ""
    yield "Full vocabulary, per token with end of line, state carried from line to line."
    yield ""
    yield "| text | forward | backward | mean | tokens |"
    yield "|---|---|---|---|---|"
    for name, p in found.items():
        yield f"| {name} | {p.forward:.1f} | {p.backward:.1f} | {p.mean:.1f} | {p.tokens:,} |"
    yield ""


def _treebank(report: TreebankReport) -> Iterator[str]:
    top, words = best(report.model), report.word_identity
    yield f"### Parts of speech: {report.name}"
    yield ""
    yield (
        f"Linear probes on {report.train_tokens:,} training tokens, {len(report.tags)} tags, accuracy on all "
        f"{report.test_tokens:,} test tokens in per cent; then with a typo in {report.typos:,} of their words. "
        f"Seed {report.seed}."
    )
    yield ""
    yield "| probed | accuracy | with typos | loss in points |"
    yield "|---|---|---|---|"
    for name, scores in (("layer", report.model), ("random biLM, layer", report.random)):
        yield from (_row(f"{name} {score.layer}", score) for score in scores)
    yield _row("word identity", words)
    yield ""
    distance = f"{abs(report.margin):.1f} points {'above' if report.margin >= 0 else 'below'}"
    yield f"- Best is layer {top.layer}, {distance} the random biLM's best. {_order(report)}"
    yield f"- Typos cost layer {top.layer} {top.loss:.1f} points, word identity {words.loss:.1f}."
    yield ""


def _row(name: str, score: ProbeScore) -> str:
    note = "" if score.converged else " (probe not converged)"
    return f"| {name}{note} | {_percent(score.accuracy)} | {_percent(score.accuracy_with_typos)} | {score.loss:.1f} |"


def _order(report: TreebankReport) -> str:
    """Peters et al. 2018, section 5.3: syntax is in the first LSTM layer more than in the second."""
    if len(report.model) < 3:
        return ""
    first, second = (score.accuracy for score in report.model[1:3])
    verdict = "knows more than" if first > second else "doesn't know more than"
    return f"Layer 1 {verdict} layer 2: {_percent(first)} and {_percent(second)}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _neighbourhood(found: Neighbourhood) -> Iterator[str]:
    yield f"### Neighbours of ambiguous words: {found.text}"
    yield ""
    yield f"Nearest occurrences in other sentences by the cosine of layer {found.layer}."
    yield ""
    for word in found.words:
        yield f"- {word.word}, {word.occurrences} occurrences"
        for query in word.queries:
            yield f"  - {query.snippet}"
            yield from (f"    - {n.cosine:.2f} {n.snippet}" for n in query.neighbours)
    yield ""
