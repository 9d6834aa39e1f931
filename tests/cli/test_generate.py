import json
import re
import subprocess
import sys

import pytest

from penstock.cli.main import _parser, main

BUDGET = ["--device-memory", "3MB", "--host-memory", "0"]


def run(capsys, *arguments, device="cpu"):
    status = main(["generate", "--device", device, *map(str, arguments)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out, captured.err


def test_the_bundled_model_in_a_quarter_of_its_bytes_equals_hf(capsys, device):
    budget = BUDGET if device == "cpu" else ["--device-memory", "6MB", "--host-memory", "0"]
    out, err = run(capsys, *budget, "--max-tokens", "24", "--verify", device=device)
    assert out.count("--- prompt") == 3
    assert "class Stack:" in out
    assert re.search(r"nvme → host +\d+\.\d MB", err)
    verified = re.search(r"verify: (\d+) of 72 tokens of 3 completions equal in-memory Hugging Face's", err)
    assert int(verified[1]) >= 70


def test_json_lines_end_with_one_summary(capsys, tiny_llama, tmp_path, device):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [8], "max_tokens": 3, "logprobs": 1}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    out, _ = run(
        capsys, tiny_llama, "--prompts", prompts, "--device-memory", "4MiB", "--host-memory", "200KiB", "--ignore-eos",
        "--max-tokens", "5", "--no-compile", "--json", "--verify", device=device,
    )  # fmt: skip
    first, second, summary = map(json.loads, out.splitlines())
    assert (len(first["token_ids"]), len(second["token_ids"]), len(second["logprobs"])) == (5, 3, 3)
    assert summary["generated_tokens"] == 8
    assert summary["verify"]["equal"] == summary["verify"]["tokens"] == 8
    assert summary["reader"]["name"] in ("libaio", "threads")
    assert summary["reader"]["reason"]
    assert set(summary["links"]) == {"nvme_to_host", "host_to_device"}
    assert summary["stalls"]["weights_seconds"] >= 0
    assert summary["layer_code"]["eager"] == {"LlamaDecoderLayer": "it was not wanted"}
    assert sum(summary["layers"].values()) == 6
    assert summary["tokens_per_second"] == pytest.approx(8 / summary["seconds"])


def test_keys_and_values_go_to_host_ram_where_told_to(capsys, tiny_llama, tmp_path, kernel_directory, monkeypatch):
    monkeypatch.setattr("penstock.cli.options.kernel_directory", lambda: kernel_directory)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt_token_ids": [5 + n] * 50}) for n in range(8)))
    out, _ = run(
        capsys, tiny_llama, "--prompts", prompts, "--device-memory", "900KiB", "--host-memory", "2MiB",
        "--kv-host-memory", "1MiB", "--ignore-eos", "--max-tokens", "16", "--json", "--verify",
    )  # fmt: skip
    summary = json.loads(out.splitlines()[-1])
    assert summary["plan"]["kv_host_nbytes"] == 1 << 20
    assert summary["attention_in_host"]["peak_sequences"] > 0
    assert summary["verify"]["equal"] == summary["verify"]["tokens"] == 8 * 16


def test_results_go_to_a_file_that_appears_whole(capsys, tmp_path):
    output = tmp_path / "out.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\n\nx = 1\n")
    out, _ = run(capsys, "--prompts", prompts, "--output", output, "--device-memory", "64MiB", "--max-tokens", "4")
    assert out == ""
    records = {record["request_id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert [records[number]["prompt"] for number in "01"] == ["import os", "x = 1"]
    assert list(tmp_path.iterdir()) != []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def test_text_output_holds_prompt_and_completion(capsys, tmp_path):
    output = tmp_path / "out.txt"
    run(capsys, "--prompt", "import os", "--output", output, "--device-memory", "64MiB", "--max-tokens", "4")
    assert output.read_text().startswith("import os")


def test_text_output_is_in_the_order_of_the_prompts(capsys, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.txt"
    prompts.write_text('{"prompt": "first", "max_tokens": 8}\n{"prompt": "second", "max_tokens": 1}\n')
    run(capsys, "--prompts", prompts, "--output", output, "--device-memory", "64MiB")
    text = output.read_text()
    assert text.startswith("first")
    assert text.index("first") < text.index("second")


def test_a_terminated_run_leaves_no_file(tmp_path):
    command = [sys.executable, "-m", "penstock", "generate", "--prompt", "import os", "--device", "cpu"]
    command += ["--max-tokens", "900", "--ignore-eos", "--device-memory", "8MB", "--host-memory", "0"]
    running = subprocess.Popen([*command, "--output", str(tmp_path / "out.jsonl")], stderr=subprocess.DEVNULL)
    try:
        while not list(tmp_path.iterdir()):
            assert running.poll() is None
    finally:
        running.terminate()
    assert running.wait(90) == 128 + 15
    assert list(tmp_path.iterdir()) == []


def test_prompts_from_stdin(tmp_path):
    command = [sys.executable, "-m", "penstock", "generate", "--prompts", "-", "--device", "cpu", "--json"]
    command += ["--max-tokens", "2", "--device-memory", "64MiB"]
    for text in ("def f(x):\n", '{"prompt": "def f(x):"}\n'):
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        record, _ = map(json.loads, done.stdout.splitlines())
        assert record["prompt"] == "def f(x):"
        assert "\r" not in done.stderr, "no progress line where stderr is not a terminal"


def test_help_and_version_need_no_torch():
    for arguments in (["--help"], ["generate", "--help"], ["--version"]):
        code = (
            "import sys; from penstock.cli.main import main\n"
            f"try: main({arguments!r})\nexcept SystemExit as end: assert end.code == 0\n"
            "loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\nassert not loaded, loaded"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_usage_errors_end_with_2(capsys):
    for arguments in ([], ["generate", "--no-such-option"], ["fly"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


@pytest.mark.parametrize("arguments", [["-v", "generate"], ["generate", "-v"]])
def test_verbose_goes_before_or_after_the_command(arguments):
    assert _parser().parse_args(arguments).verbose == 1
    assert _parser().parse_args(["generate"]).verbose == 0


def test_a_trace_beside_the_results(capsys, tmp_path, device):
    trace = tmp_path / "trace.json"
    run(
        capsys,
        "--prompt",
        "import os",
        "--max-tokens",
        "3",
        "--device-memory",
        "64MiB",
        "--trace",
        trace,
        device=device,
    )
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"] == "layer 0" and event["ph"] == "X" for event in events) >= 3
    assert main(["generate", "--prompt", "x", "--trace", str(tmp_path)]) == 1
    assert "cannot be written" in capsys.readouterr().err
