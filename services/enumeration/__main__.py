"""`python -m services.enumeration` serves."""

from services.enumeration.config import Settings
from services.enumeration.server import start_server
from shared.rpc.server import run

if __name__ == "__main__":
    run(Settings, start_server)
