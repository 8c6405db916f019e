"""Run a function in several processes that form a gloo group; what one of them raises fails the test with its text."""

from __future__ import annotations

import io
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _one(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], out: Connection):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        buffer = io.BytesIO()  # as bytes: a tensor's shared memory would be gone with this process
        torch.save(function(*arguments), buffer)
        out.send((None, buffer.getvalue()))
    except Exception:
        out.send((traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """What `function(*arguments)` returns on every rank; it must be importable (spawned processes unpickle it)."""
    context, port = mp.get_context("spawn"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(target=_one, args=(rank, world, port, function, arguments, pipes[rank][1]))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        answers = []
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(timeout_s), f"rank {rank} said nothing in {timeout_s} s"
            answers.append(receiver.recv())
        for rank, (error, _) in enumerate(answers):
            assert error is None, f"rank {rank}:\n{error}"
        return [torch.load(io.BytesIO(value)) for _, value in answers]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
