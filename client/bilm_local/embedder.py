"""The client's surface over an engine in this process."""

import math
import os
from functools import partial
from pathlib import Path

from bilm_client._core.settings import Settings
from bilm_client.client import TransportClient
from bilm_client.policy import RetryPolicy

from bilm_local.loading import LocalSettings, as_path, load_local
from bilm_local.transport import LocalTransport

_TARGET = "this process"


class LocalEmbedder(TransportClient):
    """Embeds sentences without a server: `embed`, `embed_stream` and the others are those of `Client`.

    Vectors have the bits of a server's with the same model, device and precision. The model loads with the first call,
    in a thread that computes for all calls. Many threads may use one embedder at once. A forked process loads the model
    again, unless it was on a GPU, which raises ForkedError; an embedder pickles as its arguments. See docs/local.md.

    Calls raise ModelError of bilm_model where the model can't be loaded.

    Args:
        path: A `.safetensors` file of ours, a folder with published `options.json` and `weights.hdf5`, or a published
            weight file; "": the model that ships.
        options: The published options that go with a published weight file.
        device: "cpu", "cuda", "cuda:N", or "auto": a GPU where there is one.
        precision: Of the products: "float32", "bfloat16", or "auto": bfloat16 where the device has such products.
        tokenizer: Of texts, "moses" or "whitespace".
        tokenizer_language: Whose rules Moses follows: "en", "de", "ko", …
        expected_model_version: Version that the caller relies on; another one raises ModelVersionError. "": any.
        timeout_s: Seconds that a call may take, where the call itself names none, loading included.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: An argument has a value that can't be; the message names it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "",
        *,
        options: str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: str = "float32",
        tokenizer: str = "moses",
        tokenizer_language: str = "en",
        expected_model_version: str = "",
        timeout_s: float = math.inf,
    ) -> None:
        chosen = LocalSettings(
            path=as_path("path", path),
            options=None if options is None else Path(as_path("options", options)),
            device=device,
            precision=precision,
            tokenizer=tokenizer,
            tokenizer_language=tokenizer_language,
        )
        settings = Settings(
            target=_TARGET,
            expected_model_version=expected_model_version,
            timeout_s=timeout_s,
            retry=RetryPolicy(max_attempts=1),
        )
        super().__init__(settings, partial(LocalTransport, chosen, load_local))
