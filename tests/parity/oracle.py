"""A biLM in float64 numpy, straight from the published file's keys: shares nothing with the code it checks."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


class Oracle:
    def __init__(self, weights: Path, options: dict[str, Any]) -> None:
        self.lstm, self.cnn = options["lstm"], options["char_cnn"]
        self.w: dict[str, Array] = {}
        with h5py.File(weights) as file:
            file.visititems(
                lambda key, item: self.w.update({key: item[()].astype(np.float64)}) if hasattr(item, "shape") else None
            )

    def token(self, token: str) -> Array:
        if token == "<S>":
            inner = [256]
        elif token == "</S>":
            inner = [257]
        else:
            inner = list(token.encode()[:48])
        ids = [258, *inner, 259]
        ids += [260] * (50 - len(ids))
        characters = self.w["char_embed"][ids]
        parts = []
        for k, (width, count) in enumerate(self.cnn["filters"]):
            kernel, bias = self.w[f"CNN/W_cnn_{k}"][0], self.w[f"CNN/b_cnn_{k}"]
            responses = np.empty((51 - width, count))
            for s in range(51 - width):
                responses[s] = np.tensordot(characters[s : s + width], kernel, axes=([0, 1], [0, 1])) + bias
            peak = responses.max(axis=0)
            parts.append(np.maximum(peak, 0) if self.cnn["activation"] == "relu" else np.tanh(peak))
        x = np.concatenate(parts)
        for k in range(self.cnn["n_highway"]):
            w = {name: self.w[f"CNN_high_{k}/{name}"] for name in ("W_carry", "b_carry", "W_transform", "b_transform")}
            gate = sigmoid(x @ w["W_carry"] + w["b_carry"])
            x = gate * np.maximum(x @ w["W_transform"] + w["b_transform"], 0) + (1 - gate) * x
        if "CNN_proj/W_proj" in self.w:
            x = x @ self.w["CNN_proj/W_proj"] + self.w["CNN_proj/b_proj"]
        return x

    def layer(self, direction: int, k: int, xs: list[Array]) -> list[Array]:
        prefix = f"RNN_{direction}/RNN/MultiRNNCell/Cell{k}/LSTMCell/"
        dim = self.lstm["dim"]
        projection = self.w.get(prefix + "W_P_0")
        c, h = np.zeros(dim), np.zeros(dim if projection is None else projection.shape[1])
        outputs = []
        for x in xs:
            z = np.concatenate([x, h]) @ self.w[prefix + "W_0"] + self.w[prefix + "B"]
            i, j, f, o = np.split(z, 4)
            c = np.clip(sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j), -self.lstm["cell_clip"], self.lstm["cell_clip"])
            h = sigmoid(o) * np.tanh(c)
            if projection is not None:
                h = np.clip(h @ projection, -self.lstm["proj_clip"], self.lstm["proj_clip"])
            outputs.append(h)
        return outputs

    def __call__(self, tokens: list[str]) -> Array:
        """Layers (L, T, D) of a sentence with zero state."""
        vectors = [self.token(token) for token in ("<S>", *tokens, "</S>")]
        directions = []
        for d, inputs in enumerate((vectors, vectors[::-1])):
            layers, xs = [inputs], inputs
            for k in range(self.lstm["n_layers"]):
                ys = self.layer(d, k, xs)
                sums = [y + x for x, y in zip(xs, ys, strict=True)]
                if self.lstm.get("residual") == "input_to_input":
                    layers.append(ys)
                    xs = sums
                else:
                    xs = sums if self.lstm["use_skip_connections"] and k > 0 else ys
                    layers.append(xs)
            directions.append(np.array([layer if d == 0 else layer[::-1] for layer in layers]))
        return np.asarray(np.concatenate(directions, axis=-1)[:, 1:-1])
