"""The lessons are files, not a package: make them importable, and keep two-core machines from oversubscribing."""
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than four seconds; `python -m pytest -m 'not slow'` leaves these out")


@pytest.fixture
def run(tmp_path):
    """run("lesson4_gpt.py", "overfit") runs the real command line in an empty folder; returns the finished process."""
    def call(lesson, *args, code=0, timeout=300, **options):
        done = subprocess.run([sys.executable, str(ROOT / lesson), *map(str, args)], cwd=tmp_path, capture_output=True,
                              text=True, encoding="utf-8", timeout=timeout, **options)
        assert done.returncode == code, f"exit code {done.returncode}, wanted {code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if code == 2:
            assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done
    return call
