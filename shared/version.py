"""The version of the platform that is written into what it makes."""

from importlib.metadata import PackageNotFoundError, version


def _read() -> str:
    try:
        return version("hibug2-platform")
    except PackageNotFoundError:
        return "unreleased"


VERSION = _read()
