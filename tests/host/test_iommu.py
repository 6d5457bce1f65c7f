"""The emulated IOMMU: what a context was not given, or was told to drop, it cannot reach."""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.errors import IommuFault, KernelError
from hmmnet.host.iommu import Domain
from hmmnet.pages import HMM_PFN_ERROR, HMM_PFN_VALID, HMM_PFN_WRITE, PAGE_SHIFT, ZONE_SHIFT, Words

DEVICE_FRAME = 64 << ZONE_SHIFT


def words(*values: int) -> Words:
    return np.array(values, dtype=np.uint64)


@pytest.fixture
def domain() -> Domain:
    """Page 10 -> frame 5 read-only, 11 -> frame 6 writable, 12 an error, 13 the device's own memory."""
    domain = Domain("gpu0", 3, 64)
    domain.grant(
        10, words(HMM_PFN_VALID | 5, HMM_PFN_VALID | HMM_PFN_WRITE | 6, HMM_PFN_VALID | HMM_PFN_ERROR | 7, HMM_PFN_VALID | DEVICE_FRAME)
    )
    return domain


def test_granted_translations_pass(domain: Domain) -> None:
    """Reads of both, a write of the writable one, anywhere inside the page."""
    domain.check(words(10, 11), words(5 << PAGE_SHIFT, (6 << PAGE_SHIFT) + 4088), write=False)
    domain.check(words(11), words(6 << PAGE_SHIFT), write=True)


@pytest.mark.parametrize(
    ("page", "frame", "write", "why"),
    [
        (10, 5, True, "read-only"),
        (10, 6, False, "translated to frame 0x5"),
        (9, 5, False, "no translation"),
        (12, 7, False, "no translation"),
        (13, DEVICE_FRAME, False, "no translation"),
    ],
)
def test_everything_else_is_refused_and_named(domain: Domain, page: int, frame: int, write: bool, why: str) -> None:
    """The fault names device, context, page, address and what the domain held instead."""
    with pytest.raises(IommuFault, match=why) as caught:
        domain.check(words(page), words(frame << PAGE_SHIFT), write=write)
    assert 'device "gpu0" context 3' in str(caught.value)
    assert domain.refused == 1


def test_a_revoked_translation_is_refused(domain: Domain) -> None:
    """By range and page by page."""
    domain.revoke(10, 11)
    domain.revoke_pages(words(11))
    for page, frame in ((10, 5), (11, 6)):
        with pytest.raises(IommuFault):
            domain.check(words(page), words(frame << PAGE_SHIFT), write=False)


def test_a_new_grant_replaces_the_old(domain: Domain) -> None:
    """A range fault that finds nothing changes nothing: a page that the device has exclusively does not show."""
    before = domain.frame(10)
    domain.grant(10, words(0, HMM_PFN_VALID | 9))
    assert domain.frame(10) == before is not None
    assert domain.frame(11) == 9
    with pytest.raises(IommuFault, match="read-only"):
        domain.check(words(11), words(9 << PAGE_SHIFT), write=True)


def test_access_under_way_is_known(domain: Domain) -> None:
    """Whoever revokes a range can see the DMA that it has to wait for."""
    access = domain.begin(words(10, 11), write=False)
    assert domain.busy(11, 20)
    assert not domain.busy(12, 20)
    domain.end(access)
    assert not domain.busy(0, 100)


def test_a_page_on_its_way_to_the_device_itself_says_try_again(domain: Domain) -> None:
    """Suspended is EAGAIN and no bug; resumed is as before; a write through a read-only translation stays a bug."""
    domain.suspend(words(9, 10, 11))
    with pytest.raises(KernelError, match="EAGAIN"):
        domain.check(words(11), words(6 << PAGE_SHIFT), write=True)
    with pytest.raises(IommuFault):
        domain.check(words(10), words(5 << PAGE_SHIFT), write=True)
    domain.resume(words(9, 10, 11))
    domain.check(words(11), words(6 << PAGE_SHIFT), write=True)
    assert domain.frame(9) is None
