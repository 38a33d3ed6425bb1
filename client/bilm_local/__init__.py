"""bilm-serve without a server: the client's surface over an engine in this process.

from bilm_local import LocalEmbedder

with LocalEmbedder("model.safetensors") as embedder:
for embedding in embedder.embed(["The bank of the river.", ["Tokens", "are", "fine", "too", "."]]):
print(embedding.tokens, embedding.vectors.shape)  # (layers, tokens, width)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bilm_local.embedder import LocalEmbedder

__all__ = ["LocalEmbedder"]


def __getattr__(name: str) -> object:
    # It loads torch, which `bilm-embed` has no use for where a server computes.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.embedder"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
