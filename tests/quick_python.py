"""A `python` that has torch loaded already, for programs that start programs: a script in a shell, a worker of the lab. A start
takes a fifth of a second instead of six.

As a script this is its front: it hands its command line, folder, environment and open files to a server (`serve`), which forks
what runs there, and lives as long as that does: signals are passed on, the status comes back, and a front that is killed takes
its program with it, before the server starts another. What the front does not know (options like -X) real Python gets.

What is read when Python, torch or OpenMP is loaded (PYTHONUTF8, OMP_NUM_THREADS) has no effect, nor have limits (ulimit).
"""

import marshal
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def front(address, words):
    start = 1 if words[:1] == ["-u"] else 0
    if not (words[start:start + 1] in (["-m"], ["-c"]) or words[start:] and words[start].endswith(".py")):
        os.execv(sys.executable, [sys.executable, *words])
    files = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:  # the listing's own
            continue
        files.append(int(name))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(address)
        ignored = [int(signum) for signum in PASSED_ON if signal.getsignal(signum) == signal.SIG_IGN]
        for signum in set(PASSED_ON) - set(ignored):
            signal.signal(signum, lambda signum, _: server.sendall(bytes([signum])))
        settings = {b"PYTHONUNBUFFERED": b"1"} if start else {}
        sent = marshal.dumps((files, ignored, os.getcwdb(), [*map(os.fsencode, words[start:])], dict(os.environb) | settings))
        socket.send_fds(server, [len(sent).to_bytes(8, "big")], files)
        server.sendall(sent)
        status = int.from_bytes(server.recv(4) or b"\0\0\0\1", "big", signed=True)
    if status in [-signum for signum in PASSED_ON]:
        signal.signal(-status, signal.SIG_DFL)
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(listener, python):
    """Run what fronts send, until the process of the tests is gone. python: the path of the front."""
    import selectors
    running = selectors.DefaultSelector()
    running.register(listener, selectors.EVENT_READ)
    parent = os.getppid()

    def end(key):
        """Take leave of a program that has ended or whose front is gone."""
        connection, pid, pidfd = key.data
        os.kill(pid, signal.SIGKILL)  # not yet waited for, so this is still its number
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for file in (connection, pidfd):
            running.unregister(file)
        os.close(pidfd)
        try:
            connection.sendall(status.to_bytes(4, "big", signed=True))
        except OSError:
            pass
        connection.close()

    while os.getppid() == parent:
        ready = [key for key, _ in running.select(timeout=5)]
        ended = set()
        for key in ready:  # what is gone first: a program that is started next may need its place
            if key.data is None or key.data in ended:
                continue
            said = b"" if key.fileobj == key.data[2] else received(key.data[0])
            if said:
                os.kill(key.data[1], said[0])
            else:
                end(key)
                ended.add(key.data)
        if any(key.data is None for key in ready):
            connection, _ = listener.accept()
            size, files, _, _ = socket.recv_fds(connection, 8, 250)
            words = b""
            while len(words) < int.from_bytes(size, "big") and (more := connection.recv(1 << 20)):
                words += more
            pid = os.fork()
            if not pid:
                become(python, files, marshal.loads(words))
            for file in files:
                os.close(file)
            data = (connection, pid, os.pidfd_open(pid))
            running.register(connection, selectors.EVENT_READ, data)
            running.register(data[2], selectors.EVENT_READ, data)


def received(connection):
    try:
        return connection.recv(1)
    except OSError:
        return b""


def become(python, files, sent):
    """Be the program that a front was asked for, in this process, to its end."""
    import atexit
    import io
    import runpy
    import threading
    import traceback
    import types
    numbers, ignored, folder, words, environment = sent
    status = 1
    try:
        os.setsid()
        held = [os.dup2(file, 300 + place) for place, file in enumerate(files)]
        os.closerange(0, 300)  # the server's too
        for number, file in zip(numbers, held, strict=True):
            os.dup2(file, number)
            os.close(file)
        for signum in PASSED_ON:
            signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)
        if signal.SIGINT not in ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        os.environ.clear()
        os.environb.update(environment)
        encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
        at_once = bool(os.environ.get("PYTHONUNBUFFERED"))
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            stream = None
            if number in numbers:
                raw = open(number, "wb" if number else "rb", 0 if number and at_once else -1, closefd=False)
                stream = io.TextIOWrapper(raw, encoding or "utf-8", "backslashreplace" if number == 2 else errors or "strict",
                                          line_buffering=number == 2 or raw.isatty(), write_through=bool(number) and at_once)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        kind, *words = [os.fsdecode(word) for word in words]
        sys.executable, sys.argv = python, ["-c", *words[1:]] if kind == "-c" else words if kind == "-m" else [kind, *words]
        place = os.getcwd() if kind in ("-m", "-c") else os.path.dirname(os.path.abspath(kind))
        sys.path[:0] = [place, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        try:
            if kind == "-m":
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            elif kind == "-c":
                sys.modules["__main__"] = types.ModuleType("__main__")
                exec(words[0], sys.modules["__main__"].__dict__)
            else:
                runpy.run_path(kind, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if status and status != end.code:
                print(end.code, file=sys.stderr)
        except BaseException as error:
            traceback.print_exc()
            if isinstance(error, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except BaseException:
        traceback.print_exc()
        status = 120
    finally:
        os._exit(status & 255)


if __name__ == "__main__":
    front(sys.argv[1], sys.argv[2:])
