"""bilm-serve without a server: the client's surface over an engine in this process.

from bilm_local import LocalEmbedder

with LocalEmbedder("model.safetensors") as embedder:
for embedding in embedder.embed(["The bank of the river.", ["Tokens", "are", "fine", "too", "."]]):
print(embedding.tokens, embedding.vectors.shape)  # (layers, tokens, width)
"""

from bilm_local.embedder import LocalEmbedder

__all__ = ["LocalEmbedder"]
