"""What a machine may lack: a GPU, whose tests are skipped then, and plugins of pytest that no GPU test needs."""

import pytest
import torch

_OF_ASYNCIO = ("asyncio_mode", "asyncio_default_fixture_loop_scope")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Let the settings of a plugin that isn't installed stand in the configuration; --strict-config forbids them."""
    if not pluginmanager.has_plugin("asyncio"):
        for name in _OF_ASYNCIO:
            parser.addini(name, "of pytest-asyncio, which isn't installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where torch sees none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))
