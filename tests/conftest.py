"""What tests share: the device they run on, and tiny checkpoints made on the spot."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("penstock", deadline=None)  # how long an example takes says nothing of its result
hypothesis.settings.load_profile("penstock")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device that models run on: cpu or cuda")


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_user(tmp_path_factory):
    """What was measured on this machine, or kept by it, changes no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def kernel_directory(tmp_path_factory, worker_id):
    """Where compiled kernels are kept, the same for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "kernels"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A random float32 Llama of 6 layers of 120 KiB in 6 shards, without a tokenizer; context 256, vocabulary 257."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        vocab_size=257,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path, max_shard_size="150KB")
    return path
