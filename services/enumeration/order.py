"""What a Kubernetes Job is told to enumerate: the arguments of its process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True)
class Order:
    """An enumeration: its name, and what it is made from. All of it is in the name's hash, so equal names are equal."""

    team: str
    name: str
    tagging: str
    split: str
    min_count: int
    max_depth: int

    def arguments(self) -> list[str]:
        """What the process is called with."""
        return [f"--{field.replace('_', '-')}={value}" for field, value in asdict(self).items()]

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Self:
        """The order of these arguments; ends the process with 2 when they make none."""
        parser = argparse.ArgumentParser(prog="python -m services.enumeration.run_job")
        for field in ("team", "name", "tagging", "split"):
            parser.add_argument(f"--{field}", required=True)
        for field in ("min-count", "max-depth"):
            parser.add_argument(f"--{field}", required=True, type=int)
        return cls(**vars(parser.parse_args(arguments)))
