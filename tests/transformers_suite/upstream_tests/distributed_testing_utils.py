"""Starts one process per rank, on the CPU, as upstream's tests of parallelism expect."""

import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed
import torch.multiprocessing


# Importing takes longer than most of these tests, so ranks are forked off a process that has imported all this. It is
# not the test's own process, which has threads and must not be forked.
START_METHOD = "forkserver" if "forkserver" in torch.multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ["torch.distributed.tensor", "transformers.testing_utils", "egmla"]


def run_distributed(world_size: int) -> Callable:
    """Make a call that runs `function(rank, *args)` on all ranks, and raises if one of them does."""

    def decorate(function: Callable) -> Callable:
        def run(*args) -> None:
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = f"file://{folder}/rendezvous"
                _start_rank_processes(_run_rank, (world_size, rendezvous, function, args), nprocs=world_size)

        return run

    return decorate


def _run_rank(rank: int, world_size: int, rendezvous: str, function: Callable, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)  # the ranks share the machine's cores
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        torch.distributed.destroy_process_group()


# The names below are upstream's.


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """Runs `function(rank, *args)` in `nprocs` processes and raises if one of them does."""
    if START_METHOD == "forkserver":
        torch.multiprocessing.get_context(START_METHOD).set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(function, args, nprocs=nprocs, start_method=START_METHOD)


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Nothing to choose on the CPU."""
