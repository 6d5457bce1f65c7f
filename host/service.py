"""The host of a machine: endpoints, peers, processes; everything of this folder put together.

`Host` runs as tasks of whoever enters `running`: a program that embeds it (`hmmnet.launch`), or the host process (`__main__.py`). Devices
connect to the control endpoint, programs in other processes to the client endpoint; both say hello with the machine's secret.

**When a device is lost** its session ends first (it said BYE, fell silent, was replaced, or the launcher saw its process end). Then, in one
synchronous step: no new work reaches it, its transfers are cancelled, and the migrations that waited for them give up, which puts the
pages in transit back. Once its contexts have left the hubs and it is fenced, its zone is marked lost, and from then on a CPU access to a page that was
only there is a SIGBUS that names device and cause.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from hmmnet.errors import HmmnetError, KernelError, PeerLost
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import BulkReceiver, BulkSender
from hmmnet.pages import DEVICE_ZONE_MIN, ZONES_MAX
from hmmnet.topology import Topology
from hmmnet.wire.exchange import HEARTBEAT_S, LEASE_S, RETRY_S
from hmmnet.wire.messages import Call, Hello, Rate, Refused, Result, Welcome, Zone
from hmmnet.wire.server import Server
from hmmnet.wire.session import Session
from hmmnet.wire.transport import Transport

from .admission import Admission, Connecting
from .calls import Client
from .contexts import Contexts
from .device import Device, Life
from .dma import Dma
from .homing import Homing
from .hub import Hub
from .interconnect import Interconnect
from .link import SessionLink
from .mm.frames import PhysicalMemory
from .mm.space import Space
from .process import Process
from .requests import Requests

log = logging.getLogger("hmmnet.host")
