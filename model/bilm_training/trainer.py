"""The training loop: windows, steps, checkpoints; a run that was killed continues as if it hadn't been."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bilm_model.bilm import BilmState
from bilm_model.characters import END_TOKEN
from bilm_model.kernels.product_paths import ProductPath, resolve_precision
from bilm_model.weights import single_file
from bilm_system.files import replaced, write_text
from tqdm import tqdm

from bilm_training.data.corpus import Corpus
from bilm_training.data.streams import Streams, WindowPair, valid_streams
from bilm_training.data.vocabulary import UNKNOWN, Vocabulary
from bilm_training.errors import RunError
from bilm_training.evaluation.perplexity import mean_losses
from bilm_training.learner import Learner
from bilm_training.objectives.objective import Objective
from bilm_training.recipe import Recipe, read_recipe, to_toml
from bilm_training.runs.checkpoints import Save, load_parameters, read_checkpoint, read_vocabulary, write_checkpoint
from bilm_training.runs.records import EpochRecord, StepRecord
from bilm_training.runs.run_folder import RunFolder
from bilm_training.runs.run_log import RunLog

NewObjective = Callable[[Recipe, Vocabulary, torch.device], Objective]


@dataclass(frozen=True)
class RunWriters:
    """What a run is written by.

    Attributes:
        new_log: makes the log of a folder, to continue after a step.
        save: writes a checkpoint's content to an open file.
    """

    new_log: Callable[[RunFolder, int], RunLog] = RunLog
    save: Save = torch.save


_TO_FILES = RunWriters()


class Trainer:
    """A run: everything that a checkpoint holds, and the texts.

    Attributes:
        recipe: the run's choices.
        folder: where it leaves its files.
        stop: set to end after the present step, with a checkpoint.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        objective: Objective,
        *,
        train: Streams,
        valid: Corpus,
        device: torch.device,
        bfloat16: ProductPath | None = None,
        writers: RunWriters = _TO_FILES,
    ) -> None:
        self.recipe, self.folder, self._writers = recipe, folder, writers
        self.stop = False
        self._objective, self._train, self._valid, self._device = objective, train, valid, device
        optimisation = recipe.optimisation
        total_steps = train.n_windows * optimisation.epochs
        self._learner = Learner(objective, optimisation, total_steps, device, bfloat16)
        self._step, self._seconds = 0, 0.0
        self._best = math.inf
        self._states = objective.zero_state(optimisation.batch)
        self._epoch_loss, self._epoch_tokens, self._epoch_seconds = 0.0, 0, 0.0

    @property
    def products(self) -> ProductPath | None:
        """How bfloat16 products are computed; None: they are in float32."""
        return self._learner.products

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        folder: RunFolder,
        new_objective: NewObjective,
        device: torch.device,
        bfloat16: ProductPath | None = None,
        *,
        writers: RunWriters = _TO_FILES,
    ) -> "Trainer":
        """Begin a new run: write its recipe and vocabulary into a folder that is taken.

        Args:
            recipe: what to train; the precision that "auto" stands for here is what the folder will say.
            folder: where.
            new_objective: makes the objective.
            device: where to train.
            bfloat16: how to compute bfloat16 products; None: the fastest way here.
            writers: what the run is written by.

        Raises:
            RunError: if the folder holds a run already.
            CorpusError: if a text can't be used.
        """
        if folder.config.exists():
            raise RunError(f"{folder.path}: holds a run already; go on with it by  bilm-train resume {folder.path}")
        if recipe.distillation is None:
            counts: Counter[str] = Counter()
            corpus = Corpus.open(recipe.data.train, counts)
            vocabulary = Vocabulary.of(counts, recipe.data.max_words)
        else:  # no word is predicted
            corpus, vocabulary = Corpus.open(recipe.data.train), Vocabulary((END_TOKEN, UNKNOWN))
        recipe = _resolved(recipe, device, bfloat16)
        trainer = cls._of(
            recipe,
            folder,
            corpus,
            vocabulary,
            new_objective=new_objective,
            device=device,
            bfloat16=bfloat16,
            writers=writers,
        )
        write_text(folder.vocabulary, vocabulary.to_text())
        write_text(folder.config, to_toml(recipe))
        return trainer

    @classmethod
    def resume(
        cls,
        folder: RunFolder,
        new_objective: NewObjective,
        device: torch.device,
        bfloat16: ProductPath | None = None,
        *,
        writers: RunWriters = _TO_FILES,
    ) -> "Trainer":
        """A run as its last checkpoint has it; from the beginning if it didn't come to the first one.

        Raises:
            RunError: if there is no run, or its checkpoint is damaged, of other texts or of another precision.
            CorpusError: if a text can't be used any more.
        """
        recipe = _resolved(read_recipe(str(folder.config)), device, bfloat16)
        vocabulary = read_vocabulary(folder)
        # Without a step there is nothing to lose: the disk was full, for one
        begun = folder.checkpoint.exists() or folder.steps.exists()
        checkpoint = read_checkpoint(folder.checkpoint) if begun else None
        corpus = Corpus.open(recipe.data.train)
        trainer = cls._of(
            recipe,
            folder,
            corpus,
            vocabulary,
            new_objective=new_objective,
            device=device,
            bfloat16=bfloat16,
            writers=writers,
        )
        if checkpoint is not None:
            trainer._restore(checkpoint)
        return trainer

    @classmethod
    def _of(
        cls,
        recipe: Recipe,
        folder: RunFolder,
        corpus: Corpus,
        vocabulary: Vocabulary,
        *,
        new_objective: NewObjective,
        device: torch.device,
        bfloat16: ProductPath | None,
        writers: RunWriters,
    ) -> "Trainer":
        batch, steps = recipe.optimisation.batch, recipe.optimisation.steps
        streams = Streams(corpus, vocabulary, batch, steps, typos=recipe.data.typos, seed=recipe.seed)
        valid = Corpus.open(recipe.data.valid)
        valid_streams(valid, vocabulary).check()
        objective = new_objective(recipe, vocabulary, device)
        return cls(
            recipe, folder, objective, train=streams, valid=valid, device=device, bfloat16=bfloat16, writers=writers
        )

    def run(self) -> bool:
        """Train to the end, or until `stop` is set; return whether the end was reached.

        Raises:
            DivergedError: if the loss is no number any more; the last checkpoint is from before that.
            OSError: if something can't be written; the last checkpoint stays as it was.
        """
        self._started = time.monotonic() - self._seconds
        if self._step == 0:
            self._save_checkpoint()
        with self._writers.new_log(self.folder, self._step) as log:
            while self._step < self._train.n_windows * self.recipe.optimisation.epochs:
                if not self._epoch(log):
                    return False
        return True

    def _epoch(self, log: RunLog) -> bool:
        epochs, n_windows = self.recipe.optimisation.epochs, self._train.n_windows
        epoch, first = self._step // n_windows + 1, self._step % n_windows
        self._learner.module.train()
        bar = tqdm(total=n_windows, initial=first, desc=f"epoch {epoch}/{epochs}", unit="step")
        begun = time.monotonic()
        with bar:
            for pair in self._train.windows(first, epoch):
                if self.stop:
                    self._checkpoint(log)
                    return False
                record = self._learn(pair, epoch, begun)
                begun = time.monotonic()
                log.step(record)
                bar.set_postfix_str(f"loss {record.loss:.3f}", refresh=False)
                bar.update()
                if self._step % self.recipe.optimisation.checkpoint_steps == 0 and self._step % n_windows:
                    self._checkpoint(log)
                    begun = time.monotonic()  # checkpoints are no part of the speed, reading the text is
        self._end_epoch(log, epoch)
        return True

    def _learn(self, pair: WindowPair, epoch: int, begun: float) -> StepRecord:
        learnt = self._learner.learn(pair, self._states)
        self._states = learnt.states
        self._step += 1
        seconds = time.monotonic() - begun
        loss, n_tokens = float(learnt.sums.sum()), int(learnt.counts.sum())
        self._epoch_loss += loss
        self._epoch_tokens += n_tokens
        self._epoch_seconds += seconds
        forward, backward = (learnt.sums / learnt.counts).tolist()
        return StepRecord(
            step=self._step,
            epoch=epoch,
            loss=loss / max(1, n_tokens),
            loss_forward=forward,
            loss_backward=backward,
            learning_rate=learnt.learning_rate,
            gradient_norm=learnt.gradient_norm,
            tokens_per_s=pair.forward.tokens.size / seconds,
            seconds=self._elapsed(),
        )

    def _end_epoch(self, log: RunLog, epoch: int) -> None:
        found = mean_losses(self._objective, valid_streams(self._valid, self._train.vocabulary))
        record = EpochRecord(
            epoch=epoch,
            step=self._step,
            train_loss=self._epoch_loss / self._epoch_tokens,
            valid_forward=self._objective.metric(found[0]),
            valid_backward=self._objective.metric(found[1]),
            tokens_per_s=self._train.length * self._train.n_streams / self._epoch_seconds,
            seconds=self._elapsed(),
        )
        if record.valid_mean < self._best:
            self._best = record.valid_mean
            self._save_best()
        log.epoch(record)
        tqdm.write(
            f"epoch {epoch}: valid {record.valid_forward:.4g} forward, {record.valid_backward:.4g} backward; "
            f"{record.tokens_per_s:,.0f} tokens/s"
        )
        self._epoch_loss, self._epoch_tokens, self._epoch_seconds = 0.0, 0, 0.0
        self._states = self._objective.zero_state(self.recipe.optimisation.batch)
        self._checkpoint(log)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    # ---- what stays ---------------------------------------------------------------------------------------------

    def _save_best(self) -> None:
        bilm = self._objective.bilm
        write_checkpoint(self.folder.best, self._learner.module.state_dict(), self._writers.save)
        with replaced(self.folder.model) as draft:
            single_file.write(draft, bilm.config, {name: tensor.cpu() for name, tensor in bilm.state_dict().items()})

    def _checkpoint(self, log: RunLog) -> None:
        log.sync()
        self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        content = {
            "step": self._step,
            "seconds": self._elapsed(),
            "best": self._best,
            "epoch": (self._epoch_loss, self._epoch_tokens, self._epoch_seconds),
            "objective": self._learner.module.state_dict(),
            **self._learner.state_dict(),
            "states": [(state.h, state.c) for state in self._states],
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
            "digests": self._digests(),
            "precision": self.recipe.optimisation.precision,
        }
        write_checkpoint(self.folder.checkpoint, content, self._writers.save)

    def _restore(self, content: dict[str, Any]) -> None:
        for path, digest in self._digests().items():
            if content["digests"].get(path) != digest:
                raise RunError(f"{path}: isn't what the run {self.folder.path} began with")
        precision = self.recipe.optimisation.precision
        if content.get("precision", precision) != precision:  # earlier versions didn't write it
            raise RunError(
                f"{self.folder.config}: optimisation.precision: expected {content['precision']}, which the run began "
                f"with, found {precision}"
            )
        self._step, self._seconds, self._best = content["step"], content["seconds"], content["best"]
        self._epoch_loss, self._epoch_tokens, self._epoch_seconds = content["epoch"]
        load_parameters(self._learner.module, content["objective"], self.folder.checkpoint)
        self._learner.load_state_dict(content)
        self._states = tuple(BilmState(h.to(self._device), c.to(self._device)) for h, c in content["states"])
        torch.set_rng_state(content["random"])
        if content["cuda_random"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(content["cuda_random"], self._device)

    def _digests(self) -> dict[str, str]:
        texts = {str(corpus.path): corpus.digest for corpus in (self._train.corpus, self._valid)}
        words = hashlib.blake2b(self._train.vocabulary.to_text().encode(), digest_size=16).hexdigest()
        return {**texts, self.folder.vocabulary.name: words}


def _resolved(recipe: Recipe, device: torch.device, bfloat16: ProductPath | None) -> Recipe:
    """Return the recipe with the precision that "auto" stands for on a device."""
    precision = resolve_precision(recipe.optimisation.precision, device, bfloat16)
    return recipe.model_copy(update={"optimisation": recipe.optimisation.model_copy(update={"precision": precision})})
