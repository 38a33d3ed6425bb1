"""For the tests of those who call bilm-serve: fake clients, and a fixture that starts a real server.

    from bilm_client.testing import FakeClient

    with FakeClient(failures={"a bad sentence": "SENTENCE_TOO_LONG"}) as client:
        [embedding] = client.embed("Deterministic vectors , no server .")

Of several models, each has a name, vectors and a shape of its own:

    FakeClient(models=[FakeModel("en"), FakeModel("de", width=8)], model="de")

The fixture: `from bilm_client.testing.pytest_plugin import bilm_server` in a conftest.py.
"""

from bilm_client.testing.fake import FakeAsyncClient, FakeClient
from bilm_client.testing.models import FakeModel
from bilm_client.testing.server import RunningServer, ServerStartError

__all__ = ["FakeAsyncClient", "FakeClient", "FakeModel", "RunningServer", "ServerStartError"]
