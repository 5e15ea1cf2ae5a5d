"""plumbing/fail.py: one message, once, and the status of the process."""

import subprocess
import sys

import pytest
from conftest import ROOT

from plumbing.fail import fail


@pytest.mark.parametrize(("rank", "printed"), [(None, "no such file\n"), ("0", "no such file\n"), ("1", "")])
def test_fail_prints_once_on_rank_0(rank, printed, monkeypatch, capfd):
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as error:
        fail("no such file")
    assert str(error.value) == "no such file"
    assert error.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err == printed


@pytest.mark.parametrize(("rank", "printed"), [("0", "no such file\n"), ("1", "")])
def test_a_process_that_fails_ends_with_status_2_and_no_traceback(rank, printed):
    code = "from plumbing.fail import fail\ntry:\n    open('')\nexcept OSError:\n    fail('no such file')"
    environment = {"RANK": rank}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == printed
