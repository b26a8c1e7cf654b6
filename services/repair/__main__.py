"""`python -m services.repair` serves."""

from services.repair.config import Settings
from services.repair.server import start_server
from shared.rpc.server import run

if __name__ == "__main__":
    run(Settings, start_server)
