"""`make gpu-check`: a dry run from end to end, and its stages when they fail, hang or cannot start."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import simt

gpu_check = pytest.importorskip("benchmarks.gpu_check", reason="needs python -m pytest in the checkout")
Stage = gpu_check.Stage

ROOT = Path(__file__).resolve().parents[1]


def python(name: str, code: str, seconds: float = 30, **more) -> Stage:
    return Stage(name, [sys.executable, "-c", code], seconds, **more)


def run(output: Path, *groups: list[Stage], total: float = 60) -> tuple[gpu_check.Check, dict]:
    check = gpu_check.Check(output, dry_run=True, start=time.monotonic(), total=total)
    for group in groups:
        check.run(group)
    return check, json.loads((output / "summary.json").read_text())


def ends(pid: int) -> bool:
    """Whether the process is gone within seconds; a killed one that nobody has waited for yet is."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_dry_run(tmp_path):
    for module in ("matplotlib", "rich", "PIL"):
        pytest.importorskip(module)
    if not gpu_check.up_to_date():
        pytest.skip(
            "the extension in the checkout is older than its sources, or not there: it would be built"
        )
    simt.load()
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--output", tmp_path]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    results = {stage["name"]: stage["result"] for stage in summary["stages"]}
    assert list(results) == [
        "build",
        "info",
        "smoke",
        "benchmark of loss",
        "benchmark of upsample",
        "benchmark of step",
        "tests of the GPU",
        "tests of its backends",
        "sanitizer none",
        "benchmark of sweep",
        "other tests",
    ]
    assert results.pop("build") == "skipped"
    assert results.pop("tests of the GPU") in ("skipped", "ok")  # as there is one, or not
    assert set(results.values()) == {"ok"}, ran.stdout
    passed = {stage["name"]: re.search(r"(\d+) passed", stage["why"]) for stage in summary["stages"]}
    for name in ("smoke", "tests of its backends", "sanitizer none", "other tests"):
        assert int(passed[name].group(1)) > 0
    assert summary["dry_run"] and not summary["failed"]
    assert summary["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    cases = [
        case
        for name in ("loss", "upsample", "step", "sweep")
        for case in json.loads((tmp_path / f"{name}.json").read_text())["cases"]
    ]
    assert len(cases) == 2 + 2 + 1 + 1
    assert [case["input"] for case in summary["cases"]] == [case["input"] for case in cases]
    assert {file.name for file in tmp_path.iterdir()} == set(gpu_check.PRODUCTS)
    *_, table = ran.stdout.split("DRY RUN on the CPU")
    for name in results:
        assert re.search(rf"^{name} +ok ", table, re.M)


def test_a_stage_that_fails_stops_no_other(tmp_path, capsys):
    broken = python("broken", "import sys; print('so it goes'); sys.exit(3)")
    crashed = python("crashed", "import os; os.abort()")
    absent = Stage("absent", ["/no/such/program"], 30)
    check, summary = run(tmp_path, [broken], [crashed, absent], [python("next", "print('fine')")])
    assert [(stage["name"], stage["result"], stage["why"]) for stage in summary["stages"]] == [
        ("broken", "failed", "exit code 3"),
        ("crashed", "failed", "signal SIGABRT"),
        ("absent", "failed", "[Errno 2] No such file or directory: '/no/such/program'"),
        ("next", "ok", "fine"),
    ]
    assert check.failed and summary["failed"]
    check.show()
    shown = capsys.readouterr().out
    assert "----- broken failed, exit code 3:\nso it goes" in shown
    assert shown.index("so it goes") < shown.index("DRY RUN") < shown.index("next  ")
    assert "so it goes" in (tmp_path / "log.txt").read_text()


def test_a_stage_over_its_time_is_killed_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    code = f"""
import os, subprocess, time
child = subprocess.Popen(["sleep", "300"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
print("about to hang", flush=True)
time.sleep(300)
"""
    start = time.monotonic()
    _, summary = run(tmp_path / "out", [python("hangs", code, 4)], [python("next", "")])
    assert time.monotonic() - start < 30
    hangs, after = summary["stages"]
    assert (hangs["result"], hangs["why"], hangs["tail"]) == ("timed out", "after 4 s", "about to hang")
    assert after["result"] == "ok"
    assert all(ends(int(pid)) for pid in pids.read_text().split())


def test_a_stage_leaves_nothing_running(tmp_path):
    pid = tmp_path / "pid"
    code = f"import subprocess as s; open({str(pid)!r}, 'w').write(str(s.Popen(['sleep', '300']).pid))"
    _, summary = run(tmp_path / "out", [python("leaves a child", code)])
    assert summary["stages"][0]["result"] == "ok"
    assert ends(int(pid.read_text()))


def test_stages_of_a_group_run_side_by_side(tmp_path):
    """Each waits for a file that the other writes."""
    meet = """
import time
from pathlib import Path
Path({!r}).touch()
while not Path({!r}).exists():
    time.sleep(0.01)
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    _, summary = run(tmp_path / "out", [python("one", meet.format(a, b)), python("two", meet.format(b, a))])
    assert [stage["result"] for stage in summary["stages"]] == ["ok", "ok"]


def test_what_is_missing_is_named(tmp_path):
    check, summary = run(
        tmp_path,
        [
            python("modules", "", modules=["json", "no_such_module"]),
            python("programs", "", programs=["no-such-program"]),
            python("nothing to do", "", skip="done already"),
        ],
    )
    assert [(stage["result"], stage["why"]) for stage in summary["stages"]] == [
        ("skipped", "no no_such_module here"),
        ("skipped", "no no-such-program here"),
        ("skipped", "done already"),
    ]
    assert not check.failed


def test_no_stage_runs_past_the_end(tmp_path):
    start = time.monotonic()
    groups = [python("long", "import time; time.sleep(300)", 200)], [python("late", "")]
    _, summary = run(tmp_path, *groups, total=4)
    assert time.monotonic() - start < 30
    long, late = summary["stages"]
    assert long["result"] == "timed out"
    assert (late["result"], late["why"]) == ("skipped", "no time left")


def test_old_results_do_not_pass_for_new_ones(tmp_path):
    (tmp_path / "loss.json").write_text('{"cases": [{"input": "of yesterday"}]}')
    _, summary = run(tmp_path, [python("benchmark", "raise SystemExit(1)")])
    assert summary["cases"] == [] and not (tmp_path / "loss.json").exists()


def test_a_long_log_keeps_both_ends():
    log = b"begin" + b"x" * 3 * gpu_check.LOG_BYTES + b"end"
    short = gpu_check.shortened(log)
    assert short.startswith(b"begin") and short.endswith(b"end")
    assert len(short) < gpu_check.LOG_BYTES + 100
    assert gpu_check.shortened(b"short") == b"short"


def test_figures_are_in_the_summary(tmp_path, capsys):
    goal = dict(what="a / b", bound=3, at_least=True, measured=2.5, as_graph=None, reached=False)
    clocks = {"clocks.sm": "1980", "clocks.mem": "3201"}
    case = dict(input="1x19x4x8 bfloat16 on cuda", labels="CamVid", gpu_before=clocks, gpu_after=clocks)
    text = json.dumps({"cases": [case | {"goals": [goal]}]})
    write = f"open({str(tmp_path / 'loss.json')!r}, 'w').write({text!r})"
    check, summary = run(tmp_path, [python("benchmark", write)])
    assert summary["cases"] == [case | {"goals": [goal]}]
    check.show()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "1x19x4x8 bfloat16 on cuda, CamVid labels" in lines
    assert "gpu_after: clocks.sm 1980, clocks.mem 3201" in lines
    assert "NO a / b >= 3 2.50 (as a graph -)" in lines


def test_what_the_gpu_is_asked_exists(tmp_path):
    """Each selection of tests finds some; the names of backends that are not there do no harm."""
    groups = gpu_check.plan(["cuda", "triton", "no_such_backend"], tmp_path)
    stages = {stage.name: stage for group in groups for stage in group}
    assert set(stages) > {f"sanitizer {tool}" for tool in gpu_check.SANITIZERS}
    collected = []
    for name in ("smoke", "tests of the GPU", "tests of its backends", "sanitizer racecheck"):
        command = list(stages[name].command)
        own = command[command.index(sys.executable) :]
        listing = [*own, "--collect-only", "-p", "no:xdist"]
        if "-n" in listing:
            del listing[listing.index("-n") : listing.index("-n") + 2]
        collected.append(replace(stages[name], command=listing, programs=[], seconds=200))
    _, summary = run(tmp_path, collected, total=200)
    for stage in summary["stages"]:
        assert stage["result"] == "ok", stage
        assert int(re.search(r"^(\d+)(?:/\d+)? tests collected", stage["why"]).group(1)) > 0, stage
    command = stages["sanitizer initcheck"].command
    assert command[:3] == ["compute-sanitizer", "--tool", "initcheck"]
    assert stages["sanitizer initcheck"].env["IAL_UNPOISONED"] == "1"


def test_the_build_is_for_the_gpu_that_is_there():
    stage = gpu_check.build("9.0")
    assert stage.env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert stage.env["IAL_CUDA_FORCE_CPU"] == "0" and stage.env["IAL_CUDA_REQUIRE_EXT"] == "1"
    assert stage.why_not() is None, "even where an extension lies there, which may be one without CUDA"


def test_the_makefile_starts_it_without_an_environment(tmp_path):
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make")
    command = [make, "-n", "--no-print-directory", "gpu-check", "PYTHON=some-python", "VENV=/nowhere"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["some-python", "-m", "benchmarks.gpu_check", "--output", str(tmp_path)]
