"""SIGTERM in the middle of an import: neither lost nor the end of the interpreter.

Oracle: exit codes as the interpreter leaves them, and what a module does behind the signal.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from hmmnet.cli.signals import Termination
termination = Termination()
termination.listen()
try:
    import slow
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
    raise SystemExit(143 if termination.came else 130)
"""

KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); list(range(10000))"


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(f'exec("""{KILLED}""")', id="in a text that is executed"),
        pytest.param(
            f"""
import weakref
class Lock: pass
lock = Lock()
def cb(_):
    {KILLED}
seen = weakref.ref(lock, cb)
del lock
""",
            id="in a callback whose errors are passed over",
        ),
    ],
)
def test_it_waits_for_the_end_of_an_import(module: str, tmp_path: Path) -> None:
    """The module is there, then the program is interrupted; no second signal, no death by SIGINT."""
    (tmp_path / "slow.py").write_text(f"{module}\nprint('imported')\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.split() == ["imported", "interrupted"]
    assert (done.returncode, done.stderr) == (143, "")


def test_it_strikes_at_once_elsewhere() -> None:
    """No import, no delay: what stands behind it is not run."""
    program = PROGRAM.replace("import slow", f"{KILLED}; time.sleep(60)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout.split(), done.returncode) == (["interrupted"], 143)


def test_half_a_module_is_not_asked(tmp_path: Path) -> None:
    """In the background: the module that knows of simulated runs may be the one that is being imported."""
    half = 'import signal, sys, types; sys.modules["hmmnet.sim.interrupts"] = types.ModuleType("half")'
    after = 'del sys.modules["hmmnet.sim.interrupts"]'
    (tmp_path / "slow.py").write_text(f"{half}\n{KILLED}\n{after}\nprint('imported')\n")
    program = f"import signal, sys; sys.path.insert(0, {str(tmp_path)!r}); signal.signal(signal.SIGINT, signal.SIG_IGN)\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout.split(), done.returncode, done.stderr) == (["imported", "interrupted"], 143, "")


def test_an_import_that_waits_for_ever_is_ended(tmp_path: Path) -> None:
    """A module of the user's may do so; two seconds are enough for all others."""
    (tmp_path / "slow.py").write_text(f"{KILLED}\nimport time; time.sleep(60); print('imported')\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout.split(), done.returncode) == (["interrupted"], 143)
