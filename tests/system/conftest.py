"""What tests of real processes share."""

from __future__ import annotations

import pytest

import hmmnet.machine

PATIENT_S = 60.0


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that this program launches have a lease of `PATIENT_S`.

    For tests that hold a device or cut its wire and mend it in time: two seconds, a machine's own, are over on a slow computer before
    a command that mends it has started.
    """

    class Patient(hmmnet.machine.host_class()):  # type: ignore[misc]  # a class that an entry point gives
        def __init__(self, *given: object, **named: object) -> None:
            super().__init__(*given, **named, lease_s=PATIENT_S)

    monkeypatch.setattr(hmmnet.machine, "host_class", lambda: Patient)
