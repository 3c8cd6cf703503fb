"""Processes that make things ahead of time, in a fixed order, and hand them over through shared memory (Linux).

Workers come from a fork server: forking the training process would copy its threads' locks (gloo, CUDA), and spawning
costs each worker an import of torch. Each has a socket of its own, which closes with it: a death is noticed at once, a
hang after the time limit. Results travel in anonymous shared memory (``memfd``): no kill leaves it behind, no small
``/dev/shm`` limits it, the receiver works on it in place, and its pages serve again when the receiver drops them.
Results that are small and quickly made travel several at a time: waking a process costs more than they do.
"""

from __future__ import annotations

import gc
import logging
import mmap
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import queue
import select
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple, Protocol

import numpy as np

from shards.errors import DataError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What a scheduler or a terminal sends to every process of a job; only the trainer may act on it."""
_MESSAGE_SECONDS, _MESSAGE_BYTES, _MESSAGE_RESULTS = 20e-3, 1 << 20, 8
"""How much goes into one message at most, if it is more than one result: a hundred times what a message costs."""
_ALIGN = 64
_SMALLEST_SLOT = 1 << 16

Pickled = tuple[bytes, list[memoryview]]
"""A pickle (protocol 5), and the buffers it was told to leave out."""


class Work(Protocol):
    """What a worker does; pickled once for all of them."""

    def begin(self) -> None:
        """Called once in every worker."""
        ...

    def run(self, requests: list[Any]) -> list[Pickled]:
        """One result per request. Must not raise."""
        ...


class _Message(NamedTuple):
    """What a worker writes to its socket when it has put results into shared memory."""

    slot: int
    """Which shared memory holds them."""
    new_bytes: int
    """Size of the slot when its descriptor follows, else 0."""
    dropped: list[int]
    """Slots that are gone."""
    sizes: list[list[int]]
    """Per result the bytes of its pickle and of every buffer; all begin at multiples of _ALIGN, one after another."""
    seconds: float
    """Time it took to make them."""


class Workers:
    """A fixed number of processes; message number ``n`` is made by worker ``n % count``.

    Args:
        work: what they do.
        count: processes.
        ahead: messages each is given before its oldest one is taken; a message is one result, or several small ones.
        timeout_seconds: longest wait for a start or a result.
    """

    def __init__(self, work: Work, count: int, ahead: int, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._pool = _Pool(count)
        self._begun = time.monotonic()
        self._stop = weakref.finalize(self, self._pool.end)
        pickled = pickle.dumps(work, protocol=5)  # here: another thread could meet an object while it is in use
        context = fork_server()
        # A start waits for the imports of the fork server, so it happens beside whatever the caller does first.
        threading.Thread(target=self._pool.start, args=(context, pickled), daemon=True).start()
        self._most, self._given, self._taken = count * ahead, 0, 0
        self._per_message = 1
        self._results: deque[Any] = deque()

    def started(self) -> bool:
        """Whether requests are taken. Raises DataError when the workers cannot start."""
        if self._pool.problem is not None:
            raise self._pool.problem
        if self._pool.ready:
            return True
        if time.monotonic() - self._begun > self.timeout_seconds:
            self._stop()
            raise _failure(f"the loader processes did not start within {self.timeout_seconds:.0f} s")
        return False

    def fill(self, requests: Iterator[Any]) -> None:
        """Hand over the next requests, as far as there is room."""
        while self._given - self._taken < self._most:
            group = list(islice(requests, self._per_message))
            if not group:
                return
            self._guarded(self._pool.links[self._given % self._pool.count], _Link.send, group)
            self._given += 1

    @property
    def waiting(self) -> bool:
        """Whether requests were given whose results were not taken."""
        return bool(self._results) or self._given > self._taken

    def take(self) -> Any:
        """The result of the oldest request. Raises DataError when its worker died or is silent for too long."""
        if not self._results:
            link = self._pool.links[self._taken % self._pool.count]
            message, results = self._guarded(link, _Link.receive, self.timeout_seconds)
            self._taken += 1
            self._results.extend(results)
            self._per_message = _next_size(message, self._per_message)
        return self._results.popleft()

    def stop(self) -> None:
        """End the processes at once; they hold no state."""
        self._stop()

    def _guarded(self, link: _Link, call: Any, argument: Any) -> Any:
        try:
            return call(link, argument)
        except TimeoutError as error:
            what = f"loader process {link.process.pid} sent nothing for {self.timeout_seconds:.0f} s"
            problem: OSError | EOFError = error
        except (OSError, EOFError) as error:
            what, problem = f"loader process {link.process.pid} {_how_it_ended(link.process)}", error
        self._stop()
        raise _failure(what) from problem


class _Pool:
    """The processes, apart from their handle, so that a forgotten handle can end them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.links: list[_Link] = []
        self.ready = False
        self.problem: DataError | None = None
        self._ended = False
        self._lock = threading.Lock()

    def start(self, context: ForkServerContext, pickled: bytes) -> None:
        """Start all workers and wait until they take requests."""
        try:
            for _ in range(self.count):
                ours, theirs = multiprocessing.Pipe()
                process = context.Process(target=_work, args=(pickled, theirs), daemon=True)
                process.start()
                theirs.close()
                with self._lock:
                    self.links.append(_Link(process, ours))
                    if self._ended:
                        process.kill()
            for link in self.links:
                if (problem := self._answer(link)) is not None:
                    raise problem
            self.ready = True
        except DataError as problem:
            self.problem = problem
        except Exception as problem:  # whatever pickling or starting a process raises; shown where results are asked
            self.problem = _failure(f"the loader processes cannot start ({type(problem).__name__}: {problem})")
            self.problem.__cause__ = problem

    def _answer(self, link: _Link) -> DataError | None:
        try:
            problem: DataError | None = pickle.loads(link.connection.recv_bytes())
        except (EOFError, OSError):
            return _failure(f"a loader process {_how_it_ended(link.process)} while it started")
        return problem

    def end(self) -> None:
        """Kill the workers: waiting for one that hangs in a read would hang this process too."""
        with self._lock:
            self._ended = True
            for link in self.links:
                link.process.kill()


def _next_size(message: _Message, before: int) -> int:
    """How many results the next messages hold, judged by the last one."""
    count = len(message.sizes)
    size = sum(map(sum, message.sizes))
    share = max(message.seconds / _MESSAGE_SECONDS, size / _MESSAGE_BYTES, count / _MESSAGE_RESULTS)
    return max(1, min(int(count / share), 2 * before))


class _Link:
    """One worker as the receiver sees it."""

    def __init__(self, process: BaseProcess, connection: Any) -> None:
        self.process, self.connection = process, connection
        self._poll = select.poll()  # the connection's own would make one every time
        self._poll.register(connection, select.POLLIN)
        self._slots: dict[int, mmap.mmap] = {}
        self._released: deque[int] = deque()

    def send(self, requests: list[Any]) -> None:
        """Hand over requests, and the slots that are free again."""
        released = [self._released.popleft() for _ in range(len(self._released))]
        self.connection.send_bytes(pickle.dumps((requests, released), protocol=5))

    def receive(self, timeout_seconds: float) -> tuple[_Message, list[Any]]:
        """The next results. Raises TimeoutError, or EOFError or OSError when the worker is gone."""
        if not self._poll.poll(timeout_seconds * 1000):
            raise TimeoutError
        message = _Message(*pickle.loads(self.connection.recv_bytes()))
        for slot in message.dropped:
            del self._slots[slot]
        memory = self._leased(message)
        results, begin = [], 0
        for sizes in message.sizes:
            places, begin = _places(sizes, begin)
            pickled, *buffers = (memory[start : start + size] for start, size in zip(places, sizes, strict=True))
            results.append(pickle.loads(pickled, buffers=buffers))
        return message, results

    def _leased(self, message: _Message) -> memoryview:
        """A slot's memory; the slot counts as released when the last array in it is gone."""
        if message.new_bytes:
            descriptor = recv_handle(self.connection)
            self._slots[message.slot] = mmap.mmap(descriptor, message.new_bytes)
            os.close(descriptor)
        lease = np.frombuffer(self._slots[message.slot], dtype=np.uint8)
        weakref.finalize(lease, self._released.append, message.slot).atexit = False
        return lease.data


class _Slots:
    """Shared memory of a worker, used again when the receiver has released it."""

    def __init__(self) -> None:
        self._memory: dict[int, mmap.mmap] = {}
        self._free: list[int] = []
        self._next = 0

    def release(self, slots: list[int]) -> None:
        self._free += slots

    def take(self, size: int) -> tuple[int, mmap.mmap, int, list[int]]:
        """A slot of at least ``size`` bytes: its number, memory, descriptor (-1 = known), and the slots dropped."""
        fitting = [slot for slot in self._free if len(self._memory[slot]) >= size]
        if fitting:
            slot = min(fitting, key=lambda slot: len(self._memory[slot]))
            self._free.remove(slot)
            return slot, self._memory[slot], -1, []
        dropped, self._free = self._free, []  # too small for what comes now, so for much of what comes later
        for slot in dropped:
            del self._memory[slot]
        size = max(_SMALLEST_SLOT, -(-size * 5 // 4 // mmap.PAGESIZE) * mmap.PAGESIZE)
        slot, self._next = self._next, self._next + 1
        descriptor = os.memfd_create("slt-batch", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        self._memory[slot] = mmap.mmap(descriptor, size)
        return slot, self._memory[slot], descriptor, dropped


def _places(sizes: list[int], begin: int) -> tuple[list[int], int]:
    """Where parts of these sizes begin when the first begins at ``begin``, and where the next one would."""
    places = []
    for size in sizes:
        places.append(begin)
        begin += -(-size // _ALIGN) * _ALIGN
    return places, begin


def _work(pickled: bytes, connection: Connection) -> None:
    """A worker's life: requests in order, until the receiver is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        _serve(pickled, connection)
    except ConnectionError:  # the receiver was killed, and nobody is left who wants to know
        os._exit(0)


def _serve(pickled: bytes, connection: Connection) -> None:
    gc.freeze()  # what was imported stays: collections need not look at it, nor copy its pages
    try:
        work: Work = pickle.loads(pickled)
        work.begin()
    except BaseException as error:
        problem = error if isinstance(error, DataError) else _failure(f"{type(error).__name__}: {error}")
        connection.send_bytes(pickle.dumps(problem))
        sys.exit(1)
    connection.send_bytes(pickle.dumps(None))
    requests: queue.SimpleQueue[tuple[list[Any], list[int]]] = queue.SimpleQueue()
    # A thread takes the requests, so that neither side ever waits for the other to read.
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    slots = _Slots()
    while True:
        group, released = requests.get()
        slots.release(released)
        begin = time.perf_counter()
        results = work.run(group)
        _send(connection, slots, results, time.perf_counter() - begin)


def _receive(connection: Connection, requests: queue.SimpleQueue[tuple[list[Any], list[int]]]) -> None:
    try:
        while True:
            requests.put(pickle.loads(connection.recv_bytes()))
    except (EOFError, OSError):
        os._exit(0)  # the receiver is gone, and the other thread may hang in a read


def _send(connection: Connection, slots: _Slots, results: list[Pickled], seconds: float) -> None:
    parts = [part for pickled, buffers in results for part in (memoryview(pickled), *buffers)]
    places, total = _places([part.nbytes for part in parts], 0)
    slot, memory, descriptor, dropped = slots.take(total)
    for begin, part in zip(places, parts, strict=True):
        memory[begin : begin + part.nbytes] = part
    sizes = [[len(pickled), *(buffer.nbytes for buffer in buffers)] for pickled, buffers in results]
    new_bytes = len(memory) if descriptor >= 0 else 0
    connection.send_bytes(pickle.dumps(tuple(_Message(slot, new_bytes, dropped, sizes, seconds)), protocol=5))
    if descriptor >= 0:
        send_handle(connection, descriptor, os.getppid())
        os.close(descriptor)


def fork_server(preload: Sequence[str] = ()) -> ForkServerContext:
    """The fork server of this process, deaf to the signals meant for the trainer; the first call starts it.

    It imports the modules of that call once for all workers, beside whatever the caller does next. Ignored signals are
    inherited, so they are ignored here while it starts, and blocked so that none is lost meanwhile.
    """
    context = multiprocessing.get_context("forkserver")
    if preload:
        context.set_forkserver_preload(list(preload))
    numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def _how_it_ended(process: BaseProcess) -> str:
    process.join(timeout=5)
    status = process.exitcode
    if status is None:
        return "closed its connection"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _failure(what: str) -> DataError:
    return DataError(
        what,
        where="data loader",
        fix="look for the out-of-memory killer (`dmesg`) and for hung file systems; lower data.workers",
    )
