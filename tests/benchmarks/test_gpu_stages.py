"""Invariants of benchmarks/gpu_stages.py, with small stages in the place of the real ones, and of
the plan (gpu_plan.py):

- A stage that raises, exceeds its limit or leaves no figures is named, ends with all processes it
  began, and does not keep the others from running; the exit code says so.
- A stage that has passed is not run again, unless asked for, or the code, torch or what it made has
  changed. One that failed, was killed or had no time left is. None outlives the runner.
- What a stage lacks leaves it out on a GPU and fails a rehearsal.
- Every option of a real stage is one that its script accepts, on both devices; limits leave two
  calls of less than ten minutes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import calibration
import gpu_four_bit
import gpu_kernels
import gpu_plan
import gpu_smoke
import gpu_stages
import measuring
import pytest
import quality
import step
import step_profile
from tiny_benchmark import BENCHMARKS, ENVIRONMENT

FACTS = {"device": "cpu", "code": "one", "torch": "2.11.0"}


def stage(name: str, code: str, **more) -> gpu_plan.Stage:
    """A stage that runs Python source, which finds its folder in sys.argv[1]."""
    fields = {"seconds": 60, "usual": 0}
    fields["command"] = lambda device, folder, seconds: ["-c", code, str(folder)]
    return gpu_plan.Stage(name=name, **fields | more)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Return a function that runs stages; it returns the exit code and the lines printed."""

    def call_(stages, *arguments: str, **facts):
        monkeypatch.setattr(gpu_stages, "STAGES", stages)
        monkeypatch.setattr(gpu_stages, "machine_facts", lambda: {**FACTS, **facts})
        code = gpu_stages.main(["--device", "cpu", "--output", str(tmp_path), *arguments])
        return code, capsys.readouterr().out.splitlines()[1:-1]

    return call_


def verdict(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "verdict.json").read_text())


def test_a_verdict_says_what_came_of_a_stage(call, tmp_path):
    code, lines = call([stage("one", "print('first'); print('3 of 3')")])
    assert code == 0
    assert lines[0].startswith("one: passed in ")
    assert lines[0].endswith("s: 3 of 3")
    found = verdict(tmp_path, "one")
    assert (found["passed"], found["says"], found["torch"]) == (True, "3 of 3", "2.11.0")
    assert (tmp_path / "one" / "log.txt").read_text() == "first\n3 of 3\n"
    _, lines = call([stage("two", "print('log')", says=lambda folder: f"read {folder.name}")])
    assert lines[0].endswith("s: read two")


def test_a_stage_that_raises_does_not_stop_the_rest(call, tmp_path):
    stages = [stage("bad", "raise ValueError('no such thing')"), stage("good", "print('ok')")]
    code, lines = call(stages)
    assert code == 1
    assert "bad: FAILED in " in lines[0]
    assert lines[0].endswith("exit code 1; ValueError: no such thing")
    assert lines[1].endswith(": ok")
    assert not verdict(tmp_path, "bad")["passed"]


def test_a_stage_over_its_limit_ends_with_its_children(call, tmp_path, monkeypatch):
    source = (
        "import subprocess, sys, time; from pathlib import Path\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "Path(sys.argv[1], 'child').write_text(str(child.pid)); print('busy', flush=True)\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr(gpu_stages, "PATIENCE", {"cpu": 1})
    code, lines = call([stage("slow", source, seconds=3), stage("good", "print('ok')")])
    assert code == 1
    assert lines[0].endswith("exceeded 3 s; busy")
    assert lines[1].endswith(": ok")
    child = int((tmp_path / "slow" / "child").read_text())
    wait_until(lambda: not lives(child))


def lives(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition) -> None:
    """Processes start and end when the system comes to it; a minute is never needed."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def test_a_stage_that_leaves_no_figures_does_not_stop_the_rest(call):
    def says(folder: Path) -> str:
        return next(folder.glob("*/figures.json")).read_text()

    code, lines = call([stage("bare", "print('ok')", says=says), stage("good", "print('ok')")])
    assert code == 1
    assert lines[0].endswith("s: no verdict: StopIteration()")
    assert "bare: FAILED in " in lines[0]
    assert lines[1].endswith(": ok")


COUNTING = "import sys; open(sys.argv[1] + '/runs', 'a').write('x'); print('ok')"


def runs(folder: Path, name: str = "one") -> int:
    return len((folder / name / "runs").read_text())


def test_what_has_passed_is_not_run_again(call, tmp_path):
    stages = [stage("one", COUNTING)]
    call(stages)
    code, lines = call(stages)
    assert (code, lines, runs(tmp_path)) == (0, ["one: passed before"], 1)
    call(stages, "--again")
    assert runs(tmp_path) == 2
    call(stages, code="another")
    call(stages, code="another", torch="2.12.0")
    assert runs(tmp_path) == 4


def test_what_has_gone_is_made_again(call, tmp_path):
    """A machine that is new has the verdict of the last one, but not what that has made."""
    made = tmp_path / "made"
    source = COUNTING + f"; open({str(made)!r}, 'w')"
    stages = [stage("one", source, leaves=made.exists)]
    for _ in range(2):
        assert call(stages)[0] == 0
    assert runs(tmp_path) == 1
    made.unlink()
    call(stages)
    assert runs(tmp_path) == 2


@pytest.mark.parametrize("left", ["", "{", "[]", '{"passed": "yes", "code": "one"}'])
def test_what_is_no_verdict_is_run_again(call, tmp_path, left):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "verdict.json").write_text(left)
    assert call([stage("one", COUNTING)])[0] == 0
    assert runs(tmp_path) == 1


def test_what_failed_is_run_again(call, tmp_path):
    source = COUNTING + "; sys.exit(len(open(sys.argv[1] + '/runs').read()) < 2)"
    assert call([stage("one", source)])[0] == 1
    assert call([stage("one", source)])[0] == 0
    assert runs(tmp_path) == 2


@pytest.fixture
def script(tmp_path):
    """Return a function that starts a runner of some stages, by name and source, in a process."""
    paths = os.pathsep.join([str(BENCHMARKS), ENVIRONMENT["PYTHONPATH"]])

    def start(stages: dict[str, str]) -> subprocess.Popen:
        (tmp_path / "run.py").write_text(
            "import sys, gpu_plan, gpu_stages\n"
            "gpu_stages.STAGES = [gpu_plan.Stage(name, 600, 0, lambda device, folder, seconds, "
            f"c=c: ['-c', c, str(folder)]) for name, c in {stages!r}.items()]\n"
            f"gpu_stages.machine_facts = lambda: {FACTS!r}\n"
            "sys.exit(gpu_stages.main(['--device', 'cpu', '--output', sys.argv[1]]))\n"
        )
        command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "out")]
        environment = {**ENVIRONMENT, "PYTHONPATH": paths}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    return start


def test_killed_in_a_stage_a_call_goes_on_with_it(script, tmp_path):
    """The runner is killed by the second stage; the next call runs that and the third."""
    kill = COUNTING + (
        "; import os, signal; first = len(open(sys.argv[1] + '/runs').read()) == 1; "
        "first and os.kill(os.getppid(), signal.SIGKILL)"
    )
    stages = {"a": COUNTING, "b": kill, "c": COUNTING}
    assert [script(stages).wait() for _ in range(2)] == [-9, 0]
    assert [runs(tmp_path / "out", name) for name in "abc"] == [1, 2, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="a killed parent's children are told on Linux")
@pytest.mark.parametrize(("by", "code"), [("SIGTERM", 143), ("SIGINT", None), ("SIGKILL", -9)])
def test_no_stage_outlives_its_runner(script, tmp_path, by, code):
    source = (
        "import os, sys, time; from pathlib import Path\n"
        "Path(sys.argv[1], 'new').write_text(str(os.getpid()))\n"
        "os.rename(sys.argv[1] + '/new', sys.argv[1] + '/pid')\n"
        "time.sleep(600)"
    )
    runner = script({"slow": source})
    file = tmp_path / "out" / "slow" / "pid"
    wait_until(file.exists)
    runner.send_signal(getattr(signal, by))
    assert runner.wait() == code or (code is None and runner.returncode != 0)
    wait_until(lambda: not lives(int(file.read_text())))


def test_a_stage_without_time_is_left_for_the_next_call(call):
    code, lines = call([stage("one", "print('ok')", usual=30)], "--seconds", "29")
    assert code == 1
    assert lines == ["one: not begun, the call's time is used up; call again"]


def test_what_is_lacking_fails_a_rehearsal_alone(call, tmp_path):
    without = [stage("one", COUNTING, lacks=lambda: "no wheel was carried")]
    assert call(without) == (1, ["one: left out, no wheel was carried"])
    run = gpu_stages.Run(tmp_path, "cuda", deadline=time.monotonic() + 60, facts=FACTS)
    assert run.stage(without[0], again=False)
    assert not (tmp_path / "one").exists()


# The plan

PARSERS = {
    "step.py": step.parse,
    "step_profile.py": step_profile.parse,
    "calibration.py": calibration.parse,
    "quality.py": quality.parse,
    "gpu_smoke.py": gpu_smoke.parse,
    "gpu_kernels.py": lambda options: measuring.parse_gpu_stage(gpu_kernels.__doc__, options),
    "gpu_four_bit.py": lambda options: measuring.parse_gpu_stage(gpu_four_bit.__doc__, options),
}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_option_of_the_plan_is_accepted(device, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
    for folder in ("MODEL", "DATA"):
        monkeypatch.setattr(gpu_plan, folder, tmp_path)
    monkeypatch.chdir(gpu_plan.ROOT)
    seen = set()
    for planned in gpu_plan.STAGES:
        script, *options = planned.command(device, tmp_path / planned.name, 100.0)
        name = Path(script).name
        if name in PARSERS:
            args = PARSERS[name](options)
            assert args.device == device
            assert getattr(args, "output_dir", tmp_path / planned.name).name == planned.name
            if hasattr(args, "size"):
                assert (args.size == "tiny") == (device == "cpu")
            seen.add(name)
    assert seen == set(PARSERS)
    assert [planned.name for planned in gpu_plan.STAGES][:3] == ["smoke", "correct", "step-1b"]


def test_what_stages_usually_take_fits_two_calls():
    for planned in gpu_plan.STAGES:
        assert planned.usual <= planned.seconds <= 200, planned.name
    assert sum(planned.usual for planned in gpu_plan.STAGES) <= 2 * 570 - 200


def test_quality_is_told_the_time_that_it_has(monkeypatch, tmp_path):
    (planned,) = [planned for planned in gpu_plan.STAGES if planned.name == "quality"]
    for folder in ("MODEL", "DATA"):
        monkeypatch.setattr(gpu_plan, folder, tmp_path)
    for seconds in (200.0, 70.5):
        args = quality.parse(planned.command("cuda", tmp_path, seconds)[1:])
        assert 0 < args.time_limit < seconds - 40


def test_the_real_facts_name_the_code_and_the_versions(monkeypatch):
    facts = gpu_stages.machine_facts()
    assert facts["device"] == "cpu" or facts["cuda"]
    assert len(facts["code"]) == 12
    assert facts["torch"][0].isdigit()
    monkeypatch.setattr(gpu_stages, "FACTS", "import no_such_package")
    with pytest.raises(SystemExit, match="cannot import trainer_ext: ModuleNotFoundError"):
        gpu_stages.machine_facts()
