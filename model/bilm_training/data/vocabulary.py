"""The words that the softmax knows."""

from collections import Counter
from dataclasses import dataclass, field

from bilm_model.characters import BEGIN_TOKEN, END_TOKEN

from bilm_training.errors import CorpusError

BOUNDARY = 0
"""The class that ends a sentence: after its last word reading forward, after its first reading backward."""
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Vocabulary:
    """The words that the softmax knows, most frequent first; class 0 is the sentence boundary.

    A word outside it is read by its characters all the same; as a target it counts as "<unk>".

    Attributes:
        words: by class.
        classes: the class of each word.
    """

    words: tuple[str, ...]
    classes: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        classes = {word: index for index, word in enumerate(self.words)}
        classes[BEGIN_TOKEN] = BOUNDARY
        object.__setattr__(self, "classes", classes)

    @classmethod
    def of(cls, counts: Counter[str], max_words: int | None = None) -> "Vocabulary":
        """Return the most frequent words, equally frequent ones in alphabetical order.

        With fewer words than the text has, or where rare ones were lost in counting, "<unk>" stands for the others.
        """
        boundaries = (BEGIN_TOKEN, END_TOKEN)  # a text may have them as words: they are read as what they mean
        words = sorted(counts.keys() - boundaries, key=lambda word: (-counts[word], word))
        if max_words is not None and len(words) > max_words:
            words = [*[word for word in words if word != UNKNOWN][: max_words - 1], UNKNOWN]
        return cls((END_TOKEN, *words))

    @classmethod
    def from_text(cls, text: str) -> "Vocabulary":
        """Read what `to_text` wrote."""
        return cls(tuple(text.splitlines()))

    def to_text(self) -> str:
        """A word a line, by class."""
        return "".join(f"{word}\n" for word in self.words)

    def target(self, word: str) -> int:
        """Return the class of a word.

        Raises:
            CorpusError: if the word is unknown to a vocabulary without "<unk>".
        """
        known = self.classes.get(word, self.classes.get(UNKNOWN))
        if known is None:
            raise CorpusError(
                f"the word {word!r} is not in the vocabulary, which has no {UNKNOWN}: a run with data.max_words below "
                f"{len(self.words) - 1} has it for rare and new words"
            )
        return known
