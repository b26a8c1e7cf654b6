"""`python -m services.enumeration` serves."""

from shared.stopping import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm()  # before the imports below, which take their time

    from services.enumeration.config import Settings
    from services.enumeration.server import start_server
    from shared.rpc.server import run

    run(Settings, start_server)
