"""Every message that host, devices and clients exchange, and how much each may hold.

Structs are msgpack arrays with a leading tag. Page and frame lists are raw little-endian uint64 (`hmmnet.pages.to_wire`). Every field of
variable length has a bound here, and a message as a whole may not exceed `MESSAGE_BYTES_MAX`, which the transport checks before
it allocates. A decoded message is well formed, not yet meaningful: its receiver checks ranges, zones and rights.

Requests are answered by the reply named in their docstring, or by `Failed`. Notes are delivered (acknowledged and repeated by the
session) but not answered.

Streams are numbered by whoever asks for them: even numbers by the host (`CopyIn`, `CopyOut`, `Ioctl`), odd ones by the device (`DmaRead`,
`DmaWrite`), so they never collide on a bulk channel. 0 means no stream.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec

from hmmnet.pages import PAGE_SIZE

PROTOCOL_VERSION = 2
PAGES_PER_MESSAGE_MAX = 1 << 20
"""4 GiB of addresses in one page list (8 MiB); longer ranges are split by the caller."""
MESSAGE_BYTES_MAX = 8 * PAGES_PER_MESSAGE_MAX * 3 + (1 << 16)
"""A message holds at most three page lists and a little more."""
NAME_MAX = 64
TEXT_MAX = 4096
ZONES_LISTED_MAX = 4096
ARGUMENT_BYTES_MAX = 1 << 20
INLINE_BYTES_MAX = 4 * PAGE_SIZE
"""Page data that may ride on an answer over the control session: a stream of its own would cost a CPU fault twice the messages, while a
few pages do not delay an invalidation."""

STREAMS_SHOWN_MAX = 4096
"""Streams that one `ShowStreams` asks about: all that a device's copy engine may have under way."""

# Lists of pages and of frames name a huge page by one word, its first with bit 63 set (`pages.LARGE`).
PageList: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=8 * PAGES_PER_MESSAGE_MAX)]
StreamList: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=8 * STREAMS_SHOWN_MAX)]
"""As a page list: little-endian uint64."""
Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_MAX)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
Secret: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=64)]
Packed: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=ARGUMENT_BYTES_MAX)]
"""msgpack inside: arguments and results whose form the kernel or workload defines."""
U64: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Page: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 35)]
PageCount: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 35)]


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Root of all messages; the class name is the tag on the wire."""


# --- sessions ---------------------------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message of a peer. Answered by `Welcome` or `Refused`. `role` is ``device``, ``client`` or ``launcher``."""

    version: int
    role: Name
    name: Name
    incarnation: U64
    pid: int
    secret: Secret
    model: Annotated[str, msgspec.Meta(max_length=NAME_MAX)] = ""


class Zone(msgspec.Struct, array_like=True, frozen=True):
    """One frame zone. `kind` is ``system``, ``private`` or ``coherent``; `owner` names the device or memory it belongs to."""

    zone: int
    kind: Name
    owner: Name
    pages: PageCount


class Welcome(Message, frozen=True):
    """The host accepts. `config` is msgpack of the device's frozen spec; the bulk endpoints are as seen by the peer (empty for clients);
    `bulk_key` opens both.

    Emulated time is ``epoch_emulated_s + (CLOCK_MONOTONIC - epoch_monotonic_s) * rate``.
    """

    version: int
    host_incarnation: U64
    zone: int
    zones: Annotated[list[Zone], msgspec.Meta(max_length=ZONES_LISTED_MAX)]
    bulk_in: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
    bulk_out: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
    bulk_key: Annotated[bytes, msgspec.Meta(max_length=NAME_MAX)]
    telemetry: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
    epoch_monotonic_s: float
    epoch_emulated_s: float
    rate: float
    lease_s: float
    config: Packed


class Refused(Message, frozen=True):
    """The host does not accept. `code` is ``version``, ``secret``, ``name``, ``over``, ``busy``, ``role`` or ``garbage``."""

    code: Name
    why: Text


class Done(Message, frozen=True):
    """The request was carried out; nothing to report."""


class Failed(Message, frozen=True):
    """The request was not carried out. `errno` is positive for a modelled kernel error, 0 when the peer itself failed."""

    errno: int
    call: Text
    why: Text


class Rate(Message, frozen=True):
    """Note: the emulated clock goes on at another rate from this point on (fields as in `Welcome`)."""

    epoch_monotonic_s: float
    epoch_emulated_s: float
    rate: float


# --- host to device ---------------------------------------------------------------------------------------------------------------


class OpenContext(Message, frozen=True):
    """A process opens the device: make an empty mirror. `Done`."""

    context: U64
    process: int


class CloseContext(Message, frozen=True):
    """The last user of the context is gone: drop its mirror (a dmirror evicts its memory first). `Done`.

    Jobs that still run on it end with EBADF. The device does not unsubscribe: the host removes the context's subscriptions, and an
    `Invalidate` that comes meanwhile for a context that is closed is answered with `Done`, for nothing is mapped there.
    """

    context: U64


class Invalidate(Message, frozen=True):
    """mmu_notifier range start. `Done` when the device has set the sequence, dropped its entries for [start, end) and quiesced.

    `owner` is the zone of the device for whose migration or exclusive access this happens, or -1; the pages are not collected before
    everybody has answered. Under v25 it comes at the end of the range, with the one event ``invalidate``, to every mirror of the address
    space; pages are not copied before everybody has answered. A subscription that the device does not know (yet, or any more)
    is no error: the range goes all the same.
    """

    context: U64
    subscription: U64
    start: Page
    end: Page
    event: Name
    owner: int
    sequence: U64


class CopyIn(Message, frozen=True):
    """A DMA stream fills `targets` of the device's memory, in order; `zeros` become zero.

    `Done` once the stream is expected (it may begin earlier).
    """

    stream: U64
    targets: PageList
    zeros: PageList


class CopyOut(Message, frozen=True):
    """The device drops its entries for `pages` of `context` (0: none) and streams `frames` of its memory to the host. `Done` at once.

    With `stream` 0 no stream follows: the frames, at most `INLINE_BYTES_MAX` bytes, come with the answer, `Copied`.

    `pages` may be empty; entries go by frame in any case, in every context, and `pages` in every context of the same process. The frames
    stay the device's until `FreeFrames`; when the stream is over and they were not freed, they hold their pages still.
    """

    stream: U64
    context: U64
    pages: PageList
    frames: PageList
    start_s: float
    bytes_per_s: float
    latency_s: float


class Copied(Message, frozen=True):
    """Reply to a `CopyOut` without a stream: the bytes of its frames, in order, and their xxh3_64 checksum."""

    data: Annotated[bytes, msgspec.Meta(max_length=INLINE_BYTES_MAX)]
    checksum: Annotated[int, msgspec.Meta(ge=0)]


class FreeFrames(Message, frozen=True):
    """Note (folio_free): the last reference to these frames of the device's memory is gone."""

    frames: PageList


class Launch(Message, frozen=True):
    """Run `kernel` on `context`'s addresses. `Finished`. `arguments` is a msgpack map."""

    context: U64
    job: U64
    kernel: Name
    arguments: Packed
    placement: Name = "demand"


class EndJob(Message, frozen=True):
    """Note: nobody waits for this job any more, end it. Its launch is then `Failed` with EINTR; a job that is over is over."""

    context: U64
    job: U64


class Ioctl(Message, frozen=True):
    """A device-specific command on pages [start, start+pages) of `context`. `IoctlDone`.

    A command that takes data finds it on stream `stream_in`, one that gives data sends it on `stream_out` (0: none), one page a page.
    A command that fails sends nothing on `stream_out`. Every model serves ``migrate_to_dev`` and ``migrate_to_sys`` as an explicit
    prefetch (with `stream_out` 0 the driver does not read the pages back); a gpu counts in `IoctlDone.cpages` the pages that moved
    and fails for no page that stayed.
    """

    context: U64
    command: Name
    address: U64
    pages: PageCount
    stream_in: U64 = 0
    stream_out: U64 = 0
    flags: U64 = 0


class IoctlDone(Message, frozen=True):
    """Reply: the counts that the command reports, and small per-page results (a snapshot's bytes)."""

    cpages: PageCount
    faults: PageCount
    data: PageList = b""


class Finished(Message, frozen=True):
    """Reply to `Launch`: msgpack maps of the kernel's results and of the job's counters. `error` is empty when the job ended well.

    Counters (seconds are emulated): ``emulated_s``, ``requests`` (vectorised accesses), ``replays``, ``faults``, ``fault_groups`` and
    ``fault_group_s`` (service passes and their time; a pass that serves several jobs counts for the first), ``migrations``, ``pages_in``,
    ``pages_out``, ``remote_read_bytes``, ``remote_written_bytes`` (traffic of the job's context while it ran). `fault_address` is the
    byte address whose access ended the job, nil when it ended otherwise; `errno` is what the host refused that access with, if it did.

    A launch that cannot begin is `Failed`: ENOENT (no such kernel), EINVAL (no such placement, arguments no map), EBADF (context not
    open, or closed while the job ran), EEXIST (job number in use), EMFILE. So is one that was ended: EINTR.
    """

    results: Packed
    counters: Packed
    error: Text = ""
    fault_address: U64 | None = None
    errno: int = 0


class Inject(Message, frozen=True):
    """A fault begins at the device, under `number`: a msgpack map that makes it (`hmmnet.faults.catalogue`). Empty: it ends. `Done`.

    From a device, as a note: ``{"fired": N}``, how often the fault has happened there.
    """

    number: U64
    fault: Packed


class Inspect(Message, frozen=True):
    """Ask a device for its figures. `Report`."""


class Report(Message, frozen=True):
    """Reply to `Inspect`: a msgpack map.

    ``name model kind zone pages pages_used pages_used_max contexts jobs_running jobs_finished copied_in_bytes copied_out_bytes
    emulated_s``, the traffic counters of `Finished`, of the fault buffers ``faults fault_groups fault_duplicates fault_stale
    fault_fatal fault_group_s``, and ``driver_bugs`` where there are any.
    """

    figures: Packed


class ShowMirror(Message, frozen=True):
    """Ask a device which translations the mirror of `context` holds, from page `start` on. `MirrorShown`."""

    context: U64
    start: Page


class MirrorShown(Message, frozen=True):
    """Reply to `ShowMirror`: pages, ascending and one by one, and for each its frame << 1, with bit 0 set if it may be written.

    As many as a list holds; who gets so many asks again for those behind. Nothing of a context that is not open.
    """

    pages: PageList
    entries: PageList


class ShowStreams(Message, frozen=True):
    """Ask a device how these streams go on that it sends: those of a `CopyOut`, and of a `DmaWrite` that was granted. `StreamsShown`.

    The host asks when nothing of them has come for long.
    """

    streams: StreamList


class StreamsShown(Message, frozen=True):
    """Reply to `ShowStreams`, one by one.

    A number that grows with each chunk, and what the stream waits for (`hmmnet.fabric.stream.Holds`): 0 for nothing, 1 the next chunk is
    not due yet by the device's clock, 2 for the host's credits, 3 for a link or for room in the channel; 4: there is no such stream, or no
    more.
    """

    begun: StreamList
    holds: StreamList


# --- device to host ---------------------------------------------------------------------------------------------------------------


class Subscribe(Message, frozen=True):
    """mmu_interval_notifier_insert over pages [start, end). `Subscribed`. `own` filters MIGRATE events the device caused.

    `held` filters events on pages of which nothing was given for this subscription since an event took the last, as a driver's callback
    does that looks at its own table first: by an answer to a `RangeFault` or `MakeExclusive` of it, or by a `Migrate` of its context that
    it was there for. What a device keeps of another interval does not count. It gives up `overshoot` pages behind the end of an event, too,
    so those count.
    """

    context: U64
    start: Page
    end: Page
    own: bool = True
    held: bool = False
    overshoot: PageCount = 0


class Subscribed(Message, frozen=True):
    """Reply: the subscription and its first sequence."""

    subscription: U64
    sequence: U64


class Unsubscribe(Message, frozen=True):
    """mmu_interval_notifier_remove. `Done` when no invalidation can reach it any more."""

    context: U64
    subscription: U64


class RangeFault(Message, frozen=True):
    """read_begin and hmm_range_fault in one. `RangeFaulted`. Times out (EBUSY) after `timeout_ms` real milliseconds; 0 never does."""

    context: U64
    subscription: U64
    start: Page
    pages: PageCount
    default_flags: Annotated[int, msgspec.Meta(ge=0)]
    flags_mask: Annotated[int, msgspec.Meta(ge=0)]
    inputs: PageList = b""
    timeout_ms: int = 1000
    unlocked: bool = False


class RangeFaulted(Message, frozen=True):
    """Reply: HMM_PFN words, good unless the device has been told a later sequence than `sequence` (read_retry is its to check).

    It may have been told an earlier one: of events that `Subscribe` filters it hears nothing.

    Pages that are not the device's own are mapped for its DMA: their words say by which way (DMA_MAPPED, P2PDMA, P2PDMA_BUS).
    """

    sequence: U64
    words: PageList


class Migrate(Message, frozen=True):
    """migrate_vma on behalf of a driver. `Migrated`.

    `direction` is ``device`` or ``system``. `grant` are the frames that the driver offers as destinations, position by position of the
    range (direction device; 0 offers none for that page; a large one is for the aligned 512 pages from its position on). Frames whose page
    did not migrate come back as not used in the reply and stay the driver's.
    `cause` says on whose behalf: ``user``, ``fault`` (a group of device faults), ``prefetch`` or ``release``.

    The range may span several VMAs. Where a VMA cannot take part, migration ends there: what lies before has moved, and the reply
    says so with `Migrated.errno` (not with `Failed`, because the driver must map what moved).

    While a page that the context holds a translation for is on its way, that translation is suspended: DMA through it is answered
    EAGAIN (`DmaRead`). It is void once the page has moved, and good again if the page stayed.
    """

    context: U64
    start: Page
    pages: PageCount
    direction: Name
    select: int
    grant: PageList = b""
    cause: Name = "user"


class Migrated(Message, frozen=True):
    """Reply: final MIGRATE_PFN source words, position by position: MIGRATE is set for what moved, WRITE where the new page is writable.

    A word with COMPOUND stands for the 512 positions of a huge page.

    Direction device: the device maps and then sends `MigrateDone`, also when nothing moved, unless `migration` is 0.
    Direction system: the pages are home
    already (the device dropped its entries when it served `CopyOut`), `migration` is 0 and no `MigrateDone` follows.
    `errno` is positive when a VMA in the range was refused (EINVAL); the words from there on are 0. In direction device `tried` are then
    the pages before it: to ask for those again makes no sense.
    """

    migration: U64
    words: PageList
    moved: PageCount
    errno: int = 0
    tried: PageCount = 0


class MigrateDone(Message, frozen=True):
    """Note: the device has updated its table; the host may finalize `migration`."""

    migration: U64


class Evict(Message, frozen=True):
    """migrate_device_range: bring `frames` of the device's memory home, whoever maps them. `Evicted`."""

    frames: PageList
    cause: Name = "release"


class Evicted(Message, frozen=True):
    """Reply: how many went home. Frames that were busy stay (the driver tries again), and `broken` ones (HWPOISON) for ever."""

    moved: PageCount
    broken: PageCount = 0


class MakeExclusive(Message, frozen=True):
    """make_device_exclusive_range for `pages` pages from `start`, which lie in the interval of `subscription`. `Exclusive`.

    `folios`: as Linux 6.12 did it, where a large page is had as a whole or not at all.
    """

    context: U64
    subscription: U64
    start: Page
    pages: PageCount
    folios: bool = False


class Exclusive(Message, frozen=True):
    """Reply: HMM_PFN words of the pages that the device has to itself now, from the first on; fewer where one cannot be had.

    None at all: others have taken them back meanwhile, and it is worth asking again. A word of 0 is a page that was not had although others
    behind it were.

    They were so at `sequence` of the subscription, and are until an invalidation changes that (see `RangeFaulted`). The device may reach
    the frames as after a range fault.
    """

    sequence: U64
    words: PageList


class DmaRead(Message, frozen=True):
    """Read system (or coherent) memory through the IOMMU: element i has `size` bytes at physical `addresses[i]`.

    `pages[i]` is the virtual page that the device believes to be mapped there; addresses are multiples of `size`. Data come as stream
    `stream`.
    `Done` when the stream was sent. EAGAIN while the device's own migration has one of the pages: look at the mirror again and repeat.
    An access that the context holds no translation for is the driver's bug; it is refused (`Failed` without errno) and counted.
    """

    context: U64
    stream: U64
    pages: PageList
    addresses: PageList
    size: Annotated[int, msgspec.Meta(ge=1, le=4096)]


class DmaWrite(Message, frozen=True):
    """As `DmaRead`, the other way. `DmaGrant` when the host is ready for the stream, whose last credit says that the data have landed."""

    context: U64
    stream: U64
    pages: PageList
    addresses: PageList
    size: Annotated[int, msgspec.Meta(ge=1, le=4096)]


class DmaGrant(Message, frozen=True):
    """Reply to `DmaWrite`: the device may begin; pacing as in `CopyOut`."""

    start_s: float
    bytes_per_s: float
    latency_s: float


# --- clients ----------------------------------------------------------------------------------------------------------------------


class Call(Message, frozen=True):
    """A client's call of a machine or process operation by name. `Result`. `arguments` is a msgpack map, `data` at most one chunk.

    Machine: ``devices`` -> [name], ``report`` -> map, ``check`` -> map, ``create_process`` (node, cgroup) -> pid,
    ``create_cgroup`` (name, limit or nil), ``add_fault`` (fault: a map of what makes one), ``remove_fault`` (fault: its number),
    ``list_faults``, ``oom_kill`` (cgroup) -> pid, ``unplug`` (device). Process operations carry ``process`` (a pid that
    this client made) and what `hmmnet.program.Process` names: ``mmap`` (length, protection, address or nil, populate, shared,
    file or nil, handle or nil, offset, hugetlb) -> address;
    ``memfd_create`` (length) -> file number; ``file_read`` (file, offset, length) -> data, ``file_write`` (file, offset) with data -> size,
    ``file_punch`` (file, offset, length), ``file_truncate`` (file, length) -> size, ``file_close`` (file);
    ``munmap``, ``mprotect``, ``madvise``, ``mlock``, ``munlock`` (address, length and more);
    ``userfaultfd`` (address, length, sigbus) -> registration, ``fault_read`` (faults) -> address, ``fault_copy`` (faults, address) with
    data, ``fault_close`` (faults); ``mremap`` (address, old, new, target or nil, may_move, dontunmap) ->
    address; ``get_user_pages`` (address, pages, write, pin, longterm) -> {reference, count}, ``read_pages`` (reference, first, pages)
    -> data, ``put_pages`` (reference); ``fork`` -> {process, handles: number -> device}; ``malloc`` (length) -> address; ``read``
    (address, length, at most a chunk) -> data; ``write`` (address) with data; ``pagemap`` (address, pages) -> data; ``residency``
    (address, pages) -> [owner names], data: int16 a page; ``pagemap_words`` (address, pages) -> data: uint64 a page; ``smaps`` ->
    [[start, end, rights, bytes of each kind]]; ``clear_refs`` (soft_dirty); ``migrate`` (address, length, to) -> bytes; ``launch``
    (kernel, device, placement, arguments: map) -> {results, counters}; ``exit``; ``kill`` (out_of_memory); ``oom_score`` -> points;
    ``set_oom_score_adj`` (value);
    ``open`` (device) -> handle number; ``close`` (handle). ``ioctl``
    (handle, command, address, pages, flags) -> {cpages, faults, length} with the first chunk of the data, ``length`` bytes in all; the
    rest by ``fetch`` (handle, offset) -> data. Data for an ioctl beyond one chunk goes ahead in ``stage`` (handle) calls, which append;
    ``ioctl``'s own `data` comes last. Loads, stores and arrays are made of reads and writes.

    `number` is the client's own for a call that it may want to recall; 0 for none.
    """

    operation: Name
    arguments: Packed
    data: Annotated[bytes, msgspec.Meta(max_length=1 << 20)] = b""
    number: U64 = 0


class Recall(Message, frozen=True):
    """Note: the client does not wait for this call any more, end it where it is. It is then `Failed` with EINTR, unless it is over."""

    number: U64


class Result(Message, frozen=True):
    """Reply to `Call`: msgpack of the value, and data for reads."""

    value: Packed
    data: Annotated[bytes, msgspec.Meta(max_length=1 << 20)] = b""


Body: TypeAlias = (
    Hello | Welcome | Refused | Done | Failed | Rate | OpenContext | CloseContext | Invalidate | CopyIn | CopyOut
    | Copied | FreeFrames | Launch | EndJob | Ioctl | IoctlDone | Finished | Inspect | Report | ShowMirror | MirrorShown
    | ShowStreams | StreamsShown
    | Subscribe | Subscribed | Unsubscribe
    | RangeFault | RangeFaulted | Migrate | Migrated | MigrateDone | Evict | Evicted | MakeExclusive | Exclusive
    | DmaRead | DmaWrite | DmaGrant | Call | Recall | Result | Inject
)  # fmt: skip

Arguments: TypeAlias = dict[str, Any]
