"""What Python clients of OpenAI's API get of a server, as JSON on standard output; run in their own environment."""

import json
import sys
from collections.abc import Callable
from typing import Any

TEXTS = ("The bank by the river was steep .", "Ünïcödé wörds", "a")


def call_by_openai(url: str, key: str, model: str) -> dict[str, Any]:
    """Return vectors by each way to ask for them, and what refusals are raised as."""
    import openai

    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
    stranger = openai.OpenAI(base_url=url, api_key="a-key-of-nobody-here", max_retries=0, timeout=60)
    create = client.embeddings.create
    errors = {}
    attempts: dict[str, Callable[[], Any]] = {
        "empty": lambda: create(model=model, input=["a", ""]),
        "integers": lambda: create(model=model, input=[[1, 2, 3]]),
        "model": lambda: create(model="another", input="a"),
        "dimensions": lambda: create(model=model, input="a", dimensions=3),
        "key": lambda: stranger.embeddings.create(model=model, input="a"),
    }
    for name, call in attempts.items():
        try:
            call()
        except openai.APIStatusError as error:
            errors[name] = [type(error).__name__, error.code, error.message]
    default = create(model=model, input=list(TEXTS))
    average = {"layers": "average", "pooling": "max"}
    return {
        "default": [item.embedding for item in default.data],
        "float": [item.embedding for item in create(model=model, input=list(TEXTS), encoding_format="float").data],
        "average": [item.embedding for item in create(model=model, input=list(TEXTS), extra_body=average).data],
        "tokens": default.usage.prompt_tokens,
        "models": [each.id for each in client.models.list()],
        "model": client.models.retrieve(model).id,
        "errors": errors,
    }


def call_by_langchain(url: str, key: str, model: str) -> dict[str, Any]:
    """Return vectors of documents and of a query."""
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(base_url=url, api_key=key, model=model, check_embedding_ctx_length=False)
    return {"default": embeddings.embed_documents(list(TEXTS)), "query": embeddings.embed_query(TEXTS[0])}


def call_by_haystack(url: str, key: str, model: str) -> dict[str, Any]:
    """Return vectors of documents and of a query."""
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    settings: dict[str, Any] = {"api_base_url": url, "api_key": Secret.from_token(key), "model": model}
    settings |= {"max_retries": 0, "timeout": 60.0}
    documents = OpenAIDocumentEmbedder(**settings, progress_bar=False).run([Document(content=text) for text in TEXTS])
    query = OpenAITextEmbedder(**settings).run(TEXTS[0])
    return {
        "default": [document.embedding for document in documents["documents"]],
        "query": query["embedding"],
        "tokens": query["meta"]["usage"]["prompt_tokens"],
    }


def call_by_llama_index(url: str, key: str, model: str) -> dict[str, Any]:
    """Return vectors of texts and of a query, and what a refusal is raised as."""
    import openai
    from llama_index.embeddings.openai import OpenAIEmbedding

    embeddings = OpenAIEmbedding(api_base=url, api_key=key, model_name=model, max_retries=0, timeout=60)
    errors = {}
    try:
        embeddings.get_text_embedding_batch([TEXTS[0], ""])
    except openai.APIStatusError as error:
        errors["empty"] = [type(error).__name__, error.code, error.message]
    return {
        "default": embeddings.get_text_embedding_batch(list(TEXTS)),
        "query": embeddings.get_query_embedding(TEXTS[0]),
        "errors": errors,
    }


if __name__ == "__main__":
    calls = {
        "openai": call_by_openai,
        "langchain": call_by_langchain,
        "haystack": call_by_haystack,
        "llama-index": call_by_llama_index,
    }
    print(json.dumps(calls[sys.argv[1]](*sys.argv[2:])))
