"""Converting a synthetic checkpoint: the bound on memory, and SIGKILL in the middle. By hand at any size: benchmarks/convert.py."""

import json
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_the_largest_part_and_a_killed_run_goes_on(root, tmp_path):
    command = [sys.executable, str(root / "benchmarks" / "convert.py"), "--gigabytes", "0.3", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"] > 0.29e9
    assert found["peak"] < 1.5 * found["largest_part"], found
    assert (found["killed_by"], found["kept"], found["same_hashes"]) == (9, 2, True)
