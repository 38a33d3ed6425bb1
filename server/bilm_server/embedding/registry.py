"""The models that are served, by name; each call finds its own here, and keeps it until its end."""

from collections.abc import Iterator, Sequence

from bilm_api.constants import Reason

from bilm_server.embedding.conversions import Conversions
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.preprocessing import RequestLimits
from bilm_server.errors import RefusalError
from bilm_server.observability.call_record import current_call


class Registry:
    """Embedders by the names of their models; used from the event loop only.

    Attributes:
        limits: of single requests, for every model.
        conversions: threads for what would hold the event loop, of all models together.
    """

    def __init__(self, limits: RequestLimits, conversions: Conversions, embedders: Sequence[Embedder] = ()) -> None:
        """Keep what all models share, and the first ones; see `replace`."""
        self.limits, self.conversions = limits, conversions
        self._embedders: dict[str, Embedder] = {}
        self.replace(embedders)

    def replace(self, embedders: Sequence[Embedder]) -> None:
        """Let calls find these from now on, the first one where they name no model; calls under way keep theirs."""
        self._embedders = {each.model.name: each for each in embedders}

    def __iter__(self) -> Iterator[Embedder]:
        """Yield each one, the default one first."""
        return iter(tuple(self._embedders.values()))

    @property
    def default(self) -> Embedder:
        """What embeds for calls that name no model."""
        return next(iter(self._embedders.values()))

    def has(self, name: str, expected_version: str) -> bool:
        """Return whether `find` would find anything."""
        try:
            self._find(name, expected_version)
        except RefusalError:
            return False
        return True

    def find(self, name: str, expected_version: str) -> Embedder:
        """Return what embeds for the present call, which is one of this model from then on.

        Args:
            name: of the model; "": the default one.
            expected_version: that the caller relies on; "": any.

        Raises:
            RefusalError: MODEL_NOT_FOUND or MODEL_VERSION_MISMATCH.
        """
        call = current_call()
        try:
            embedder = self._find(name, "")
            call.model = embedder.model.name
        except RefusalError:
            call.model = ""
            raise
        self._find(name, expected_version)
        call.held.add(embedder.take())
        return embedder

    def _find(self, name: str, expected_version: str) -> Embedder:
        found = self._embedders.get(name) if name else next(iter(self._embedders.values()), None)
        if found is None:
            served = ", ".join(sorted(self._embedders))
            raise RefusalError(Reason.MODEL_NOT_FOUND, f"no such model is served here (expected one of {served})")
        if expected_version not in ("", found.model.version):
            raise RefusalError(
                Reason.MODEL_VERSION_MISMATCH, f"the version of {found.model.name} served here is {found.model.version}"
            )
        return found
