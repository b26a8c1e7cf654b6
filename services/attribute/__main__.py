"""`python -m services.attribute` serves."""

from services.attribute.config import Settings
from services.attribute.server import start_server
from shared.rpc.server import run

if __name__ == "__main__":
    run(Settings, start_server)
