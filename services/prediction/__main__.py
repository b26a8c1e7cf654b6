"""`python -m services.prediction` serves."""

from services.prediction.config import Settings
from services.prediction.server import start_server
from shared.rpc.server import run

if __name__ == "__main__":
    run(Settings, start_server)
