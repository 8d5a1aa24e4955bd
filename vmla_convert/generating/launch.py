"""Processes that compute one stream together: start them here, or join those of a launcher.

Every process runs the same function. Process 0 opens text encoder and VAE and writes the video; the
others get what they need from it and compute their share of the model (`layers.parallel`).
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from vmla_convert.config import ModelConfig
from vmla_convert.errors import ConfigError, VmlaError, first_line
from vmla_convert.layers.parallel import ALONE, OneProcess, SequenceParallel

T = TypeVar("T")

# The others wait while process 0 encodes prompts and decodes video. A process that ends ends all.
_TIMEOUT = timedelta(days=1)
_GRACE_SECONDS = 30


class Group(NamedTuple):
    """One of the processes that compute a stream.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process opens text encoder and VAE and writes the video."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in process 0, and return its result in all processes."""
        if self.size == 1:
            return make()
        held: list[Any] = [make() if self.leads else None]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def parallel(self, config: ModelConfig) -> OneProcess:
        """This process's share of a model's streams.

        Raises:
            ConfigError: Some process would have no head or no token.
        """
        if self.size == 1:
            return ALONE
        return SequenceParallel(
            self.rank, self.size, config.geometry.num_heads, config.tokens_per_frame
        )


ONE = Group()


def run_together(count: int | None, work: Callable[[Group], T]) -> T:
    """Run a function in several processes that form one group, and return process 0's result.

    Under a launcher such as torchrun, which has started the processes already, this one joins them
    and returns its own result.

    Args:
        count: Number of processes; None for those of a launcher, or one.
        work: The function, which can be pickled. Its result is process 0's.

    Raises:
        ConfigError: There are fewer GPUs than processes, or a launcher started another number.
        VmlaError: The function raised it in some process, or a process was killed.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        if count not in (None, launched):
            raise ConfigError(
                f"--processes {count}, but the launcher started {launched}",
                "leave --processes out under torchrun",
            )
        with _group(int(os.environ["RANK"]), launched, "env://") as group:
            return work(group)
    if count is None or count == 1:
        return work(ONE)
    check_gpus(count)
    return _started(count, work)


def check_gpus(count: int) -> None:
    """Refuse more processes than there are GPUs; without a GPU, processes share the CPU.

    Raises:
        ConfigError: There are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise ConfigError(
            f"{count} processes need {count} GPUs, and there are {gpus}",
            f"use --processes {gpus} or fewer",
        )


class _Failure(NamedTuple):
    """An exception of a process, in parts: pickled whole, some lose their hint."""

    kind: type[Exception]
    arguments: tuple[str, ...]


@contextmanager
def _group(rank: int, size: int, where: str) -> Iterator[Group]:
    """Form the group, and leave it at the end."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Objects are exchanged on the CPU, tensors where they are.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, where, timeout=_TIMEOUT, rank=rank, world_size=size)
    try:
        yield Group(rank, size)
    finally:
        dist.destroy_process_group()


def _started(count: int, work: Callable[[Group], T]) -> T:
    with TemporaryDirectory() as place:
        answer = Path(place) / "answer"
        arguments = (count, Path(place) / "rendezvous", answer, work)
        running: Any = start_processes(_run_one, arguments, count, join=False)
        try:
            while not running.join(grace_period=_GRACE_SECONDS):
                pass
        except ProcessExitedException:
            _check_killed(running, answer)
        finally:
            _end(running)
        failure, result = pickle.loads(answer.read_bytes())
    if failure is not None:
        raise failure.kind(*failure.arguments)
    return result


def _check_killed(running: Any, answer: Path) -> None:
    """Raise an error where no process said why it ended, or only that another one was gone.

    Raises:
        VmlaError: A process was killed.
    """
    codes = [process.exitcode or 0 for process in running.processes]
    killed = [code for code in codes if code < 0 and code != -signal.SIGTERM]
    if killed or not answer.exists():
        ended = signal.Signals(-killed[0]).name if killed else f"exit codes {codes}"
        raise VmlaError(
            f"one of {len(codes)} processes ended by {ended}",
            "where memory is short the system kills processes: use fewer",
        ) from None


def _end(running: Any) -> None:
    """End processes that are still there, after an error or an interruption."""
    for process in running.processes:
        if process.is_alive():
            process.terminate()
    for process in running.processes:
        process.join(_GRACE_SECONDS)
        if process.is_alive():
            process.kill()


def _run_one(rank: int, count: int, rendezvous: Path, answer: Path, work: Any) -> None:
    """Run the function in a started process, and write process 0's result or the first error."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)  # cleans up what is half written
    os.environ["LOCAL_RANK"] = str(rank)
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    with _group(rank, count, f"file://{rendezvous}") as group:
        try:
            result = work(group)
        except VmlaError as error:
            _write_first(answer, rank, _Failure(VmlaError, (error.message, error.hint)))
            sys.exit(2)
        except Exception as error:
            if os.environ.get("VMLA_DEBUG") == "1":
                raise
            _write_first(answer, rank, _Failure(RuntimeError, (first_line(error),)))
            sys.exit(1)
        if rank == 0:
            _write_first(answer, rank, None, result)


def _write_first(answer: Path, rank: int, failure: _Failure | None, result: object = None) -> None:
    """Write the answer unless there is one: peers complain about a lost connection later."""
    draft = answer.with_name(f"answer-{rank}")
    draft.write_bytes(pickle.dumps((failure, result)))
    with suppress(FileExistsError):
        os.link(draft, answer)
