"""The machine's secret: readable by its owner, by nobody else, and never half a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from hmmnet.errors import HmmnetError
from hmmnet.wire.secrets import SECRET_BYTES, new_secret, read_secret, same_secret, write_secret


def test_written_and_read(tmp_path: Path) -> None:
    """The same bytes, in a file that is closed to others."""
    secret = new_secret()
    path = tmp_path / "secret"
    write_secret(path, secret)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_secret(path) == secret
    assert len(secret) == SECRET_BYTES


def test_each_is_new() -> None:
    """No two alike."""
    assert new_secret() != new_secret()


def test_an_existing_secret_is_not_overwritten(tmp_path: Path) -> None:
    """A running machine keeps its secret."""
    write_secret(tmp_path / "secret", bytes(32))
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "secret", new_secret())


def test_a_secret_that_others_may_read_is_none(tmp_path: Path) -> None:
    """Refused, with the mend."""
    path = tmp_path / "secret"
    write_secret(path, new_secret())
    path.chmod(0o644)
    with pytest.raises(HmmnetError, match=r"open to others \(mode 644\); chmod 600"):
        read_secret(path)


@pytest.mark.parametrize("length", [0, SECRET_BYTES - 1, SECRET_BYTES + 1])
def test_a_wrong_length_is_refused(tmp_path: Path, length: int) -> None:
    """A truncated file is no short secret."""
    write_secret(tmp_path / "secret", bytes(length))
    with pytest.raises(HmmnetError, match="no machine secret"):
        read_secret(tmp_path / "secret")


def test_a_missing_file_says_what_to_look_for(tmp_path: Path) -> None:
    """Most likely the machine does not run."""
    with pytest.raises(HmmnetError, match="is the machine running"):
        read_secret(tmp_path / "secret")


def test_comparison() -> None:
    """Equal is equal, and nothing else is."""
    assert same_secret(b"abc", b"abc")
    assert not same_secret(b"abc", b"abd")
    assert not same_secret(b"abc", b"")
