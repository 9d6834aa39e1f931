"""Every bad input ends with a named error that says which file, what was wanted and what was got; nothing is left."""

import json
import os
import shutil
import struct
import threading

import pytest

from penstock.cli.main import main


def shard(path, number=2):
    return path / f"model-0000{number}-of-00006.safetensors"


def write_header(path, header: bytes, data: bytes = b"", length=None):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def header_of(path):
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def edit_header(path, change):
    header, data = header_of(path)
    change(header, next(name for name in header if name != "__metadata__"))
    write_header(path, json.dumps(header).encode(), data)


def edit_config(path, **fields):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_index(path, change):
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def missing_shard(path):
    shard(path).unlink()


def truncated_shard(path):
    with shard(path).open("r+b") as file:
        file.truncate(shard(path).stat().st_size - 1000)


def header_too_large(path):
    write_header(shard(path), b"{}", length=1 << 40)


def header_not_utf8(path):
    write_header(shard(path), b'{"\xff\xfe": 1}')


def header_overlapping(path):
    def change(header, first):
        others = [name for name in header if name not in ("__metadata__", first)]
        header[others[0]] = dict(header[first])

    edit_header(shard(path), change)


def header_beyond_the_end(path):
    write_header(shard(path), b"{}", length=5000)


def wrong_shape(path):
    def change(header, first):
        header[first]["shape"][0] += 1

    edit_header(shard(path), change)


def outside(path):
    def change(weights):
        weights[next(iter(weights))] = "../elsewhere.safetensors"

    edit_index(path, change)


def bin_only(path):
    for file in path.glob("model*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"pickle")


def remote_code(path):
    edit_config(path, model_type="their_own", auto_map={"AutoModelForCausalLM": "modeling.TheirModel"})


def unknown_architecture(path):
    edit_config(path, model_type="no_such_model")


def no_causal_lm(path):
    edit_config(path, model_type="t5", architectures=["T5ForConditionalGeneration"])


def no_config(path):
    (path / "config.json").unlink()


def quantised(path):
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4})


def missing_weight(path):
    def change(header, first):
        header["other.weight"] = header.pop(first)

    edit_header(shard(path, 3), change)
    edit_index(
        path, lambda weights: [weights.pop(name) for name in list(weights) if weights[name] == shard(path, 3).name]
    )


SHARD = "model-00002-of-00006.safetensors"
CHECKPOINTS = [
    (missing_shard, "MissingFileError", SHARD),
    (truncated_shard, "TruncatedFileError", SHARD),
    (header_too_large, "HeaderError", SHARD),
    (header_not_utf8, "HeaderError", SHARD),
    (header_overlapping, "HeaderError", SHARD),
    (header_beyond_the_end, "TruncatedFileError", SHARD),
    (wrong_shape, "HeaderError", SHARD),
    (outside, "IndexFileError", "../elsewhere.safetensors"),
    (bin_only, "UnsupportedFormatError", "pytorch_model.bin"),
    (remote_code, "RemoteCodeError", "config.json"),
    (unknown_architecture, "UnknownArchitectureError", "no_such_model"),
    (no_causal_lm, "UnknownArchitectureError", "t5"),
    (no_config, "MissingFileError", "config.json"),
    (quantised, "UnsupportedFormatError", "gptq"),
    (missing_weight, "MissingWeightError", "weight"),
]


@pytest.fixture
def nothing_left(tmp_path):
    """Compare files, descriptors and threads before and after."""

    def state():
        files = sorted(str(path) for path in tmp_path.rglob("*"))
        threads = sorted(t.name for t in threading.enumerate() if t.name.startswith("penstock"))
        return files, threads, len(os.listdir("/proc/self/fd"))

    class Check:
        def start(self):
            self.before = state()

        def finish(self):
            assert state() == self.before

    return Check()


def run(capsys, *arguments):
    status = main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(("fault", "error", "named"), CHECKPOINTS, ids=[fault.__name__ for fault, _, _ in CHECKPOINTS])
def test_bad_checkpoints(tiny_llama, tmp_path, capsys, nothing_left, fault, error, named):
    path = tmp_path / "model"
    shutil.copytree(tiny_llama, path)
    fault(path)
    nothing_left.start()
    prompts = tmp_path.parent / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6]}\n')
    status, out, err = run(
        capsys, path, "--prompts", prompts, "--device", "cpu", "--device-memory", "1MiB", "--host-memory", "0",
        "--output", tmp_path / "out.jsonl",
    )  # fmt: skip
    assert status == 1
    assert out == ""
    assert error in err.split(":")[1]
    assert named in err
    assert str(path) in err
    nothing_left.finish()


PROMPTS = [
    ("", "PromptFileError", "no prompts in this file"),
    ("\n \n", "PromptFileError", "no prompts in this file"),
    ('{"prompt": "a"}\n{"prompt": \n', "PromptFileError", "line 2 is not JSON"),
    ('{"prompt": "a"}\n\n[1]\n', "PromptFileError", "line 3: wanted a JSON object, got list"),
    (
        '{"text": "a"}\n',
        "PromptFileError",
        'line 1: wanted one of "prompt", "prompt_token_ids" and "messages", got text',
    ),
    ('{"prompt": 5}\n', "PromptFileError", 'line 1: "prompt": wanted text, got 5'),
    ('{"prompt_token_ids": [1, "x"]}\n', "PromptFileError", "a list of integers"),
    ('{"messages": [{"role": "user"}]}\n', "PromptFileError", '"content"'),
    ('{"prompt": "a", "best_of": 3}\n', "PromptFileError", "prompts.jsonl:1"),
    ('{"prompt": "a", "max_tokens": 0}\n', "PromptFileError", "max_tokens is out of range"),
]


@pytest.mark.parametrize(("text", "error", "message"), PROMPTS)
def test_bad_prompt_files(tmp_path, capsys, nothing_left, text, error, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(text)
    nothing_left.start()
    status, out, err = run(capsys, "--prompts", prompts, "--output", tmp_path / "out.jsonl")
    assert (status, out) == (1, "")
    assert error in err
    assert message in err
    assert str(prompts) in err
    nothing_left.finish()


def test_prompts_that_are_not_there_or_not_text(tmp_path, capsys):
    status, _, err = run(capsys, "--prompts", tmp_path / "none.txt")
    assert status == 1
    assert "PromptFileError" in err
    assert "No such file" in err
    (tmp_path / "bytes.txt").write_bytes(b"fine\n\xff\n")
    status, _, err = run(capsys, "--prompts", tmp_path / "bytes.txt")
    assert status == 1
    assert "wanted UTF-8, got byte 0xff at 5" in err


@pytest.mark.parametrize("where", ["missing/out.jsonl", ".", "file/out.jsonl"])
def test_unwritable_output_is_refused_before_the_model_is_loaded(tmp_path, capsys, nothing_left, where):
    (tmp_path / "file").write_text("")
    nothing_left.start()
    status, _, err = run(capsys, tmp_path / "no model", "--prompt", "x", "--output", tmp_path / where)
    assert status == 1
    assert "OutputError" in err
    assert str(tmp_path) in err
    nothing_left.finish()


def test_a_disk_that_is_full_is_named_and_leaves_nothing(tmp_path, capsys):
    from penstock.cli.output import ResultFile
    from penstock.errors import OutputError

    with open("/dev/full", "w", buffering=1) as full, pytest.raises(OutputError, match="No space left"):
        try:
            ResultFile(full, "out.jsonl").write({"prompt": "", "text": "x"})
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_a_budget_that_is_too_small(tmp_path, capsys):
    status, out, err = run(capsys, "--device", "cpu", "--device-memory", "1MB", "--host-memory", "0")
    assert (status, out) == (1, "")
    assert "BudgetError" in err
    assert "at least" in err


def test_a_prompt_that_is_too_long(tmp_path, capsys, nothing_left):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x = 1\n" + "import os, sys; " * 2000 + "\n")
    nothing_left.start()
    status, _, err = run(
        capsys, "--prompts", prompts, "--device", "cpu", "--device-memory", "64MiB", "--host-memory", "0",
        "--output", tmp_path / "out.jsonl",
    )  # fmt: skip
    assert status == 1
    assert "PromptTooLongError" in err
    assert "prompt 1 is longer than the model's context: wanted fewer than 1024 tokens" in err
    nothing_left.finish()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--device-memory", "lots"], "SizeError"),
        (["--device", "tpu"], "DeviceError"),
        (["--device", "cuda:77"], "DeviceError"),
        (["--dtype", "float8"], "ConfigError"),
        (["--kv-dtype", "int3"], "ConfigError: not a dtype of keys and values"),
        (["--temperature", "-1"], "ConfigError"),
        (["--micro-batch-tokens", "0"], "ConfigError"),
        (["--verify", "--temperature", "1"], "ConfigError"),
        (["--nvme", "0", "--host-memory", "0", "--device-memory", "4MiB", "--device", "cpu"], "BudgetError"),
    ],
)
def test_bad_options(capsys, arguments, error):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"penstock: {error}: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "stop": 5}', "stop is out of range"),
        ('{"prompt": "a", "self": 1}', "sampling fields that Penstock does not have"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"prompt": "\\ud800"}', "prompt 0 is not text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no chat template"),
    ],
)
def test_lines_that_are_hard_to_read(tmp_path, capsys, line, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line + "\n")
    status, out, err = run(capsys, "--prompts", prompts, "--device", "cpu", "--device-memory", "64MiB")
    assert (status, out) == (1, "")
    assert message in err


def test_a_disk_that_fails_is_not_taken_for_the_output(tiny_llama, tmp_path, capsys, monkeypatch):
    from penstock.engine.llm import LLM
    from penstock.errors import ReadError

    def fail(*_, **__):
        raise ReadError("cannot be read", file="shard", got="Input/output error")

    monkeypatch.setattr(LLM, "stream", fail)
    status, _, err = run(
        capsys, "--prompt", "x", "--device", "cpu", "--device-memory", "64MiB", "--output", tmp_path / "out.jsonl"
    )
    assert status == 1
    assert err.splitlines()[-1].startswith("penstock: ReadError: shard: cannot be read")
    assert list(tmp_path.iterdir()) == []


def test_no_standard_output():
    import subprocess
    import sys

    command = f"{sys.executable} -m penstock generate --prompt x --device cpu --device-memory 64MiB --max-tokens 1"
    for redirect, message in ((">&-", "no standard output"), ("> /dev/full", "No space left")):
        done = subprocess.run(["sh", "-c", f"{command} {redirect}"], capture_output=True, text=True)
        assert done.returncode == 1
        assert f"OutputError: {'there is ' if 'standard' in message else ''}" in done.stderr
        assert message in done.stderr


def test_a_model_without_prompts(tiny_llama, capsys):
    status, _, err = run(capsys, tiny_llama)
    assert status == 1
    assert "no prompts" in err
