"""The tokenizer for text that is tokenised already."""

import re

from bilm_model.tokenization.offsets import in_bytes
from bilm_model.tokenization.types import TokenizedText


class WhitespaceTokenizer:
    """What Unicode white space leaves."""

    name = "whitespace"

    def __call__(self, text: str) -> TokenizedText:
        """See `Tokenizer`."""
        return in_bytes(text, [(match.start(), match.end(), match.group()) for match in re.finditer(r"\S+", text)])
