"""Standard streams that never end a program: any encoding, closed pipes, full disks, file names in any bytes. No torch.

What a terminal or a file cannot hold is replaced. When the reader of a pipe goes away, or a log cannot be written any more, a
program that works for its files (training, preparing text) goes on in silence; one that works for its output stops.
"""

import io
import os
import sys
from contextlib import suppress


class TolerantStream(io.TextIOWrapper):
    """Standard output or standard error. `go_on`: whether a closed pipe silences it, instead of raising BrokenPipeError."""

    go_on = True

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as e:
            self._fall_silent(e)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as e:
            self._fall_silent(e)

    def _fall_silent(self, why: OSError) -> None:
        """From now on what is written goes nowhere; said once on the error output, where that still works."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        with suppress(OSError):
            super().flush()  # what the buffer still holds, or it would be tried again at the end
        if isinstance(why, BrokenPipeError) and not self.go_on:
            raise why
        if self is sys.stdout:
            with suppress(OSError):
                print(f"the output cannot be written any more ({why}): going on in silence", file=sys.stderr, flush=True)


def stop_when_unread() -> None:
    """For what a program prints instead of its work: it ends when the reader of the pipe goes away (`| head`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TolerantStream):
            stream.go_on = False


def tolerant_streams(go_on: bool = True) -> None:
    """Make the three standard streams of this process tolerant. Those that are closed (`>&-`) become the null device."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened would be taken for this stream
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")
        if isinstance(stream, TolerantStream):
            stream.go_on = go_on
        elif type(stream) is io.TextIOWrapper:  # not what an embedding program put in its place
            with suppress(OSError):
                stream.flush()
            binary = io.BufferedWriter(io.FileIO(stream.fileno(), "wb", closefd=False))
            by_line = stream.line_buffering or stream.write_through  # the latter under PYTHONUNBUFFERED
            stream = TolerantStream(binary, encoding=stream.encoding, errors="replace", line_buffering=by_line)
            stream.go_on = go_on
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
