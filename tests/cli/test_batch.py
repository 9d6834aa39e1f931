"""Batch jobs from the command line: results, resuming, bad lines, signals, faults."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli import job as job_module
from penstock.cli import output
from penstock.cli.main import main
from penstock.engine.llm import LLM
from penstock.offload.cost import Machine

BUDGET = ("--device", "cpu", "--device-memory", "900KiB", "--host-memory", "0")


def prompt(number):
    return [3 + (7 * number + 5 * place) % 250 for place in range(1 + number % 9)]


def request(number, **body):
    body = {"prompt": prompt(number), "max_tokens": 1 + number % 4, "temperature": 0, "ignore_eos": True} | body
    return {"custom_id": f"request {number}", "method": "POST", "url": "/v1/completions", "body": body}


@pytest.fixture
def batch(tiny_llama, tmp_path, capsys):
    """Run a job of some lines; returns status and stderr."""

    class Batch:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        part = tmp_path / "out.jsonl.part"

        def write(self, lines):
            self.source.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))

        def __call__(self, *options, command="batch"):
            arguments = [command, self.source, self.target, "--model", tiny_llama, *BUDGET, *options]
            status = main(list(map(str, arguments)))
            self.out, err = capsys.readouterr()
            return status, err

        def results(self):
            return [json.loads(line) for line in self.target.read_text().splitlines()]

    return Batch()


@pytest.fixture
def stop_after(monkeypatch):
    """Send this process a signal when a pass has ended and so many lines are done."""

    def arrange(lines, number):
        describe = job_module._Job._describe

        def described(job, *state):
            if len(job._journal) >= lines:
                os.kill(os.getpid(), number)
            return describe(job, *state)

        monkeypatch.setattr(job_module._Job, "_describe", described)

    return arrange


def test_results_are_those_of_generate_in_the_order_of_the_lines(batch, tiny_llama):
    batch.write([request(1), {"prompt_token_ids": prompt(2), "max_tokens": 3, "custom_id": "mine"}, "", request(4)])
    status, err = batch("--ignore-eos")
    assert status == 0
    assert "3 results and 0 errors of 3 lines" in err
    first, second, third = batch.results()
    assert [one["id"] for one in (first, second, third)] == ["batch_req_1", "batch_req_2", "batch_req_4"]
    assert [one["custom_id"] for one in (first, second, third)] == ["request 1", "mine", "request 4"]
    assert first["error"] is second["error"] is None
    from penstock import SamplingParams

    with LLM(tiny_llama, device="cpu") as llm:
        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (2, 3, 1)]
        wanted = [list(one.outputs[0].token_ids) for one in llm.generate(list(map(prompt, (1, 2, 4))), params)]
    body = first["response"]["body"]
    assert [body["choices"][0]["token_ids"], second["token_ids"]] == wanted[:2]
    assert third["response"]["body"]["choices"][0]["token_ids"] == wanted[2]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert body["model"] == "tiny-llama"
    assert not batch.part.exists()


def test_bad_lines_become_errors_with_their_numbers_and_the_rest_is_done(batch):
    lines = [request(number) for number in range(1, 101)]
    bad = {
        3: "{",
        50: "[1, 2]",
        51: json.dumps(request(51, n=3)),
        52: json.dumps(request(52, prompt=[5] * 300)),
        53: json.dumps(request(53, prompt=[999])),
        54: json.dumps({"text": "x"}),
        55: json.dumps(request(52)),
        56: '{"custom_id": 5}',
        57: '{"prompt": "text"}',
        58: json.dumps(request(58, prompt=[4], max_tokens=250)),
        100: "\x00",
    }
    for number, text in bad.items():
        lines[number - 1] = text
    batch.write(lines)
    status, err = batch("--device-memory", "600KiB")
    assert status == 0
    assert "89 results and 11 errors of 100 lines" in err
    results = batch.results()
    assert [one["id"] for one in results] == [f"batch_req_{number}" for number in range(1, 101)]
    errors = {one["error"]["line"]: one for one in results if one["error"]}
    assert sorted(errors) == sorted(bad)
    assert all(one["response"] is None for one in errors.values())
    assert all(f"line {number}: " in one["error"]["message"] for number, one in errors.items())
    codes = {number: one["error"]["code"] for number, one in errors.items()}
    assert (codes[3], codes[52], codes[51]) == ("invalid_line", "context_length_exceeded", "invalid_request")
    assert codes[58] == "insufficient_memory"
    assert errors[51]["custom_id"] == "request 51"
    assert "an earlier line has this custom_id" in errors[55]["error"]["message"]
    assert '"n" is not supported' in errors[51]["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_pass_and_the_same_command_goes_on(batch, stop_after, number, monkeypatch):
    batch.write(["bad"] + [request(one, temperature=one % 2) for one in range(2, 62)])
    assert batch()[0] == 0
    wanted = batch.target.read_bytes()
    batch.target.unlink()
    stop_after(30, number)
    status, err = batch()
    assert status == 128 + number
    assert "run the same command again to go on" in err
    assert not batch.target.exists()
    done = batch.part.read_bytes().count(b"\n") - 1
    assert 30 <= done < 61
    monkeypatch.undo()
    seen = []
    stream = LLM.stream

    def counted(self, requests, **options):
        return stream(self, (seen.append(one.number) or one for one in requests), **options)

    monkeypatch.setattr(LLM, "stream", counted)
    status, err = batch("--json")
    assert status == 0
    assert f"going on: {done} of 61 lines are done" in err
    assert len(seen) == 61 - done, "nothing is done twice"
    assert batch.target.read_bytes() == wanted
    summary = json.loads(batch.out)
    assert (summary["lines"], summary["errors"], summary["resumed"]) == (61, 1, True)


def test_memory_may_differ_when_a_job_goes_on_but_nothing_else(batch, stop_after, monkeypatch):
    batch.write([request(one) for one in range(1, 61)])
    assert batch()[0] == 0
    wanted = batch.target.read_bytes()
    batch.target.unlink()
    stop_after(10, signal.SIGTERM)
    assert batch()[0] == 143
    monkeypatch.undo()
    for options, name in (
        (["--max-tokens", "3"], "parameters"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--kv-dtype", "int8"], "kv_dtype"),
        (["--codec", "int8", "--group-size", "32"], "codec"),
    ):
        status, err = batch(*options)
        assert status == 1
        assert f"JournalError: {batch.part}: this journal belongs to a job with another {name}" in err
    text = batch.source.read_text()
    batch.write([request(1)])
    assert "a job with another input" in batch()[1]
    batch.source.write_text(text)
    assert "another command" in batch(command="score")[1]
    status, _ = batch("--device-memory", "2MiB", "--micro-batch-tokens", "7")
    assert status == 0
    assert batch.target.read_bytes() == wanted


def test_an_output_that_exists_is_not_replaced_unasked(batch):
    batch.write([request(1)])
    batch.target.write_text("mine")
    status, err = batch()
    assert status == 1
    assert "OutputError" in err
    assert "--overwrite" in err
    assert batch.target.read_text() == "mine"
    assert not batch.part.exists()
    assert batch("--overwrite")[0] == 0
    assert len(batch.results()) == 1


def test_a_job_that_died_while_its_output_was_put_in_place_ends_without_the_model(batch, monkeypatch):
    batch.write([request(1), request(2)])
    monkeypatch.setattr("penstock.io.journal.Journal.remove", lambda self: None)
    assert batch()[0] == 0
    wanted = batch.target.read_bytes()
    assert batch.part.exists()
    monkeypatch.undo()
    monkeypatch.setattr(LLM, "__init__", None)
    status, err = batch()
    assert status == 0, err
    assert batch.target.read_bytes() == wanted
    assert not batch.part.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [(None, "No such file"), ("", "no requests in this file"), ("\n\n", "no requests in this file"), (0, "not a file")],
)
def test_inputs_that_are_none_are_refused_before_anything_is_made(batch, source, message):
    if source is not None:
        batch.source.mkdir() if source == 0 else batch.source.write_text(source)
    status, err = batch()
    assert status == 1
    assert "PromptFileError" in err
    assert message in err
    assert not batch.part.exists()


def test_stdin_is_read_once(batch, monkeypatch, stop_after, caplog):
    text = "".join(json.dumps(request(one)) + "\n" for one in range(1, 41))

    def from_stdin(*options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        batch.source = "-"
        return batch(*options)

    assert from_stdin()[0] == 0
    assert len(batch.results()) == 40
    assert "stdin cannot be read twice" in caplog.text
    batch.target.unlink()
    stop_after(5, signal.SIGTERM)
    status, err = from_stdin()
    assert status == 143
    assert f"their results are in {batch.part}" in err
    assert "JournalError" in from_stdin()[1]
    assert batch.part.exists()


def test_an_input_that_changes_while_it_is_read_is_named(batch, monkeypatch):
    batch.write([request(1), request(2)])
    stream = LLM.stream

    def changed(self, requests, **options):
        with batch.source.open("a") as file:
            file.write("\n")
        return stream(self, requests, **options)

    monkeypatch.setattr(LLM, "stream", changed)
    status, err = batch()
    assert status == 1
    assert "the input has changed while it was read" in err


def test_a_file_size_limit_stops_the_job_and_keeps_what_was_acknowledged(batch):
    batch.write([request(one) for one in range(1, 201)])
    assert batch()[0] == 0
    wanted = batch.target.read_bytes()
    batch.target.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(wanted) // 2, limits[1]))
    try:
        status, err = batch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert "OutputError" in err
    assert "File too large" in err
    assert "run the same command again" in err
    assert batch()[0] == 0
    assert batch.target.read_bytes() == wanted


def test_requests_are_read_when_there_is_room_for_them(batch, monkeypatch):
    """One line is read ahead of what runs, however many follow."""
    batch.write([request(one) for one in range(1, 121)])
    ahead = []
    requests = job_module._Job._requests

    def watched(job, stream, llm):
        for number, one in enumerate(requests(job, stream, llm), start=1):
            ahead.append(number - len(llm._generation._scheduler.running) - len(job._journal))
            yield one

    monkeypatch.setattr(job_module._Job, "_requests", watched)
    monkeypatch.setattr(job_module, "COMMIT_SECONDS", 0)
    assert batch("--device-memory", "600KiB")[0] == 0
    assert len(ahead) == 120
    assert max(ahead) <= 1


def test_scores_come_from_a_file_too(batch):
    lines = [
        {"token_ids": prompt(8), "custom_id": "whole"},
        {"prompt_token_ids": [5, 6], "continuation_token_ids": [7, 8, 9]},
        {"prompt": "text", "continuation": "more"},
        {"text": 5},
        {"token_ids": [5]},
        {"words": []},
        {"token_ids": [5, "x"]},
    ]
    batch.write(lines)
    status, err = batch("--json", command="score")
    assert status == 0
    assert "2 results and 5 errors of 7 lines" in err
    results = batch.results()
    assert (results[0]["custom_id"], results[0]["num_tokens"], results[1]["token_ids"]) == ("whole", 8, [7, 8, 9])
    assert results[1]["logprob"] == pytest.approx(sum(results[1]["logprobs"]))
    assert len(results[1]["ranks"]) == 3
    assert [one["error"]["line"] for one in results[2:]] == [3, 4, 5, 6, 7]
    assert json.loads(batch.out)["generated_tokens"] == 0


def test_chats_go_through_the_template(tmp_path, capsys, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 1}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"prompt": "x", "max_tokens": 2},
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    load = "penstock.engine.llm.load_tokenizer"
    from penstock.engine.model.tokenizer import load_tokenizer

    def with_template(path):
        tokenizer = load_tokenizer(path)
        tokenizer.chat_template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
        return tokenizer

    monkeypatch.setattr(load, with_template)
    command = ["batch", source, target, "--device", "cpu", "--device-memory", "64MiB", "--chat", "--temperature", "0"]
    assert main(list(map(str, command))) == 0
    first, second, third = map(json.loads, target.read_text().splitlines())
    body = first["response"]["body"]
    assert body["choices"][0]["message"]["content"] == second["text"] == third["text"]
    assert len(body["choices"][0]["logprobs"]["content"]) == body["usage"]["completion_tokens"] == 2
    assert body["usage"]["prompt_tokens"] == second["prompt_tokens"]


def test_killed_jobs_lose_nothing_acknowledged():
    """The small version of what the script does at length."""
    script = Path(__file__).parents[2] / "scripts" / "test-crash"
    done = subprocess.run(
        [sys.executable, script, "--lines", "60", "--kills", "3", "--power-cuts", "0"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] == 3


def test_what_a_job_left_that_was_killed_while_its_output_was_written_is_written_over(batch):
    batch.write([request(1)])
    leftover = batch.target.with_name(".out.jsonl.part")
    leftover.write_text("half of a line, and more than the whole output would take" * 100)
    assert batch()[0] == 0
    assert len(batch.results()) == 1
    assert sorted(path.name for path in batch.target.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_disk_that_fails_under_the_model_keeps_what_was_done(batch, monkeypatch):
    from penstock.engine.executor import Executor
    from penstock.errors import ReadError

    batch.write([request(one) for one in range(1, 61)])
    run_pass, passes = Executor.run_pass, []

    def failing(self, batches):
        passes.append(0)
        if len(passes) == 4:  # the first is the rehearsal
            raise ReadError("cannot be read", file="shard", got="Input/output error")
        return run_pass(self, batches)

    monkeypatch.setattr(Executor, "run_pass", failing)
    monkeypatch.setattr(job_module, "COMMIT_SECONDS", 1000)
    status, err = batch()
    assert status == 1
    assert "ReadError: shard" in err
    done = batch.part.read_bytes().count(b"\n") - 1
    assert done > 0
    monkeypatch.undo()
    assert f"going on: {done} of 60" in batch()[1]


def test_a_signal_while_the_model_loads_ends_before_the_first_pass(batch, monkeypatch):
    batch.write([request(1)])
    load = job_module.open_llm

    def signalled(*arguments, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments, **more)

    monkeypatch.setattr(job_module, "open_llm", signalled)
    status, err = batch()
    assert status == 143
    assert "stopped with 0 of 1 lines done" in err
    assert not batch.part.exists()


def test_a_model_that_is_not_there_leaves_nothing(batch, tmp_path):
    batch.write([request(1)])
    status, err = batch("--model", tmp_path / "none")
    assert status == 1
    assert "MissingFileError" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_log_gets_a_line_of_progress_now_and_then(batch, monkeypatch):
    """With shares of what links can do, where that is known."""
    monkeypatch.setattr(output, "LOG_SECONDS", 0.0)
    batch.write([request(number) for number in range(1, 4)])
    for known in (None, Machine(host_to_device=1e12, nvme_to_host=1e12, flops=None, device_memory=None)):
        monkeypatch.setattr(LLM, "machine", known)
        _, err = batch("--ignore-eos")
        batch.target.unlink()
        share = r" \(\d+%\)" if known else ""
        link = rf"\d+\.\d\d GB/s{share}"
        assert re.search(rf"(?m)^\[\d+ s\] [123]/3 lines, .* tokens/s, nvme → host {link}, host → device {link}", err)
