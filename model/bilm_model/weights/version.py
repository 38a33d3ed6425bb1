"""A model's version: what it computes, not what its file is called."""

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from bilm_model.config import BilmConfig, to_options

_VERSION_LENGTH = 16


def content_version(config: BilmConfig, tensors: Mapping[str, Tensor]) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 over the options and all weights as float32.

    The same for the same model in either file format; another where float16 has rounded the weights.
    """
    digest = hashlib.sha256(json.dumps(to_options(config), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()[:_VERSION_LENGTH]
