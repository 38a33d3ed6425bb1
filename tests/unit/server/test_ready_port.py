"""A port whose being open says something."""

import asyncio
import socket

import pytest
from bilm_server.ready_port import GREETING, ReadyPort


async def said_on(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = await reader.read()
    writer.close()
    await writer.wait_closed()
    return said


async def test_open_only_while_ready_and_always_on_the_same_port() -> None:
    ready = ReadyPort("127.0.0.1", 0)
    ports = set()
    for _ in range(3):
        await ready.show(True)
        await ready.show(True)
        ports.add(ready.port)
        assert await said_on(ready.port) == GREETING
        await ready.show(False)
        await ready.show(False)
        with pytest.raises(ConnectionRefusedError):
            await said_on(ready.port)
    assert len(ports) == 1


async def test_those_who_only_connect_cost_nothing_that_lasts() -> None:
    ready = ReadyPort("127.0.0.1", 0)
    await ready.show(True)
    silent = [socket.create_connection(("127.0.0.1", ready.port)) for _ in range(50)]
    assert await said_on(ready.port) == GREETING
    for connection in silent:  # the server has ended each of them, although nobody read
        assert connection.recv(100) == GREETING
        assert connection.recv(100) == b""
        connection.close()
    await ready.show(False)


async def test_a_taken_port_is_an_error() -> None:
    first = ReadyPort("127.0.0.1", 0)
    await first.show(True)
    with pytest.raises(OSError, match="address already in use"):
        await ReadyPort("127.0.0.1", first.port).show(True)
    await first.show(False)
