"""Invariants of benchmarks/gpu_stages.py, with small stages in the place of the real ones, and of
the plan (gpu_plan.py):

- A stage that raises or exceeds its limit is named, ends with all processes it began, and does not
  keep the others from running; the exit code says so.
- A stage that has passed is not run again, unless asked for or the code has changed. One that
  failed, was killed or had no time left is.
- What a stage lacks leaves it out on a GPU and fails a rehearsal.
- Every option of a real stage is one that its script accepts, on both devices; limits leave two
  calls of less than ten minutes.
"""

from __future__ import annotations

import json
import os
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
    fields = {"seconds": 60, "command": lambda device, folder: ["-c", code, str(folder)]}
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
    for _ in range(100):  # the system needs a moment to take it away
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {child} of the stage lives on")


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
    assert runs(tmp_path) == 3


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


def test_killed_in_a_stage_a_call_goes_on_with_it(tmp_path):
    """The runner is killed by the second stage; the next call runs that and the third."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, gpu_plan, gpu_stages\n"
        "count = \"import sys; open(sys.argv[1] + '/runs', 'a').write('x'); print('ok')\"\n"
        "kill = count + \"; import os, signal; len(open(sys.argv[1] + '/runs').read()) == 1 and "
        'os.kill(os.getppid(), signal.SIGKILL)"\n'
        "gpu_stages.STAGES = [gpu_plan.Stage(name, 60, lambda device, folder, c=c: "
        "['-c', c, str(folder)]) for name, c in (('a', count), ('b', kill), ('c', count))]\n"
        f"gpu_stages.machine_facts = lambda: {FACTS!r}\n"
        "sys.exit(gpu_stages.main(['--device', 'cpu', '--output', sys.argv[1]]))\n"
    )
    paths = os.pathsep.join([str(BENCHMARKS), ENVIRONMENT["PYTHONPATH"]])
    codes = [
        subprocess.run(
            [sys.executable, str(script), str(tmp_path / "out")],
            env={**ENVIRONMENT, "PYTHONPATH": paths},
            capture_output=True,
        ).returncode
        for _ in range(2)
    ]
    assert codes == [-9, 0]
    assert [runs(tmp_path / "out", name) for name in "abc"] == [1, 2, 1]


def test_a_stage_without_time_is_left_for_the_next_call(call):
    code, lines = call([stage("one", "print('ok')")], "--seconds", "0")
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
        script, *options = planned.command(device, tmp_path / planned.name)
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


def test_the_limits_fit_two_calls():
    limits = [planned.seconds for planned in gpu_plan.STAGES]
    assert max(limits) <= 200
    assert sum(limits) <= 2 * 570


def test_the_real_facts_name_the_code_and_the_versions(monkeypatch):
    facts = gpu_stages.machine_facts()
    assert facts["device"] == "cpu" or facts["cuda"]
    assert len(facts["code"]) == 12
    assert facts["torch"][0].isdigit()
    monkeypatch.setattr(gpu_stages, "FACTS", "import no_such_package")
    with pytest.raises(SystemExit, match="cannot import trainer_ext: ModuleNotFoundError"):
        gpu_stages.machine_facts()
