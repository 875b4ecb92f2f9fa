"""A whole run in a process without network: the verbs of argv's JSON file, one after another.

Run as `python closed_room.py ROOM`; what the sockets were asked for, and each verb's exit code, go
to `ROOM/record.json`. The first `train` is stopped by a signal after its second step.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

ASKED: list[str] = []


def refuse(name: str):
    """What stands in a socket function's place: it notes who was asked for, and fails."""
    whole = getattr(socket.socket, name, None) or getattr(socket, name)

    def refused(*args, **kwargs):
        if args and getattr(args[0], "family", None) == socket.AF_UNIX:
            return whole(*args, **kwargs)
        ASKED.append(f"{name} {args[-2:]}")
        raise OSError(f"{name}: there is no network in this room")

    return refused


def close_sockets() -> None:
    for name in ("connect", "connect_ex", "sendto", "bind", "listen"):
        setattr(socket.socket, name, refuse(name))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo"):
        setattr(socket, name, refuse(name))


def stop_after_step(number: int) -> None:
    """A SIGTERM at the end of a step; a run that goes on is past it."""
    from transformers import TrainerCallback

    from finetune.recipes import RECIPES

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == number:
                signal.raise_signal(signal.SIGTERM)

    def with_stop(parts, build=RECIPES["sft"]):
        trainer = build(parts)
        trainer.add_callback(Stop())
        return trainer

    RECIPES["sft"] = with_stop


def main() -> None:
    room = Path(sys.argv[1])
    os.umask(0)
    close_sockets()
    from finetune.__main__ import main as verb

    stop_after_step(2)
    codes = [verb(argv) for argv in json.loads((room / "verbs.json").read_text())]
    (room / "record.json").write_text(json.dumps({"asked": ASKED, "codes": codes}))


if __name__ == "__main__":
    main()
