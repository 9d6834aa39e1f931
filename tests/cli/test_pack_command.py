"""`penstock pack` and `penstock quality` from the command line, and `penstock generate` of what they made."""

import json

from penstock.cli.main import main
from penstock.engine.llm import DEFAULT_MODEL

PROMPT = ["--prompt", "class Stack:\n    def __init__(self):\n", "--max-tokens", "6", "--device", "cpu", "--json"]


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_pack_then_generate_without_any_flag(tmp_path, capsys):
    out = tmp_path / "packed"
    status, printed, _ = run(capsys, "pack", DEFAULT_MODEL, out, "--codec", "exact", "--json")
    assert status == 0
    assert json.loads(printed)["ratio"] <= 0.76
    _, wanted, _ = run(capsys, "generate", DEFAULT_MODEL, *PROMPT)
    status, found, _ = run(capsys, "generate", out, "--verify", *PROMPT)
    assert status == 0
    tokens = [json.loads(text.splitlines()[0])["token_ids"] for text in (wanted, found)]
    assert tokens[0] == tokens[1]
    status, _, error = run(capsys, "pack", DEFAULT_MODEL, out, "--codec", "exact")
    assert status == 1
    assert "OutputError" in error
    assert "exists already" in error


def test_quality_report(tmp_path, capsys):
    out, text = tmp_path / "packed", tmp_path / "text.py"
    text.write_text("class Stack:\n    def __init__(self):\n        self.items = []\n" * 5)
    options = ["--codec", "int4", "--group-size", "32", "--search", "--no-symmetric", "--exclude", "*.down_proj.*"]
    status, printed, _ = run(capsys, "pack", DEFAULT_MODEL, out, *options)
    assert status == 0
    assert "72 tensors int4" in printed
    status, printed, _ = run(capsys, "quality", DEFAULT_MODEL, out, "--text", text, "--device", "cpu", "--json")
    assert status == 0
    report = json.loads(printed)
    assert [one["layer"] for one in report["layers"]] == list(range(12))
    assert abs(report["perplexity"]["change"]) < 0.5
    status, printed, _ = run(capsys, "quality", DEFAULT_MODEL, out)
    assert status == 0
    assert len(printed.splitlines()) == 13
    status, _, error = run(capsys, "quality", DEFAULT_MODEL, DEFAULT_MODEL)
    assert status == 1
    assert "not a packed checkpoint" in error


def test_options_that_do_not_go_together(tmp_path, capsys):
    status, _, error = run(capsys, "pack", DEFAULT_MODEL, tmp_path / "out", "--codec", "exact", "--group-size", "64")
    assert status == 1
    assert "no groups" in error
    assert not list(tmp_path.iterdir())


def test_quality_of_keys_and_values(tmp_path, capsys):
    text = tmp_path / "text.py"
    text.write_text("class Stack:\n    def __init__(self):\n        self.items = []\n" * 30)
    wanted = ["--kv-dtype", "bf16", "--kv-dtype", "int8", "--kv-dtype", "int4", "--text", text, "--device", "cpu"]
    status, printed, _ = run(capsys, "quality", DEFAULT_MODEL, *wanted, "--dtype", "float32", "--json")
    assert status == 0
    auto, *others = json.loads(printed)["kv"]
    assert (auto["kv_dtype"], auto["change"], auto["token_nbytes"]) == ("auto", 0, 12 * 2 * 2 * 32 * 4)
    assert [one["token_nbytes"] for one in others] == [12 * 2 * 2 * size for size in (64, 32 + 4, 16 + 4)]
    assert [one["kv_dtype"] for one in others] == ["bf16", "int8", "int4"]
    for one, bound in zip(others, (0.002, 0.01, 0.2), strict=True):
        assert abs(one["change"]) < bound
    status, printed, _ = run(capsys, "quality", DEFAULT_MODEL, *wanted[-6:])
    assert status == 0
    assert printed.splitlines()[0] == "kv dtype  activations  bytes per token  perplexity  change"
    for bad, message in (
        ((), "either weights or dtypes of a run"),
        ((DEFAULT_MODEL, "--kv-dtype", "int8"), "either weights or dtypes of a run"),
        (("--kv-dtype", "int8"), "Add --text"),
        (("--activation-dtype", "fp8", "--text", text, "--device", "cpu"), "no weights to multiply with in FP8"),
        (("--kv-dtype", "int9", "--text", text), "not a dtype of keys and values"),
    ):
        status, _, error = run(capsys, "quality", DEFAULT_MODEL, *bad)
        assert status == 1
        assert message in error
