"""What the published `Elmo` computes, in an environment of its own (`make .venv-elmo/.installed`).

usage: python published_elmo.py MODEL_FOLDER WORK_FOLDER; reads sentences.json and ours.pt there, writes theirs.pt and
found.pt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from simple_elmo_pytorch.models.elmo import Elmo, batch_to_ids


def main(model: Path, work: Path) -> None:
    files = [str(model / "options.json"), str(model / "weights.hdf5")]
    spec = json.loads((work / "sentences.json").read_text(encoding="utf-8"))
    batches = [batch_to_ids(batch) for batch in spec["batches"]]
    found: dict[str, Any] = {"ids": batches[0]}
    for name, options in spec["variants"].items():
        elmo = Elmo(*files, **options)
        torch.manual_seed(0)
        found[name] = [outputs(from_zero_state(elmo, ids)) for ids in batches]
    carried = Elmo(*files, 1, dropout=0.0)
    found["carried"] = [outputs(carried(ids)) for ids in batches]
    found["names"], found["gradients"] = gradients(Elmo(*files, 2, requires_grad=True, dropout=0.0), batches[0])
    found["cached"] = cached(files, spec)
    torch.save(Elmo(*files, 2, requires_grad=True).state_dict(), work / "theirs.pt")
    loaded = Elmo(*files, 2, requires_grad=True, dropout=0.0)
    loaded.load_state_dict(torch.load(work / "ours.pt", weights_only=True))
    found["loaded"] = outputs(loaded(batches[0]))
    torch.save(found, work / "found.pt")


def from_zero_state(elmo: Any, ids: torch.Tensor) -> Any:
    elmo.get_submodule("_elmo_lstm._elmo_lstm").reset_states()
    return elmo(ids)


def outputs(found: dict[str, Any]) -> list[torch.Tensor]:
    return [each.detach() for each in (*found["elmo_representations"], found["mask"])]


def gradients(elmo: Any, ids: torch.Tensor) -> tuple[list[str], dict[str, torch.Tensor]]:
    first, second = elmo(ids)["elmo_representations"]
    (first.square().sum() + second.sin().sum()).backward()
    return [name for name, _ in elmo.named_parameters()], {n: p.grad for n, p in elmo.named_parameters()}


def cached(files: list[str], spec: dict[str, Any]) -> list[torch.Tensor]:
    elmo = Elmo(*files, 1, dropout=0.0, vocab_to_cache=spec["vocabulary"])
    # The package's own class of embeddings lacks functions that it calls
    name = "_elmo_lstm._word_embedding"
    weight = elmo.get_submodule(name).weight
    elmo.set_submodule(name, torch.nn.Embedding(len(weight), weight.shape[1], padding_idx=0, _weight=weight))
    return outputs(elmo(batch_to_ids(spec["words"]), torch.tensor(spec["word_ids"])))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
