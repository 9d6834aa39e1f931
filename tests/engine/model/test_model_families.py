"""Every family: layers streamed through one slot give transformers' own logits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, REFERENCE_ATTENTION, REFUSED, TOLERANCE
from tiny_models import Stream, errors, make_config, model_type, reference, save_checkpoint, worst_error
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from penstock.engine.model.build import load_model
from penstock.errors import ModelError
from penstock.offload.kv import KVStore

INT8_ERROR = dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoe_swa", "hy_v3", "phimoe"), 0.2)
"""Of a typical token, as a share of the logits' spread. Random weights often find two experts nearly as good, so small
differences send single tokens elsewhere."""

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # some of transformers' code


def skip_unknown(kind: str) -> None:
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"the installed transformers does not know {kind}")


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_layers_give_the_logits_of_transformers(name: str, tmp_path: Path, device: str) -> None:
    skip_unknown(model_type(name))
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    wanted = reference(tmp_path, attention=REFERENCE_ATTENTION.get(name, "eager"), device=device)
    stream = Stream.open(tmp_path, device=device)
    assert worst_error(stream, wanted) <= TOLERANCE.get(name, 1e-4)
    stream.kv = KVStore(device=device, kv_dtype="int8")
    typical, spread = errors(stream, wanted).median().item(), torch.cat(wanted).std().item()
    assert typical <= INT8_ERROR.get(name, 0.08) * spread, "keys and values in int8 leave the logits what they were"
    assert max(logits.abs().max().item() for logits in wanted) > 1, "logits of no size prove nothing"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_streamed_is_refused_by_name(name: str, tmp_path: Path) -> None:
    settings, message = REFUSED[name]
    skip_unknown(name)
    config = make_config(settings, name)
    config.save_pretrained(tmp_path)
    if "interface" in message or "later" in message:
        save_checkpoint(config, tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_the_documented_families_are_the_tested_ones() -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "families.md").read_text()
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted([*FAMILIES, *REFUSED]), "run scripts/families"
    listed = (root / "README.md").read_text().split("scripts/families: begin")[1]
    assert all(re.search(rf"[ |]{name}[ ,.]", listed) for name in [*FAMILIES, *REFUSED]), "run scripts/families"
