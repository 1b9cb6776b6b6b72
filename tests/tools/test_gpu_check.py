"""`make gpu-check` and `make gpu-bench`: dry runs, stages that fail or hang, planted errors, chosen tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import simt

gpu_check = pytest.importorskip("tools.gpu_check", reason="needs python -m pytest in the checkout")
from ial_cuda import backends  # noqa: E402
from tools import stages  # noqa: E402  (which needs the same)

Stage = stages.Stage

ROOT = Path(__file__).resolve().parents[2]
H100, NO_GPU = (gpu_check.Found(capability, "2.11.0+cu130", "13.0") for capability in ("9.0", None))


def python(name: str, code: str, seconds: float = 600, **more) -> Stage:
    return Stage(name, [sys.executable, "-c", code], seconds, **more)


@pytest.fixture
def jump(monkeypatch):
    """``jump(seconds, when)``: the clock of the stages shows 0 until an event, then jumps and goes on.

    So what is to be interrupted has begun, however long a slow machine takes to start it.
    """

    def replace_clock(seconds: float, when: Callable[[], bool]) -> None:
        jumped = []

        def monotonic() -> float:
            if not jumped and when():
                jumped.append(time.monotonic())
            return seconds + time.monotonic() - jumped[0] if jumped else 0.0

        clock = SimpleNamespace(monotonic=monotonic, sleep=time.sleep, time=time.time)
        monkeypatch.setattr(stages, "time", clock)

    return replace_clock


def run(output: Path, *groups: list[Stage], total: float = 1200) -> tuple[stages.Check, dict]:
    check = stages.Check(output, "archive", total=total)
    for group in groups:
        check.run(group)
    return check, json.loads((output / "summary.json").read_text())


def ends(pid: int) -> bool:
    """Whether the process is gone within a minute; a killed one that nobody has waited for yet is."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(1200):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def built():
    for module in ("matplotlib", "rich", "PIL"):
        pytest.importorskip(module)
    if not gpu_check.is_built(gpu_check.probe()._replace(capability=None)):
        pytest.skip("the extension is missing or older than its sources: it would be built")
    simt.load()


@pytest.mark.parametrize(
    ("what", "chosen"), [("check", None), ("bench", None), ("bench", ["info", "upsample"])]
)
def test_a_dry_run(what, chosen, tmp_path, built):
    command = [sys.executable, "-m", "tools.gpu_check", what, "--dry-run", "--output", tmp_path]
    command += ["--stages", *chosen] if chosen else []
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    results = {stage["name"]: stage["result"] for stage in summary["stages"]}
    assert list(results) == list(chosen or gpu_check.STAGES[what])
    skipped = {"build", "racecheck", "initcheck", "synccheck"}
    if what == "check" and results["triton"] == "skipped":
        skipped.add("triton")  # not every Triton can be interpreted
    assert results == {name: "skipped" if name in skipped else "ok" for name in results}, ran.stdout
    for stage in summary["stages"]:
        if stage["name"] in ("smoke", "cuda", "memcheck"):
            assert int(re.search(r"(\d+) passed", stage["why"])[1]) > 0
    assert summary["dry_run"] and not summary["failed"]
    assert summary["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy", "setuptools", "gcc"} <= set(summary["machine"])
    *_, table = ran.stdout.split("stage  ")
    for name, result in results.items():
        assert re.search(rf"^{name} +{result} ", table, re.M)
    assert "DRY RUN on the CPU" in table

    programs = [name for name in results if name in gpu_check.BENCHMARKS]
    archive = tmp_path / f"gpu-{what}.tar.gz"
    files = {file.name for file in tmp_path.iterdir()} - {"logs", archive.name}
    assert files >= {"summary.json", "log.txt", "machine.json", *(f"{name}.json" for name in programs)}
    assert any(name.endswith(".png") for name in files) == bool(programs)
    with tarfile.open(archive) as everything:
        names = set(everything.getnames())
        kept = json.load(everything.extractfile(f"gpu-{what}/summary.json"))
    logs = {f"logs/{name}.txt" for name in results if name not in skipped or name == "triton"}
    assert names == {f"gpu-{what}/{name}" for name in (*files, *logs)}
    assert kept["stages"] == summary["stages"]
    results_of = {name: json.loads((tmp_path / f"{name}.json").read_text())["cases"] for name in programs}
    assert all(results_of.values())
    cases = [case["input"] for found in results_of.values() for case in found]
    assert [case["input"] for case in summary["cases"]] == cases
    for case in summary["cases"]:
        assert case["ours"][0]["median_ms"] > 0 and case["fastest_peer"]["ratio"] > 0 and not case["failed"]


def test_a_stage_that_fails_stops_no_other(tmp_path, capsys):
    broken = python("broken", "import sys; print('broken output'); sys.exit(3)")
    crashed = python("crashed", "import os; os.abort()")
    absent = Stage("absent", ["/no/such/program"], 600)
    check, summary = run(tmp_path, [broken], [crashed, absent], [python("next", "print('fine')")])
    assert [(stage["name"], stage["result"], stage["why"]) for stage in summary["stages"]] == [
        ("broken", "failed", "exit code 3: broken output"),
        ("crashed", "failed", "signal SIGABRT: "),
        ("absent", "failed", "[Errno 2] No such file or directory: '/no/such/program'"),
        ("next", "ok", "fine"),
    ]
    assert check.failed and summary["failed"]
    check.show()
    shown = capsys.readouterr().out
    assert "----- broken failed, exit code 3: broken output:\nbroken output" in shown
    assert shown.index("broken output") < shown.index("next  ")
    assert "broken output" in (tmp_path / "log.txt").read_text()


def test_a_stage_over_its_time_is_interrupted_then_killed_with_its_children(tmp_path, monkeypatch, jump):
    monkeypatch.setattr(stages, "GRACE", 5)
    pids, polite_runs = tmp_path / "pids", tmp_path / "polite"
    code = f"""
import os, signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"])
print("about to hang", flush=True)
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(300)
"""
    polite = f"""
import pathlib, time
try:
    pathlib.Path({str(polite_runs)!r}).touch()
    time.sleep(300)
except KeyboardInterrupt:
    print("interrupted")
"""
    jump(4, lambda: pids.exists() and pids.read_text() and polite_runs.exists())
    child = f"import subprocess as s; open({str(pids)!r}, 'a').write(f\" {{s.Popen(['sleep', '300']).pid}}\")"
    group = [python("hangs", code, 4), python("polite", polite, 4)]
    _, summary = run(tmp_path / "out", group, [python("leaves a child", child)])
    hangs, other, after = summary["stages"]
    assert (hangs["result"], hangs["tail"]) == ("timed out", "about to hang")
    assert int(re.fullmatch(r"after (\d+) s, killed: about to hang", hangs["why"])[1]) >= 4
    assert other["result"] == "timed out"
    assert int(re.fullmatch(r"after (\d+) s: interrupted", other["why"])[1]) >= 4
    assert after["result"] == "ok"
    pids = pids.read_text().split()
    assert len(pids) == 3 and all(ends(int(pid)) for pid in pids)


CUT_OFF = """
import signal, sys
from pathlib import Path
from tools import stages

signal.signal(signal.{signal}, lambda *_: sys.exit(1))
code = "import time\\ntry: print('so far', flush=True); time.sleep(300)\\n"
code += "except KeyboardInterrupt: print('end')"
check = stages.Check(Path({folder!r}), "archive", total=1200)
check.run([stages.Stage("done", [sys.executable, "-c", "print('done')"], 600)])
check.run([stages.Stage("long", [sys.executable, "-c", code], 600)])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=str)
def test_what_is_cut_off_leaves_what_there_was(number, tmp_path):
    code = CUT_OFF.format(signal=number.name, folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "logs" / "long.txt"
    for _ in range(12000):
        if log.exists() and "so far" in log.read_text():
            break
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(600) == 1
    with tarfile.open(tmp_path / "archive.tar.gz") as archive:
        summary = json.load(archive.extractfile("archive/summary.json"))
        assert archive.extractfile("archive/logs/long.txt").read() == b"so far\nend\n"
    done, long = summary["stages"]
    assert done["result"] == "ok" and summary["failed"]
    assert long["result"] == "cut off" and long["why"].endswith(" s: end")


def test_results_are_written_while_a_stage_runs(tmp_path, monkeypatch):
    """With a summary that names it, for a program that is killed."""
    monkeypatch.setattr(stages, "WRITE_EVERY", 0.1)
    look = f"""
import json, time
from pathlib import Path
while not Path({str(tmp_path / "summary.json")!r}).exists():
    time.sleep(0.05)
print(json.loads(Path({str(tmp_path / "summary.json")!r}).read_text())["stages"][0]["result"])
"""
    _, summary = run(tmp_path, [python("look", look)])
    assert (tmp_path / "logs" / "look.txt").read_text() == "running\n"
    assert summary["stages"][0]["result"] == "ok"


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
    modules = python("modules", "", modules=["json", "no_such_module"])
    programs = python("programs", "", programs=["no-such-program"])
    check, summary = run(tmp_path, [modules, programs, python("nothing to do", "", skip="done already")])
    assert {stage["result"] for stage in summary["stages"]} == {"skipped"} and not check.failed
    reasons = [stage["why"] for stage in summary["stages"]]
    assert reasons == ["no no_such_module here", "no no-such-program here", "done already"]


def test_no_stage_runs_past_the_end(tmp_path, monkeypatch, jump):
    """Not even one that ignores its interruption."""
    monkeypatch.setattr(stages, "GRACE", 2)
    runs = tmp_path / "runs"
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    stubborn += f"open({str(runs)!r}, 'w'); time.sleep(300)"
    jump(98, runs.exists)
    _, summary = run(tmp_path / "out", [python("long", stubborn, 200)], [python("late", "")], total=100)
    long, late = summary["stages"]
    assert long["result"] == "timed out"
    assert int(re.fullmatch(r"after (\d+) s, killed: ", long["why"])[1]) >= 98
    assert 100 <= long["seconds"] < 300
    assert (late["result"], late["why"]) == ("skipped", "no time left")


def test_old_results_stay_but_are_not_archived(tmp_path):
    (tmp_path / "logs").mkdir()
    replaced = [
        tmp_path / name for name in ("archive.tar.gz", "log.txt", "logs/yesterday.txt", "summary.json")
    ]
    other, again = tmp_path / "other.json", tmp_path / "again.png"
    for file in [*replaced, other, again]:
        file.write_text("of yesterday")
    check = stages.Check(tmp_path, "archive", total=1200)
    assert not any(file.exists() for file in replaced) and check.products() == []
    check.run([python("again", f"open({str(again)!r}, 'w').write('of today')")])
    assert check.products() == ["again.png"] and other.exists()
    with tarfile.open(tmp_path / "archive.tar.gz") as archive:
        assert "archive/again.png" in archive.getnames() and "archive/other.json" not in archive.getnames()


def test_the_archive_has_everything_that_there_is_while_the_next_stage_runs(tmp_path):
    long = f"print('x' * {2 * stages.LOG_CHARACTERS}); open({str(tmp_path / 'product.json')!r}, 'w')"
    look = f"import tarfile; print(sorted(tarfile.open({str(tmp_path / 'archive.tar.gz')!r}).getnames()))"
    run(tmp_path, [python("long", long)], [python("look", look)])
    with tarfile.open(tmp_path / "archive.tar.gz") as archive:
        assert archive.getmember("archive/logs/long.txt").size == 2 * stages.LOG_CHARACTERS + 1
        assert archive.getmember("archive/log.txt").size < 2 * stages.LOG_CHARACTERS
    log = (tmp_path / "logs" / "look.txt").read_text()
    names = ("log.txt", "logs/long.txt", "product.json", "summary.json")
    assert log.strip() == str([f"archive/{name}" for name in names])


def test_a_long_text_keeps_both_ends():
    short = stages.shortened("begin" + "x" * 300 + "end", 100)
    assert short.startswith("begin") and short.endswith("end") and len(short) < 110
    assert stages.shortened("short", 100) == "short"


def test_figures_are_in_the_summary(tmp_path, capsys):
    clocks = {"clocks.sm": "1980", "clocks.mem": "3201"}
    row = dict.fromkeys(["graph_ms", "ratio", "copy_percent", "extra_mib", "failed"])
    rows = [
        dict(
            name="ial_cuda cuda", median_ms=0.1234, graph_ms=0.1, copy_percent=81.6, extra_mib=0.0, ratio=1.0
        ),
        dict(name="ial_cuda triton", median_ms=None, failed="gradient errs by up to nan"),
        dict(name="slow", median_ms=0.9, ratio=9.0),
        dict(name="fast", median_ms=0.2, ratio=1.62),
        dict(name="memory floor", median_ms=0.1),
    ]
    case = dict(input="IAL, 1x19x4x8 bfloat16 on cuda", labels="CamVid", gpu_before=clocks, gpu_after={})
    text = json.dumps({"cases": [case | {"providers": [row | each for each in rows]}]})
    report = gpu_check.Report(tmp_path, "gpu-bench", total=1200)
    report.run([python("loss", f"open({str(tmp_path / 'loss.json')!r}, 'w').write({text!r})")])
    (found,) = json.loads((tmp_path / "summary.json").read_text())["cases"]
    assert found["fastest_peer"] == {"name": "fast", "median_ms": 0.2, "ratio": 1.62}
    report.show()
    shown = capsys.readouterr().out
    assert (
        """
IAL, 1x19x4x8 bfloat16 on cuda, CamVid labels
  gpu_before: clocks.sm 1980, clocks.mem 3201
  ial_cuda cuda: 0.123 ms, graph 0.100 ms, 82 % of the copy's speed, extra 0.0 MiB
  ial_cuda triton: not timed
  fastest peer: fast: 0.200 ms, 1.62 times ial_cuda cuda
  FAILED: ial_cuda triton: gradient errs by up to nan
"""
        in shown
    )


@pytest.mark.parametrize("text", ["{", '{"cases": [{}]}'], ids=["incomplete", "without figures"])
def test_a_strange_result_stops_nothing(text, tmp_path):
    report = gpu_check.Report(tmp_path, "gpu-bench", total=1200)
    report.run([python("loss", f"open({str(tmp_path / 'loss.json')!r}, 'w').write({text!r})")])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stages"][0]["result"] == "ok" and not any(case["ours"] for case in summary["cases"])


@pytest.mark.parametrize("hidden", [False, True])
def test_a_gpu_that_torch_does_not_see_is_no_dry_run(hidden, monkeypatch):
    answers = subprocess.CompletedProcess([], 0, json.dumps(NO_GPU), "the driver is too old")
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: answers)
    monkeypatch.setattr(gpu_check, "first_match", lambda *_: "GPU 0: NVIDIA H100")
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert gpu_check.probe() == NO_GPU
        return
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit, match="does not see GPU 0: NVIDIA H100:\nthe driver is too old"):
        gpu_check.probe()


# ---- planted errors -------------------------------------------------------------------------------------


def planted(name: str, folder: Path, code: str, seconds: float = 600, workers: int = 0) -> Stage:
    """Tests as a stage runs them, with tests/gpu_process.py."""
    file = folder / f"test_{name}.py"
    file.write_text(code)
    arguments = [str(file), "--rootdir", str(folder), "-p", "gpu_process"]
    return gpu_check.tests(name, arguments, seconds, workers=workers, env={"PYTHONPATH": str(ROOT / "tests")})


LOST = """
import sys, types
import pytest

class Cuda:
    lost = False
    def is_initialized(self):
        return True
    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

cuda = Cuda()
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_before():
    pass

@pytest.mark.parametrize("number", range({times}))
def test_that_loses_it(number):
    cuda.lost = True

@pytest.mark.parametrize("number", range(8))
def test_after(number):
    assert not cuda.lost
"""
UNUSED = """
import sys, types
def test_without_torch():
    pass
def test_torch_is_not_loaded():
    assert "torch" not in sys.modules
    def fail():
        raise RuntimeError("CUDA must not be initialised for this")
    sys.modules["torch"] = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_initialized=lambda: False, synchronize=fail)
    )
"""


def test_a_lost_context_fails_one_test_only(tmp_path, monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setattr(gpu_check, "MOST_RESTARTS", 8)
    times = {"workers": 1, "several": 4, "endless": 12}
    group = [planted(name, tmp_path, LOST.format(times=n), workers=2) for name, n in times.items()]
    group += [planted("alone", tmp_path, LOST.format(times=1)), planted("unused", tmp_path, UNUSED)]
    _, summary = run(tmp_path, group)
    workers, several, endless, alone, unused = summary["stages"]
    said = "the CUDA context is lost: RuntimeError: CUDA error: an illegal memory access was encountered"
    for stage, times in ((workers, 1), (several, 4)):
        # the test passes, its teardown is an error, and its worker's end a failure
        assert f"exit code 1: {times} failed, {9 + times} passed, {times} error" in stage["why"], stage
        assert stage["tail"].count(f"\n{said}\n") == times
        assert re.search(r"^_+ ERROR at teardown of test_that_loses_it\[0\] _+$", stage["tail"], re.M)
    assert "maximum crashed workers reached: 8" in endless["tail"]
    assert "exit code 2: 2 passed, 1 error" in alone["why"]
    assert said in alone["tail"]
    assert "Interrupted: the CUDA context is lost after test_alone.py::test_that_loses_it[0]" in alone["tail"]
    assert unused["result"] == "ok", unused["tail"]


HANG = """
import ctypes, os, pathlib, signal, time
import pytest

@pytest.fixture
def slow_teardown():
    yield
    time.sleep(1)

def test_passes():
    pass

def test_fails():
    assert 1 == 2

def test_hangs(slow_teardown):
    pathlib.Path(f"{__file__}.{os.getpid()}.hangs").write_text(str(signal.getsignal(signal.SIGINT)))
    time.sleep(300)
"""
# As in a kernel that never ends: no handler of Python's is called.
HANG_IN_C = HANG.replace(
    "    time.sleep(300)",
    "    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)\n"
    "    libc.pthread_mutex_lock(lock)\n"
    "    libc.pthread_mutex_lock(lock)",
)
# As compute-sanitizer is one: between the stage and its tests, and it may end before them.
WRAPPER = """
import signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGINT, signal.SIG_DFL)
child.wait()
"""


def test_a_hang_leaves_the_failures_before_it(tmp_path, monkeypatch, jump):
    pytest.importorskip("xdist")
    monkeypatch.setattr(stages, "GRACE", 60)  # the failures take a second or two, more if a machine stalls
    alone = planted("alone", tmp_path, HANG, 12)
    command = [sys.executable, "-c", WRAPPER, *alone.command]
    in_c = planted("in_c", tmp_path, HANG_IN_C, 12, workers=2)
    group = [alone, replace(alone, name="wrapped", command=command)]
    group += [planted("workers", tmp_path, HANG, 12, workers=2), in_c]
    if "faulthandler_exit_on_timeout=true" in in_c.command:
        at_once = [re.sub("timeout=150", "timeout=10", part) for part in in_c.command]
        group.append(replace(in_c, name="replaced", command=at_once, seconds=600))

    def all_hang() -> bool:
        reported = [file.read_text() for file in tmp_path.glob("logs/*.txt")]
        ready = sum("PASSED" in text and "FAILED" in text for text in reported)
        return ready == len(list(tmp_path.glob("*.hangs"))) == len(group)

    jump(12, all_hang)
    _, summary = run(tmp_path, group)
    for stage in summary["stages"]:
        if stage["name"] == "replaced":  # the test that hangs is ended, and the stage goes on to its end
            assert stage["why"].startswith("exit code 1: 2 failed, 1 passed"), stage
            assert "crashed while running 'test_in_c.py::test_hangs'" in stage["tail"]
            assert re.search(r'File ".*test_in_c.py", line \d+ in test_hangs', stage["tail"])
        else:
            assert stage["result"] == "timed out"
            assert int(re.match(r"after (\d+) s: 1 failed, 1 passed", stage["why"])[1]) >= 12, stage
        for line in (r"=+ FAILURES =+", r"E   assert 1 == 2", r".*::test_hangs .*"):
            assert re.search(f"^{line}$", stage["tail"], re.M), stage
        assert "PASSED" not in stage["tail"]
    # The default action ends a worker at once. pytest-xdist does so only after the real GRACE.
    workers = [file for name in ("workers", "in_c") for file in tmp_path.glob(f"test_{name}.py.*.hangs")]
    assert {file.read_text() for file in workers} == {str(signal.SIG_DFL)}


# ---- what the plans choose ------------------------------------------------------------------------------

PRETENDS = """
import json, os
import torch
torch.cuda.is_available = lambda: True

def pytest_collection_finish(session):
    import cases, conftest
    found = {}
    for item in session.items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        found[item.nodeid] = [sorted(conftest.backends_of(item)), "backend" in parameters]
    with open(os.environ["COLLECTED"], "w") as file:
        json.dump({"emulated": cases.EMULATED, "found": found}, file)
"""


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """By stage of the real plan, the tests that it chooses where there seems to be a GPU."""
    folder = tmp_path_factory.mktemp("selected")
    (folder / "pretends.py").write_text(PRETENDS)
    commands = {stage.name: stage for group in gpu_check.plan("check", H100, folder) for stage in group}
    collecting = []
    for name in ("smoke", "cuda", "triton", "memcheck"):
        command = list(commands[name].command)
        own = command[command.index(sys.executable) :]
        more = ["--collect-only", "-p", "pretends"] + ["-n0"] * ("-n" in own)
        env = {"PYTHONPATH": str(folder), "COLLECTED": str(folder / f"{name}.json")}
        env["TRITON_INTERPRET"] = "0"  # this process, which has no GPU, may have set it
        collecting.append(replace(commands[name], command=[*own, *more], env=env, seconds=200, programs=[]))
    _, summary = run(folder / "out", collecting, total=200)
    assert [stage["result"] for stage in summary["stages"]] == ["ok"] * 4, summary["stages"]
    return {stage.name: json.loads((folder / f"{stage.name}.json").read_text()) for stage in collecting}


def test_each_stage_chooses_tests_of_its_backends_alone(selected):
    ways = {"cuda_two_launches", "cuda_one_launch"}
    backends = {"smoke": ways | {"triton"}, "cuda": ways, "triton": {"triton"}}
    backends["memcheck"] = ways
    for name, tests in selected.items():
        assert tests["emulated"] == ["simt", "simt_one_launch"], "Triton is not interpreted"
        seen = Counter(
            backend for chosen, parametrised in tests["found"].values() if parametrised for backend in chosen
        )
        assert set(seen) == backends[name], (name, seen)
        assert min(seen.values()) > 5, (name, seen)
        for test, (chosen, _) in tests["found"].items():
            assert set(chosen) <= backends[name], test


def test_tests_of_a_gpu_that_have_no_backend_are_chosen_by_their_marker(selected):
    marked = {
        name: {test.split("[")[0] for test, (_, parametrised) in tests["found"].items() if not parametrised}
        for name, tests in selected.items()
    }
    assert marked["smoke"] == marked["memcheck"] == set()
    files = {name: {test.partition("::")[0] for test in tests} for name, tests in marked.items()}
    # tests/test_nvcc.py has tests only where nvcc built the extension
    assert {Path(file).parent.name for file in files["cuda"] - {"tests/test_nvcc.py"}} == {"benchmarks"}
    assert files["triton"] <= {"tests/test_triton.py"}


def test_an_unknown_backend_is_a_usage_error():
    command = [sys.executable, "-m", "pytest", "--backends=cuda,simt_fussed", "tests/test_loss.py"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert re.search("--backends has 'simt_fussed', expected some of cpu, .*simt_one_launch", ran.stderr)


@pytest.mark.parametrize("what", gpu_check.STAGES)
def test_the_plans_have_the_stages_that_can_be_chosen(what, tmp_path):
    names = [stage.name for group in gpu_check.plan(what, H100, tmp_path) for stage in group]
    assert names == list(gpu_check.STAGES[what])  # the dry runs check the plan without a GPU


def test_an_unknown_stage_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["check", "--stages", "cuda", "loss"])
    assert error.value.code == 2
    assert "--stages has 'loss', expected some of build, info, smoke, cuda, triton" in capsys.readouterr().err


def test_what_python_lacks_is_named_before_anything_runs(monkeypatch, tmp_path):
    has = dict.fromkeys(gpu_check.REQUIRED, "99.0") | {"setuptools": "68.1.2", "pytest": None}
    monkeypatch.setattr(gpu_check, "installed", has.get)
    monkeypatch.setattr(gpu_check, "probe", lambda: pytest.fail("has begun"))
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["check", "--output", str(tmp_path / "none")])
    pytest_line, setuptools_line = error.value.code.splitlines()
    assert pytest_line.startswith(f"{sys.executable} has no pytest, expected 8 or newer: ")
    assert "has setuptools 68.1.2, expected 77 or newer: " in setuptools_line
    assert setuptools_line.endswith(f"{sys.executable} -m pip install 'setuptools>=77'")
    assert not (tmp_path / "none").exists()


# ---- single stages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_option", [True, False])
def test_memcheck_goes_on_after_an_error(has_option, monkeypatch):
    monkeypatch.setattr(gpu_check, "first_match", lambda *_: has_option or None)
    for tool in gpu_check.SANITIZERS:
        stage = gpu_check.sanitized(tool, ["--backends=cuda"])
        assert stage.command[:3] == ["compute-sanitizer", "--tool", tool]
        assert ("--destroy-on-device-error" in stage.command) == (has_option and tool == "memcheck")
        assert stage.env["IAL_UNPOISONED"] == "1"


def test_info_needs_no_package_of_the_benchmarks(tmp_path):
    for name in ("rich", "matplotlib", "torchmetrics", "PIL"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not there')")
    stage = replace(gpu_check.info(NO_GPU, tmp_path), env={"PYTHONPATH": str(tmp_path)})
    _, summary = run(tmp_path / "out", [stage])
    assert (tmp_path / "machine.json").exists(), summary["stages"]


def test_the_build_is_for_the_gpu_that_is_there():
    stage = gpu_check.build(H100)
    assert stage.env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert stage.env["IAL_CUDA_FORCE_CPU"] == "0" and stage.env["IAL_CUDA_PURE_PYTHON"] == "0"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"arch_list": ["8.0", "9.0"]}, True),
        ({"arch_list": ["8.0+PTX"]}, False),
        ({"arch_list": [], "cuda": None}, False),
        ({"torch": "2.12.0+cu130"}, False),
        ({"torch_cuda": "12.8"}, False),
        ({"suffix": ".cpython-39-x86_64-linux-gnu.so"}, False),
        ({"age": 10**9}, False),
        ({"record": ""}, False),
        ({"record": '{"torch": '}, False),
        ({"loads": False}, False),
    ],
    ids=str,
)
def test_a_build_that_fits_is_kept(change, expected, tmp_path, monkeypatch):
    record = {"torch": H100.torch, "torch_cuda": "13.0", "cuda": "13.0", "arch_list": ["9.0+PTX"]} | change
    loads = record.pop("loads", True)
    monkeypatch.setattr(gpu_check, "loads", lambda found: loads)
    extension = tmp_path / f"_C{record.pop('suffix', sysconfig.get_config_var('EXT_SUFFIX'))}"
    extension.touch()
    built = time.time() - record.pop("age", 0)
    os.utime(extension, (built, built))
    text = record.pop("record", None)
    (tmp_path / "_build.json").write_text(json.dumps(record) if text is None else text)
    assert gpu_check.is_built(H100, tmp_path) == expected


def test_an_extension_without_the_kernels_does_not_load():
    for device, found in (("cpu", H100._replace(capability=None)), ("cuda", H100)):
        assert gpu_check.loads(found) == (backends.get(device).missing is None)


@pytest.mark.parametrize("what", gpu_check.STAGES)
def test_the_makefile_starts_it_without_an_environment(what, tmp_path):
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make")
    options = ["PYTHON=some-python", "VENV=/nowhere", f"OUT={tmp_path}"]
    command = [make, "-n", "--no-print-directory", f"gpu-{what}", *options]
    shown = subprocess.check_output(command, cwd=ROOT, text=True)
    assert shown == f"some-python -m tools.gpu_check {what} --output {tmp_path}\n"
