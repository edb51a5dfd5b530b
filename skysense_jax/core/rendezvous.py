"""The processes of a job count themselves before jax's distributed runtime starts.

That runtime aborts a process (SIGABRT) when another one is missing, and says neither how many processes came nor which.
In this module process 0 listens on the coordinator's port until every process has sent its index, tells each of them
the result, and leaves the port to jax. Plain sockets, one line in each direction; no jax.
"""

from __future__ import annotations

import contextlib
import socket
import time

_HELLO = "skysense_jax"  # a line that begins otherwise is a stranger's: a health check, a scanner
_ALL_HERE = "all here"
_RETRY_S, _HELLO_S = 0.1, 5.0


def meet(coordinator: str, processes: int, process_index: int, timeout_s: float) -> None:
    """Returns once all processes of the job have come.

    Args:
        coordinator: "host:port" of process 0; nothing listens on that port yet.
        processes: how many processes the job has.
        process_index: index of this process, 0 to processes - 1.
        timeout_s: seconds to wait for all of them.

    Raises:
        ValueError: the coordinator or the index cannot be used. On every process that came, with the number that came
            and the number expected: after `timeout_s` (a process that came late waits at most twice as long), or at
            once where two processes have the same index or expect different numbers.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"SKYSENSE_COORDINATOR={coordinator!r}: host:port of process 0 is needed")
    if not 0 <= process_index < processes:
        raise ValueError(f"SKYSENSE_PROCESS_INDEX={process_index} is not in 0..{processes - 1} (SKYSENSE_PROCESSES)")
    if process_index == 0:
        _gather(int(port), processes, timeout_s)
    else:
        _report(host.strip("[]"), int(port), processes, process_index, timeout_s)


def _gather(port: int, processes: int, timeout_s: float) -> None:
    """Process 0: waits for the others, answers them."""
    deadline, present, problem = time.monotonic() + timeout_s, {0}, ""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(port))
        callers: list[socket.socket] = []
        while len(present) < processes and not problem and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                caller = stack.enter_context(listener.accept()[0])
                caller.settimeout(min(_HELLO_S, max(left, _RETRY_S)))
                words = _line(caller).split()
            except OSError:  # nobody came in time, or a caller says nothing
                continue
            if len(words) != 3 or words[0] != _HELLO:
                continue
            callers.append(caller)
            index, expected = int(words[1]), int(words[2])
            if expected != processes:
                problem = (
                    f"process {index} expects {expected} processes, process 0 expects {processes} (SKYSENSE_PROCESSES)"
                )
            elif index in present:
                problem = f"two processes have the index {index} (SKYSENSE_PROCESS_INDEX); {processes} are expected"
            present.add(index)
        if len(present) < processes and not problem:
            missing = sorted(set(range(processes)) - present)
            names = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            problem = (
                f"{len(present)} of {processes} processes came together within {timeout_s:g} s; missing: {names} "
                "(SKYSENSE_PROCESSES, SKYSENSE_START_TIMEOUT_S)"
            )
        for caller in callers:
            with contextlib.suppress(OSError):  # a process that has died meanwhile needs no answer
                caller.sendall(f"{problem or _ALL_HERE}\n".encode())
                caller.recv(1)  # the caller hangs up first, so that the port is free at once
    if problem:
        raise ValueError(problem)


def _report(host: str, port: int, processes: int, process_index: int, timeout_s: float) -> None:
    """The other processes: tell process 0, wait for its answer."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            caller = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), _RETRY_S))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"process 0 did not answer at {host}:{port} within {timeout_s:g} s ({error}): of "
                    f"{processes} processes 1 is known to be here, process {process_index}"
                ) from error
            time.sleep(_RETRY_S)
    with caller:
        caller.settimeout(timeout_s + 2 * _HELLO_S)
        try:
            caller.sendall(f"{_HELLO} {process_index} {processes}\n".encode())
            answer = _line(caller)
        except OSError as error:
            answer = str(error)
    if answer != _ALL_HERE:
        raise ValueError(answer or f"process 0 at {host}:{port} went away; {processes} processes are expected")


def _listen(port: int) -> socket.socket:
    """A listener on all addresses of this host."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise ValueError(f"SKYSENSE_COORDINATOR: port {port} of this host cannot be used: {error}") from error


def _line(caller: socket.socket) -> str:
    """What the other side says up to the end of the line, or until it hangs up."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 4096 and (more := caller.recv(4096)):
        text += more
    return text.decode("utf-8", "replace").strip()
