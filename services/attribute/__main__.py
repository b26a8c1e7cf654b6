"""`python -m services.attribute` serves."""

from shared.stopping import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm()  # before the imports below, which take their time

    from services.attribute.config import Settings
    from services.attribute.server import start_server
    from shared.rpc.server import run

    run(Settings, start_server)
