"""What tests of more than one area stand on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of random weights for `tiny-clip`, which open_clip knows from then on; needs open_clip."""
    import torch

    libraries = []
    if not hasattr(torch.ops.torchvision, "nms"):
        # A torchvision built for another torch lacks these two, which are never called here.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        libraries.append(library)  # the operators live as long as it does
    import open_clip

    folder: Path = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    weights = folder / "tiny.pt"
    torch.save(open_clip.create_model("tiny-clip").state_dict(), weights)
    yield str(weights)
    del libraries
