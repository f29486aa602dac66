"""How a run ends early: signals that ask for a checkpoint, and errors that say what to do."""

import os
import signal
import socket
import sys
import threading

import torch
import torch.distributed as dist

from gpt2repro.options import InputError, sentence_for

SECONDS_BETWEEN_LOOKS = 0.5  # at the signals, while there is no data


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 (Slurm's warning) ask for a checkpoint; a second SIGINT leaves at once.

    A signal may reach any rank; all ranks stop after the same step. The answer of one step travels while the next step
    computes, so no step waits for it. A context manager: at its end the process has its old handlers again.

    Python calls a handler between two of its own instructions, so not inside a backward pass or a compilation, which
    can take minutes. A signal's number is therefore also written to a socket, where a thread reads it at once.
    """

    def __init__(self, world: int):
        self._received: int | None = None
        self._group = dist.new_group(backend="gloo") if world > 1 else None
        self._is_first = self._group is None or dist.get_rank() == 0
        self._answer, self._work = torch.zeros(1), None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(ear,), name="signals", daemon=True).start()
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has neither SIGHUP nor SIGUSR1
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._mouth.close()  # ends the thread
        if self.received and "CompileError" in str(error):  # Ctrl-C reaches torch.compile's C++ compiler as well
            raise InputError(
                f"stopped by {self.name} while torch.compile was at work; the same command goes on from the last "
                "checkpoint"
            ) from None

    def _receive(self, number: int, frame) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one is the system's

    def _listen(self, ear: socket.socket) -> None:
        interrupts = 0
        while heard := ear.recv(1):
            interrupts += heard[0] == signal.SIGINT
            if interrupts == 2:  # the main thread has not come to `_receive` yet
                os._exit(130)
            if heard[0] == signal.SIGINT and self._is_first:  # Ctrl-C reaches every process of a terminal
                print("\nstopping after this step; Ctrl-C again quits now", file=sys.stderr, flush=True)

    @property
    def received(self) -> bool:
        """Whether a signal has reached this process."""
        return self._received is not None

    @property
    def name(self) -> str:
        return signal.Signals(self._received).name if self.received else "a signal to another process"

    def next_of(self, batches) -> tuple | None:
        """The next item of a Prefetch; None where a signal comes while there is none.

        Raises: InputError instead of None on several processes: the others are inside the step, so none can save.
        """
        while not batches.ready(SECONDS_BETWEEN_LOOKS):
            if self.received and self._group is None:
                return None
            if self.received:
                raise InputError(
                    f"stopped by {self.name} while the data kept this process waiting; the same command goes on from "
                    "the last checkpoint"
                )
        return next(batches)

    def agreed(self) -> bool:
        """Whether to stop before the next step. Every rank must call it equally often."""
        if self._group is None:
            return self.received
        if self._work is not None:
            self._work.wait()
        stop = bool(self._answer.item())
        self._answer = torch.tensor([float(self.received)])
        self._work = dist.all_reduce(self._answer, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop


def said_to_the_user(error: BaseException) -> InputError | None:
    """The sentence for an error that is the machine's and not ours, a full disk or memory that ran out; else None."""
    sentence = sentence_for(error)
    if isinstance(error, InputError) or sentence is None:
        return sentence
    if isinstance(error, OSError):
        return InputError(
            f"the run stopped: {sentence}. Checkpoints are whole once they are saved: it goes on from the last one"
        )
    return InputError(
        "the memory ran out; halve --micro_batch_size (the result stays the same), or add --gradient_checkpointing"
    )


def lost_a_process(error: BaseException) -> bool:
    """Whether a collective failed because another process has ended: gloo's RuntimeError, or NCCL's DistError."""
    by_gloo = isinstance(error, RuntimeError) and ("gloo" in str(error) or "by peer" in str(error))
    return by_gloo or isinstance(error, dist.DistError)
