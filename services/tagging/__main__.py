"""`python -m services.tagging` serves; `python -m services.tagging worker` works."""

import sys

from shared.stopping import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm()  # before the imports below, which take their time

    from services.tagging.config import Settings
    from services.tagging.server import start_server
    from services.tagging.worker import work
    from shared.config import load
    from shared.rpc.server import run, run_process

    if "worker" in sys.argv[1:]:
        settings = load(Settings, sys.argv[1:])
        run_process("tagging-worker", settings, work(settings))
    else:
        run(Settings, start_server)
