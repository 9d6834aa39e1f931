"""`penstock profile`: what it prints, what it refuses, and that nothing of it is ever left."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.cli.main import main
from penstock.errors import ReadError
from penstock.offload.hardware import HardwareProfile, settings_of

FEW = ["--time", "5", "--size", "32MiB", "--block", "1MiB", "--depth", "1,8"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path / "penstock" / "profile.json"


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    return path


@pytest.fixture
def large_file(disk):
    path = disk / "large"
    path.write_bytes(os.urandom(MIB) * 32)
    return path


def run(capsys, *arguments):
    status = main(["profile", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_quick_prints_a_valid_profile(disk, cache, tmp_path):
    html, plain = tmp_path / "report.html", tmp_path / "profile.json"
    command = [
        sys.executable,
        "-m",
        "penstock",
        "profile",
        "--quick",
        "--size",
        "256MiB",
        "--html",
        html,
        "--json",
        plain,
    ]
    done = subprocess.run([*command, disk], capture_output=True, text=True, check=True)
    assert os.listdir(disk) == []
    profile = HardwareProfile.load(cache)
    assert profile == HardwareProfile.load(plain)
    assert [path.name for path in cache.parent.iterdir()] == ["profile.json"]
    choice = profile.disks[0].sweep.choice
    assert choice.bytes_per_second > 0
    for line in (
        "recommended",
        "because",
        "best",
        "knee",
        "depth 1",
        "sustained",
        "noise",
        "host memory",
        "file system",
    ):
        assert re.search(f"^{line}", done.stdout, re.MULTILINE), line
    settings = settings_of(choice)
    assert f"--io-block {settings.block_nbytes} --io-in-flight {settings.in_flight_nbytes}" in done.stdout
    assert "\x1b" not in done.stdout, "no colours where stdout is not a terminal"
    assert "writing up to 256.00 MiB" in done.stderr
    page = html.read_text()
    assert page.count("<svg") >= 3
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script""", page)


def test_a_file_is_only_read_and_json_is_alone_on_stdout(capsys, large_file, cache):
    before = large_file.stat()
    status, out, err = run(capsys, large_file, *FEW, "--json", "-")
    assert status == 0
    plain = json.loads(out)
    assert plain["schema"] == "penstock-profile/2"
    assert plain["disks"][0]["file"] == plain["disks"][0]["file"] | {"created": False, "written_nbytes": 0}
    assert "read in place, nothing written" in err
    assert (large_file.stat().st_mtime_ns, large_file.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert os.listdir(large_file.parent) == ["large"]
    assert json.loads(cache.read_text()) == plain


def test_a_model_directory_is_only_read(capsys, disk, large_file):
    large_file.rename(disk / "model-00001-of-00002.safetensors")
    (disk / "model-00002-of-00002.safetensors").write_bytes(b"small")
    status, out, _ = run(capsys, disk, "--dry-run")
    assert status == 0
    assert "would read" in out
    assert "model-00001-of-00002.safetensors (32.00 MiB), writing nothing" in out


def test_expectations_and_comparison(capsys, large_file, tmp_path):
    status, _, _ = run(
        capsys, large_file, *FEW, "--time", "6", "--json", tmp_path / "old.json", "--expect-gbps", "0.000001"
    )
    assert status == 0
    status, out, err = run(capsys, large_file, *FEW, "--compare", tmp_path / "old.json", "--expect-gbps", "100000")
    assert status == 1
    assert "wanted at least 100000 GB/s" in err
    assert re.search(r"[≈↑↓] +\d+\.\d\d  .*disk read, recommended: .* GB/s → ", out)


def test_a_dry_run_writes_nothing(capsys, disk, cache):
    status, out, _ = run(capsys, disk, "--dry-run", "--size", "64MiB", "--max-write", "48MiB", "--quick")
    assert status == 0
    assert "would write up to 48.00 MiB" in out
    assert "at most 15 s" in out
    assert os.listdir(disk) == []
    assert not cache.exists()


def test_several_disks(capsys, disk, large_file, cache):
    status, out, _ = run(capsys, disk, large_file, *FEW, "--time", "6")
    assert status == 0
    assert [each.file.created for each in HardwareProfile.load(cache).disks] == [True, False]
    assert out.count("file system") == 2


def test_a_refusal_of_o_direct_is_measured_through_the_cache_and_said(capsys, large_file, monkeypatch):
    monkeypatch.setattr("penstock.io.facts.direct_refusal", lambda *_: "open refuses O_DIRECT (EINVAL)")
    status, out, _ = run(capsys, large_file, *FEW)
    assert status == 0
    assert "read through the page cache: open refuses O_DIRECT (EINVAL)" in out
    assert "warning no_direct" in out
    assert "--io-backend threads" in out


def test_aio_that_is_used_up_falls_back_to_threads_and_says_so(capsys, large_file, monkeypatch):
    def refuse(*_):
        raise ReadError("the system has no Linux AIO requests left", fix="Raise fs.aio-max-nr.")

    monkeypatch.setattr("penstock.io.window_libaio.make_context", refuse)
    status, out, _ = run(capsys, large_file, *FEW)
    assert status == 0
    assert "threads: Linux AIO does not work here: the system has no Linux AIO requests left" in out
    assert "warning no_aio" in out
    assert "Raise fs.aio-max-nr" in out


def test_a_small_memlock_limit_changes_nothing_and_is_said(capsys, large_file):
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, hard))
    try:
        status, out, _ = run(capsys, large_file, *FEW)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    assert status == 0
    assert "warning memlock_small: only 65536 bytes" in out
    assert "recommended" in out


def test_fio_that_fails_loses_nothing(capsys, large_file, monkeypatch, cache):
    monkeypatch.setattr("penstock.io.fio.shutil.which", lambda _: "/bin/false")
    monkeypatch.setattr(
        "penstock.io.fio.subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "broken")
    )
    status, out, _ = run(capsys, large_file, *FEW, "--verify-fio")
    assert status == 1
    assert "warning fio_failed: fio failed" in out
    assert "recommended" in out
    assert cache.exists()


def test_fio_that_is_not_installed_is_said_at_once(capsys, large_file, monkeypatch, cache):
    monkeypatch.setattr("penstock.io.fio.shutil.which", lambda _: None)
    status, _, err = run(capsys, large_file, *FEW, "--verify-fio")
    assert status == 1
    assert "ConfigError: --verify-fio needs fio" in err
    assert not cache.exists()


def test_refusals_name_the_path_and_leave_nothing(capsys, disk, cache):
    (disk / "small").write_bytes(b"x")
    for path, error in (
        (disk / "none", "No such file"),
        (disk / "small", "too small"),
        ("/dev/null", "character device"),
    ):
        status, out, err = run(capsys, path, *FEW)
        assert (status, out) == (1, "")
        assert err.startswith("penstock: TargetError: ")
        assert error in err
        assert str(path) in err
    assert os.listdir(disk) == ["small"]
    assert not cache.exists()


def test_memory_is_no_disk(capsys):
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm")
    status, _, err = run(capsys, "/dev/shm", *FEW)
    assert status == 1
    assert "lies in memory (tmpfs), so there is no disk to measure" in err


def test_too_little_space_is_named_before_anything_is_written(capsys, disk):
    status, _, err = run(capsys, disk, "--time", "5", "--size", "1000TB", "--max-write", "1000TB")
    assert status == 1
    assert "penstock: NoSpaceError: " in err
    assert os.listdir(disk) == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--block", "1000"], "ConfigError: --block"),
        (["--block", ","], "ConfigError: --block is empty"),
        (["--depth", "0"], "ConfigError: --depth"),
        (["--depth", "many"], "SizeError"),
        (["--size", "lots"], "SizeError"),
        (["--size", "1MiB"], "TargetError: "),
        (["--max-write", "0"], "TargetError: "),
        (["--time", "1"], "ConfigError: --time"),
        (["--time", "nan"], "ConfigError: --time"),
        (["--expect-gbps", "-1"], "ConfigError: --expect-gbps"),
        (["--compare", "none.json"], "ProfileError: none.json"),
        (["--json", "/no/such/place.json"], "OutputError: /no/such/place.json"),
        (["--html", "/"], "OutputError: /"),
    ],
)
def test_bad_options(capsys, disk, arguments, error):
    status, out, err = run(capsys, disk, *arguments)
    assert (status, out) == (1, "")
    assert f"penstock: {error}" in err
    assert os.listdir(disk) == []


def test_wrong_usage_ends_with_2(capsys, disk):
    for arguments in (["--quick", "--thorough"], ["--no-such-option"], ["--time", "soon"]):
        with pytest.raises(SystemExit) as caught:
            main(["profile", str(disk), *arguments])
        assert caught.value.code == 2


def test_signal_handlers_are_put_back(capsys, large_file):
    before = signal.getsignal(signal.SIGTERM)
    run(capsys, large_file, *FEW)
    assert signal.getsignal(signal.SIGTERM) is before
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("penstock-window")]
    assert threads == []


NAMED = """
import os, sys
if sys.argv.pop(1) == "named":  # as on file systems that refuse O_TMPFILE
    os.O_TMPFILE = os.O_DIRECTORY
from penstock.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def kill_at_a_random_moment(base, number, number_of_signal, delay):
    """Return what is left in the directory, and the exit status."""
    disk, cache = base / f"disk-{number}", base / f"cache-{number}"
    disk.mkdir()
    arguments = ["profile", "--quick", "--size", "32MiB", disk, "--json", cache / "out.json"]
    cache.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", NAMED, "named" if number % 2 else "nameless", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
    )
    time.sleep(delay)
    process.send_signal(number_of_signal)
    try:
        status = process.wait(timeout=90)
    finally:
        process.kill()
    return [*os.listdir(disk), *(str(path) for path in cache.rglob("*") if path.is_file())], status


def test_killed_at_any_moment_it_leaves_nothing(tmp_path):
    rng = random.Random(time.time_ns())
    signals = [(signal.SIGTERM, signal.SIGINT)[number % 4 // 2] for number in range(50)]
    # Mostly while it starts, writes and sweeps; none lives long enough to store its profile.
    delays = [rng.uniform(0.1, 2.5) for _ in signals]
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(kill_at_a_random_moment, [tmp_path] * 50, range(50), signals, delays))
    for (left, status), sent, delay in zip(ends, signals, delays, strict=True):
        assert left == [], (sent, delay, status)
        # The interpreter itself dies of the signal until the command takes over; then it leaves with 128 + number. A
        # library whose start or end is interrupted may abort the process; what counts is that nothing is left.
        assert status in {-sent, 128 + sent, 130, 1, -signal.SIGABRT}, (sent, delay)
