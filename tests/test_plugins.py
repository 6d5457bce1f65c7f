"""What is found by a name is whole."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from hmmnet.plugins import load

SLOW = """
import time
time.sleep(0.5)
thing = 7
"""


def test_a_module_that_another_thread_imports_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in `sys.modules` long before it has anything in it."""
    (tmp_path / "slowly_there.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(load("things", "it", {"it": "slowly_there:thing"}))) for _ in range(2)]
    threads[0].start()
    while "slowly_there" not in sys.modules and threads[0].is_alive():
        pass
    threads[1].start()
    for thread in threads:
        thread.join(20)
    monkeypatch.delitem(sys.modules, "slowly_there")
    assert found == [7, 7]
