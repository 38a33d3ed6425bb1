"""A small student learns the layer vectors of a teacher: `bilm-train distill`.

Both read the same windows of text, typos included, each with its own carried state. What is minimised is the share of
the variance of the teacher's vectors that the student leaves unexplained, the same weight for every layer; 1 is what a
student reaches that gives each layer's mean for every token. All tokens count, boundaries too, from the first step on:
a stream begins with zero state for both, as a served sentence does.

Legend: S steps, B streams, L layers with the token layer, P projection of the student, Q of the teacher.
"""

import torch
from bilm_model.bilm import Bilm, BilmState, initialize
from bilm_model.config import BilmConfig
from bilm_model.errors import ConfigError, WeightsError
from bilm_model.kernels.product_paths import ProductPath
from bilm_model.weights.loading import LoadedModel, load
from torch import Tensor, nn

from bilm_training.data.corpus import Corpus
from bilm_training.data.streams import Streams, WindowPair, valid_streams
from bilm_training.data.vocabulary import Vocabulary
from bilm_training.objectives.language_model import window_layers
from bilm_training.recipe import Distillation, Recipe

_MEASURED_TOKENS = 32_768
"""Enough to know a layer's variance well, few enough not to delay a start by much."""


class DistillationObjective(nn.Module):
    """A student with what it is trained under: its teacher, and a map from its vectors to the teacher's.

    The state of this module holds the student, the maps and the variances, not the teacher: of it only the version, and
    only under the same teacher can the state be loaded.

    Attributes:
        bilm: the student.
        teacher: never trained.
        maps: for each direction and layer, (…, P) -> (…, Q); learnt, or the identity.
        variances: (2, L) what an error is measured by, see `layer_variances`.
    """

    variances: Tensor

    def __init__(self, student: Bilm, teacher: LoadedModel, variances: Tensor, maps: str, dropout: float) -> None:
        """Put the parts together.

        Args:
            student: to be trained.
            teacher: with the same number of layers, on the same device.
            variances: (2, L) of the teacher's layers.
            maps: "linear" or "identity"; identity leaves the student's vectors in the teacher's space.
            dropout: of the student.
        """
        super().__init__()
        self.bilm = student
        self.teacher = teacher  # no module, so that neither parameters() nor a checkpoint sees it
        P, Q = student.config.projection_dim, teacher.bilm.config.projection_dim
        n_layers = student.config.layer_count
        self.maps = nn.ModuleList(
            nn.ModuleList(nn.Linear(P, Q) if maps == "linear" else nn.Identity() for _ in range(n_layers))
            for _ in ("forward", "backward")
        )
        self.register_buffer("variances", variances)
        self.dropout = nn.Dropout(dropout)

    def zero_state(self, n_streams: int) -> tuple[BilmState, ...]:
        """Return the student's and the teacher's before any text."""
        return self.bilm.zero_state(n_streams), self.teacher.bilm.zero_state(n_streams)

    def metric(self, mean_loss: float) -> float:
        """Return the loss itself: the share that isn't explained."""
        return mean_loss

    def forward(
        self, pair: WindowPair, states: tuple[BilmState, ...], bfloat16: ProductPath | None = None
    ) -> tuple[Tensor, Tensor, tuple[BilmState, ...]]:
        """Run one window of each direction.

        Args:
            pair: the windows.
            states: after the windows before: the student's, the teacher's.
            bfloat16: how to compute the LSTMs' products in bfloat16, of both; None: in the parameters' format.

        Returns:
            The unexplained share of each direction, (2,), summed over tokens; their numbers, (2,); and the states, cut
            off from the graph.
        """
        student_state, teacher_state = states
        layers, student_state = window_layers(self.bilm, pair, student_state, self.dropout, bfloat16)
        with torch.no_grad():
            targets, teacher_state = window_layers(self.teacher.bilm, pair, teacher_state, nn.Identity(), bfloat16)
        sums = [self._unexplained(d, layers[d], targets[d]) for d in range(2)]
        counts = torch.tensor([window.tokens.size for window in pair.directions])
        return torch.stack(sums), counts, (student_state, teacher_state)

    def _unexplained(self, d: int, layers: list[Tensor], targets: list[Tensor]) -> Tensor:
        """A direction's layers (S, B, P) and the teacher's (S, B, Q) -> a scalar."""
        maps = self.maps[d].children()
        # In mixed precision only a map's product is in the reduced format
        errors = [
            (to_teacher(x).to(target.dtype) - target).square().sum()
            for to_teacher, x, target in zip(maps, layers, targets, strict=True)
        ]
        return (torch.stack(errors) / self.variances[d]).mean()

    def get_extra_state(self) -> dict[str, str]:
        """Return what the state has beside tensors."""
        return {"teacher": self.teacher.version}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Make sure that the teacher is still the same.

        Raises:
            WeightsError: if it isn't.
        """
        if state["teacher"] != self.teacher.version:
            raise WeightsError(
                f"the teacher {self.teacher.name} is not the one that the run began with: expected version "
                f"{state['teacher']}, found {self.teacher.version}"
            )


def new_distillation(recipe: Recipe, vocabulary: Vocabulary, device: torch.device) -> DistillationObjective:
    """Return the untrained student of a recipe, with its teacher; seeds torch's random numbers.

    The variances are measured on the validation text, so that metrics on it are shares of a variance and two students
    are measured by the same; a state that is loaded afterwards brings its own.

    Raises:
        ConfigError: if the recipe names no teacher, or a student that can't learn from it.
        WeightsError: if there is no such teacher.
        CorpusError: if the validation text can't be used.
    """
    if recipe.distillation is None:
        raise ConfigError("distillation.teacher: missing")
    teacher = load(recipe.distillation.teacher)
    _check(recipe.distillation, recipe.architecture, teacher)
    teacher.bilm.to(device)
    variances = layer_variances(teacher.bilm, valid_streams(Corpus.open(recipe.data.valid), vocabulary))
    torch.manual_seed(recipe.seed)
    student = initialize(Bilm(recipe.architecture), torch.Generator().manual_seed(recipe.seed))
    dropout = recipe.optimisation.dropout
    return DistillationObjective(student, teacher, variances, recipe.distillation.map, dropout).to(device)


def _check(distillation: Distillation, student: BilmConfig, loaded: LoadedModel) -> None:
    teacher = loaded.bilm.config
    if student.n_layers != teacher.n_layers:
        raise ConfigError(
            f"architecture.n_layers: expected {teacher.n_layers}, as the teacher {loaded.name} has, "
            f"found {student.n_layers}"
        )
    if distillation.map == "identity" and student.projection_dim != teacher.projection_dim:
        raise ConfigError(
            f"architecture.projection_dim: expected {teacher.projection_dim}, as the teacher {loaded.name} has, "
            f'found {student.projection_dim} (distillation.map = "linear" would do with it)'
        )


@torch.no_grad()
def layer_variances(teacher: Bilm, streams: Streams, n_tokens: int = _MEASURED_TOKENS) -> Tensor:
    """Return the variance of a teacher's vectors: the mean squared distance from their mean, over running text.

    Args:
        teacher: what is measured.
        streams: the text, read with the state carried from window to window.
        n_tokens: to stop after, at the end of a window; streams begin all over the text.

    Returns:
        (2, L): for each direction the token layer and the LSTM layers.

    Raises:
        WeightsError: if a layer is the same for all of them.
    """
    state, n_read = teacher.zero_state(streams.n_streams), 0
    sums = state.h.new_zeros(2, teacher.config.layer_count, teacher.config.projection_dim, dtype=torch.float64)
    squares = torch.zeros_like(sums)
    for pair in streams.windows():
        layers, state = window_layers(teacher, pair, state, nn.Identity())
        x = torch.stack([torch.stack(outputs) for outputs in layers]).flatten(2, 3).double()  # (2, L, S·B, Q)
        sums += x.sum(dim=2)
        squares += x.square().sum(dim=2)
        n_read += x.shape[2]
        if n_read >= n_tokens:
            break
    variances = (squares / n_read - (sums / n_read).square()).sum(dim=-1)
    if not bool((variances > 0).all()):
        raise WeightsError(f"the teacher's layers don't tell tokens apart: variances {variances.tolist()}")
    return variances.to(state.h.dtype)
