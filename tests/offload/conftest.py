"""The tiny model whose layers are streamed, and what a plain read of them gives."""

import pytest
import torch

from penstock.engine.model.build import load_model
from penstock.offload.source import read_unit


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(tiny_llama, dtype="auto", device="cpu")


@pytest.fixture(scope="module")
def expected(model):
    """Each layer's bytes, read plainly, with the gaps between parameters blanked."""
    result = []
    for layout in model.layer_layouts:
        buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
        read_unit(layout, buffer)
        result.append([buffer[view.offset : view.offset + view.nbytes] for view in layout.parameters])
    return result
