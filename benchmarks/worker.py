"""A contender's process: ``python -m benchmarks.worker in_numpyro`` answers the tasks that come on its stdin."""

from __future__ import annotations

import importlib
import sys

from benchmarks.channel import inside_worker


def main() -> None:
    channel = inside_worker()
    commands = importlib.import_module(f"benchmarks.contenders.{sys.argv[1]}").COMMANDS
    while True:
        try:
            task = channel.receive()
        except EOFError:
            return
        commands[task.pop("do")](channel, **task)


if __name__ == "__main__":
    main()
