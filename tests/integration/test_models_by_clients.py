"""Several real models as clients and operators see them: `bilm-models`, and servers that don't all have a model."""

import asyncio
from pathlib import Path

import pytest
from bilm_client import AsyncClient
from bilm_client.cli.models import main
from bilm_client.errors import ModelNotFoundError

from tests.integration.test_several_models import TOKEN, Running, running, write


async def command(capsys: pytest.CaptureFixture[str], it: Running, *arguments: str, token: str = TOKEN) -> str:
    """Run `bilm-models` beside the server; its exit code, and what it has printed."""
    (file := it.folder / "token").write_text(token + "\n", encoding="utf-8")
    flags = ["--target", it.server.target, "--token-file", str(file)]
    code = await asyncio.to_thread(main, [*arguments, *flags])
    printed = capsys.readouterr()
    return f"{code}\n{printed.out}{printed.err}"


async def test_an_operator_lists_and_reloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(tmp_path) as it:
        listed = await command(capsys, it, "list")
        assert f"\n* a     {it.versions['a']}       3" in listed
        assert f"\n  b     {it.versions['b']}       3" in listed
        write(tmp_path / "c.safetensors", 8)
        it.configure("a", "c")
        assert await command(capsys, it, "reload") == "0\nadded: c\nremoved: b\nkept: a\n"
        assert await command(capsys, it, "reload") == "0\nkept: a, c\n"

        refused = await command(capsys, it, "reload", token="b" * 32)
        assert refused.startswith("1\n")
        assert "(RIGHT_MISSING)" in refused
        assert 'rights = ["reload"]' in refused

        (damaged := tmp_path / "damaged").write_bytes(b"not a model")
        damaged.rename(tmp_path / "c.safetensors")
        refused = await command(capsys, it, "reload")
        assert refused.startswith("1\n")
        assert "(RELOAD_FAILED)" in refused
        assert "c.safetensors" in refused
        assert "nothing has changed" in refused


async def test_a_model_is_called_where_it_is_served(tmp_path: Path) -> None:
    """Of two servers one has it; by a reload the other one gets it, too, of the same version."""
    for folder in (first_folder := tmp_path / "first", second_folder := tmp_path / "second"):
        folder.mkdir()
    async with running(first_folder) as first, running(second_folder) as second:
        targets = [it.server.target for it in (first, second)]
        write(second_folder / "c.safetensors", 8)
        second.configure("a", "b", "c")
        await second.reload()
        async with AsyncClient(targets, balance="round_robin", model="c", token=TOKEN) as client:
            for _ in range(10):
                await client.embed([["a", "word"]])
            write(first_folder / "c.safetensors", 8)
            first.configure("a", "b", "c")
            await first.reload()
            await second.server.stop()
            await client.embed([["a", "word"]])
        async with AsyncClient(targets, balance="round_robin", model="other", token=TOKEN) as client:
            with pytest.raises(ModelNotFoundError, match="a, b, c"):
                await client.embed([["a", "word"]])
