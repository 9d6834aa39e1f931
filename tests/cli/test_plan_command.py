"""`penstock plan`, as a user meets it."""

import json

import pytest
from made_profile import make_disk, make_profile

from penstock.cli.main import main
from penstock.offload.hardware import profile_path


def run(capsys, *arguments):
    status = main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_plan_for_people(capsys):
    status, out, err = run(capsys, "--shape", "opt-30b", "--hardware", "a6000", "--requests", "16")
    assert (status, err) == (0, "")
    for text in ("opt-30b: 29,974,540,288 parameters", "of a budget of 43.20 GiB", "keys and values", "host to device",
                 "tokens/s", "the pace is set by", "twice the RAM", "most is bought by",
                 "Nothing here was measured"):  # fmt: skip
        assert text.lower() in out.lower()


def test_a_plan_for_programs(capsys):
    arguments = ("--shape", "tiny", "--hardware", "rtx4090", "--device-memory", "300MB", "--host-memory", "100MB")
    status, out, _ = run(capsys, *arguments, "--prompt-len", "64", "--gen-len", "16", "--requests", "8", "--json")
    assert status == 0
    assert len(out.splitlines()) == 1
    made = json.loads(out)
    assert made["fits"]
    assert made["model"]["parameters"] == 192_971_776
    assert made["plan"]["device_nbytes"] <= made["budgets"]["device"] == 300_000_000
    assert made["forecast"]["generated_tokens"] == 128
    assert made["work"] == {"prompt_len": 64, "gen_len": 16, "requests": 8}
    assert not made["hardware"]["measured"]
    assert {"double_host", "double_device", "next_pcie", "second_gpu", "second_nvme", "exact", "int8", "int4"} == {
        one["name"] for one in made["what_if"]
    }


def test_keys_and_values_in_host_ram(capsys):
    """They are shown with their bytes and their seconds, and a size that was given stays."""
    arguments = ("--shape", "llama-3-8b", "--hardware", "a6000", "--device-memory", "6GiB", "--prompt-len", "2048")
    arguments += ("--requests", "40")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "128.00 KiB a token, attended to there" in out
    assert "\nattention in host RAM " in out
    made = json.loads(run(capsys, *arguments, "--kv-host-memory", "4GiB", "--json")[1])
    assert made["plan"]["kv_host_nbytes"] == made["budgets"]["kv_host"] == 4 << 30
    assert made["seconds_per_pass"]["host_attention"] > 0
    made = json.loads(run(capsys, *arguments, "--kv-host-memory", "0", "--json")[1])
    assert made["plan"]["kv_host_nbytes"] == 0


def test_keys_and_values_on_nvme(capsys):
    arguments = ("--shape", "llama-3-8b", "--hardware", "a6000", "--device-memory", "6GiB", "--prompt-len", "2048")
    arguments += ("--requests", "40", "--kv-host-memory", "0", "--kv-nvme", "4GiB")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "        keys and values             4.00 GiB  128.00 KiB a token, read in every pass" in out
    assert "        room to read              128.00 MiB  keys and values on NVMe" in out
    made = json.loads(run(capsys, *arguments, "--json")[1])
    assert made["plan"]["kv_nvme_nbytes"] == made["budgets"]["kv_nvme"] == 4 << 30
    assert made["seconds_per_pass"]["nvme_to_host"] > 0


@pytest.mark.parametrize(("kv_dtype", "nbytes"), [("auto", 64 * 2), ("fp8", 64 + 4), ("int4", 2 * (16 + 4))])
def test_windows_and_what_keys_and_values_rest_as(capsys, kv_dtype, nbytes):
    arguments = ("--shape", "gpt-oss-120b-mxfp4", "--hardware", "rtx4090", "--requests", "4", "--kv-dtype", kv_dtype)
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "of them only in a window" in out
    assert "bfloat16, quantised with mxfp4" in out
    made = json.loads(run(capsys, *arguments, "--json")[1])["model"]
    assert (made["quantised"], made["kv_dtype"]) == ("mxfp4", kv_dtype)
    assert made["kv_bytes_per_token"] == 36 * 16 * nbytes
    assert made["kv_windows"][1] == {"layer": 2, "window": 128, "token_nbytes": 16 * nbytes}
    assert len(made["kv_windows"]) == 18


def test_what_does_not_fit_is_answered_with_what_does(capsys):
    arguments = ("--shape", "llama-3-70b", "--hardware", "rtx4090", "--device-memory", "4GiB")
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (1, "")
    assert "does not fit: the device budget is too small for one layer plus the resident unit" in out
    assert "this would fit: --device-memory" in out
    status, out, _ = run(capsys, *arguments, "--json")
    made = json.loads(out)
    assert (status, made["fits"]) == (1, False)
    enough = made["budgets"]["device"] + made["short_bytes"]["device"]
    assert made["nearest"]["budgets"]["device"] == enough
    assert run(capsys, *arguments[:-1], enough, "--requests", "1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ConfigError: plan needs a model or a shape"),
        (["here", "--shape", "tiny"], "ConfigError: plan needs a model or a shape"),
        (["--shape", "llama-5"], "ConfigError: no such shape: wanted one of deepseek-v3, deepseek-v3-fp8, "),
        (["--shape", "tiny", "--hardware", "abacus"], "ConfigError: no such machine"),
        (["--shape", "tiny", "--hardware", "h200", "--requests", "0"], "ConfigError: --requests"),
        (["--shape", "tiny", "--hardware", "h200", "--gen-len", "9000"], "exceeds the model's context"),
        (["--shape", "tiny", "--hardware", "h200", "--device-memory", "1TiB"], "more than there is for it"),
        (["--shape", "tiny", "--hardware", "h200", "--host-memory", "1TiB"], "more than there is for it"),
        (["--shape", "tiny", "--hardware", "h200", "--device-memory", "20 elephants"], "SizeError: not a memory size"),
        (["--shape", "tiny", "--hardware", "h200", "--kv-nvme", "-1"], "SizeError: not a memory size"),
        (["--shape", "tiny", "--hardware", "h200", "--dtype", "int3"], "not a dtype"),
        (["--shape", "opt-30b", "--hardware", "h200", "--codec", "exact"], "cannot be packed so"),
        (["--shape", "kimi-k2-fp8", "--hardware", "h200", "--codec", "int4"], "quantised with fp8 cannot be packed"),
        (["--shape", "tiny", "--hardware", "h200", "--kv-dtype", "int3"], "not a dtype of keys and values"),
        (
            ["--shape", "tiny", "--hardware", "h200", "--kv-host-memory", "200GB"],
            "values' host memory budget is more than there is",
        ),
        (["/nowhere", "--hardware", "h200"], "MissingFileError: /nowhere/config.json"),
    ],
)
def test_mistakes_are_named(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert message in err


@pytest.mark.parametrize("text", ["{", '{"schema": "penstock-profile/1"}', "[]", '{"schema": "penstock-hardware/9"}'])
def test_a_description_of_no_use_is_named(capsys, tmp_path, text):
    """Nothing is measured in its place: it is of another machine."""
    file = tmp_path / "machine.json"
    file.write_text(text)
    status, out, err = run(capsys, "--shape", "tiny", "--hardware", file)
    assert (status, out) == (1, "")
    assert f"penstock: ProfileError: {file}: " in err


def test_a_machine_that_was_not_measured_says_what_to_do(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, _, err = run(capsys, "--shape", "tiny")
    assert status == 1
    assert "this machine has not been measured" in err
    assert "penstock profile" in err
    make_profile(make_disk(), host_copy=1e10, host_read=2e10).store(profile_path(str(tmp_path)))
    status, out, _ = run(capsys, "--shape", "tiny", "--requests", "2")
    assert status == 0
    assert "measured by penstock profile" in out


def test_a_model_directory_with_and_without_weights(capsys, tmp_path, tiny_llama):
    arguments = ("--hardware", "cpu", "--prompt-len", "16", "--gen-len", "4", "--requests", "2", "--json")
    status, out, _ = run(capsys, tiny_llama, *arguments)
    assert status == 0
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    status, bare, _ = run(capsys, tmp_path, *arguments)
    assert status == 0
    first, second = json.loads(out), json.loads(bare)
    assert first["model"] | {"name": ""} == second["model"] | {"name": ""}
    (tmp_path / "config.json").write_text('{"model_type": "perceiver"}')
    status, _, err = run(capsys, tmp_path, *arguments)
    assert status == 1
    assert "UnknownArchitectureError" in err
    assert "llama" in err
