"""`python -m deploy.local up [--containers] | down | serve`: the local stack, in the background or not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deploy.local import containers
from deploy.local.stack import Stack
from shared import logs
from shared.config import ImageSettings
from shared.rpc.probe import healthy
from shared.rpc.server import stop_signal

FOLDER = Path(".stack")
ADDRESS, HTTP_PORT = "127.0.0.1:50051", 8080
_UP_S, _DOWN_S = 60.0, 30.0


async def serve() -> None:
    """Run the stack until SIGTERM or SIGINT."""
    # One person's machine: their own folders may be read unless they say otherwise.
    prefixes = ImageSettings().image_prefixes or (Path.cwd().as_uri(), Path.home().as_uri())
    logs.configure("info")
    stopped = stop_signal()
    async with Stack(FOLDER, prefixes, listen=ADDRESS, http_port=HTTP_PORT) as stack:
        state = {"pid": os.getpid(), "address": stack.address, "image_prefixes": prefixes}
        (FOLDER / "state.json").write_text(json.dumps(state))
        await stopped.wait()
    (FOLDER / "state.json").unlink(missing_ok=True)


def up() -> int:
    """Start the stack in the background and return when it is healthy."""
    if healthy(ADDRESS, 0.5):
        print(f"the stack is up already: gRPC {ADDRESS}, pages http://127.0.0.1:{HTTP_PORT}/")
        return 0
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "state.json").unlink(missing_ok=True)
    log = FOLDER / "log.jsonl"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local", "serve"],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    end = time.monotonic() + _UP_S
    while not (FOLDER / "state.json").exists() or not healthy(ADDRESS, 0.5):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            print(f"the stack did not come up; the last lines of {log}:", file=sys.stderr)
            print("\n".join(log.read_text().splitlines()[-15:]), file=sys.stderr)
            return 1
        time.sleep(0.1)
    prefixes = json.loads((FOLDER / "state.json").read_text())["image_prefixes"]
    print(f"up: gRPC {ADDRESS}, pages http://127.0.0.1:{HTTP_PORT}/, artifacts and log in {FOLDER}/")
    print(f"images may be read below {', '.join(prefixes)} (HIBUG2_IMAGE_PREFIXES)")
    return 0


def down() -> int:
    """Stop the stack and wait until it is gone."""
    try:
        pid = int(json.loads((FOLDER / "state.json").read_text())["pid"])
        os.kill(pid, signal.SIGTERM)
    except (FileNotFoundError, ProcessLookupError):
        print("no stack is up here")
        return 0
    end = time.monotonic() + _DOWN_S
    while (FOLDER / "state.json").exists():
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            (FOLDER / "state.json").unlink(missing_ok=True)
            print(f"process {pid} did not stop in {_DOWN_S:.0f} s and was killed")
            return 1
        time.sleep(0.1)
    print("down")
    return 0


def main(arguments: list[str]) -> int:
    if arguments == ["serve"]:
        asyncio.run(serve())
        return 0
    if arguments == ["up"]:
        return up()
    if arguments == ["up", "--containers"]:
        engine = containers.compose()
        if engine is not None:
            return containers.up(engine)
        print("no engine that runs compose files is here (docker or podman): the stack starts embedded instead")
        return up()
    if arguments == ["down"]:
        engine = containers.compose()
        if engine is not None and containers.are_up(engine):
            return containers.down(engine)
        return down()
    print("usage: python -m deploy.local up [--containers] | down | serve", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
