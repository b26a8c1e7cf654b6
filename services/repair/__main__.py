"""`python -m services.repair` serves."""

from shared.stopping import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm()  # before the imports below, which take their time

    from services.repair.config import Settings
    from services.repair.server import start_server
    from shared.rpc.server import run

    run(Settings, start_server)
