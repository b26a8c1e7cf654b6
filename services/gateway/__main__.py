"""`python -m services.gateway` serves."""

from services.gateway.config import Settings
from services.gateway.server import start_server
from shared.rpc.server import run

if __name__ == "__main__":
    run(Settings, start_server)
