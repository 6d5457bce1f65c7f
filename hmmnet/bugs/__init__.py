"""Bugs that real drivers had, to run: each a story, a scenario of some seconds, a driver that has the bug and one that has not.

A scenario fails under the buggy driver and passes under the mended one; so these are exercises (what went wrong here?), and a measure for
one's own tests (do they find it?). The drivers are in `hmmnet.devices.bugs`; `library` lists the bugs, `scenarios` has what happens,
`trial` runs one. On the command line: ``hmmnet bugs``.
"""

from .library import BUGS, Bug
from .trial import KINDS, Kind, Trial, try_bug

__all__ = ["BUGS", "KINDS", "Bug", "Kind", "Trial", "try_bug"]
