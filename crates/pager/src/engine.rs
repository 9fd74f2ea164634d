//! The pager's state and what it does on a fault.
//!
//! The engine decides; memory, store and clock are handed in with every call (see [`Io`]), so the
//! same engine runs on the kernel and on a simulated machine. It is single-threaded: faults,
//! events and completions are handled one after another, in the order in which the driver reads
//! them.

use std::collections::{HashMap, VecDeque};

use farmem_region::{
    Completion, FetchPage, FrameId, Nanos, Outcome, PAGE_SIZE, PageCount, PageIndex, PageRange,
    PageStore, Request, StoreError, Ticket, Version,
};
use farmem_vmem::{AddressRange, PageKind, Progress, Pull, Stop};
use twox_hash::XxHash3_128;

use crate::budget::Budget;
use crate::counts::{Counts, Latency, Sample};
use crate::frames::{FramePool, FrameUse};
use crate::memory::{Memory, SpaceId, ZERO_RUN_PAGES};
use crate::ranges::RangeSet;
use crate::slots::{SlotPolicy, Slots};
use crate::streams::{Plan, Streams};
use crate::table::{Entry, Fingerprint, PageTable, Place};
use crate::threads::Threads;

/// What memory the pager looks after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All private anonymous memory of the process: mappings are found and adopted when it nears
    /// its limit, and everything it holds counts.
    Process,
    /// Only ranges given with [`Engine::adopt_range`]; only their pages and the pager's frames
    /// count.
    Ranges,
}

/// What the pager may use and how it behaves.
#[derive(Debug, Clone)]
pub struct Config {
    /// What it looks after.
    pub scope: Scope,
    /// Local memory that the program, the pager included, may use.
    pub limit_bytes: u64,
    /// Largest window of read-ahead in pages; 0 switches it off.
    pub readahead_pages_max: u32,
    /// Random bytes that key the fingerprints.
    pub secret: [u8; 192],
    /// Pages that the region has at the start.
    pub region_pages: PageCount,
    /// How a page finds its slot.
    pub slots: SlotPolicy,
    /// Pages moved out together that another thread of the pager looks at, at least. Fewer come of
    /// memory that is touched here and there: its pages will come back one by one, and each time
    /// one is moved, every processor that runs a thread of this memory is interrupted.
    pub lent_pages_min: usize,
    /// A page that the servers do not have is zero. If not, zero pages are stored like any other.
    pub zeros_are_absent: bool,
    /// A forked child with so much memory gets a pager of its own; 0: none does.
    pub heir_mark_bytes: u64,
}

/// What the engine works on, handed in with every call.
pub struct Io<'a> {
    /// The address space.
    pub memory: &'a mut dyn Memory,
    /// The servers.
    pub store: &'a mut dyn PageStore,
    /// The clock.
    pub clock: &'a dyn Fn() -> Nanos,
}

impl std::fmt::Debug for Io<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Io").finish_non_exhaustive()
    }
}

/// The pager cannot go on; the program must be stopped.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The store has failed closed, or has no room.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A page is neither where the table says nor untouched. A defect of the pager.
    #[error(
        "the page at {address:#x} is missing though it should be in memory; please report this"
    )]
    Missing {
        /// Its address.
        address: usize,
    },
    /// The address space refuses.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    /// userfaultfd fails.
    #[error(transparent)]
    Uffd(#[from] farmem_vmem::UffdError),
}

/// One address space that is served.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) id: SpaceId,
    /// Whose child it is; `None` for the own space.
    pub(crate) parent: Option<SpaceId>,
    pub(crate) table: PageTable,
    pub(crate) streams: Streams,
    /// A child's ranges whose missing pages are reported; for the own space see `adopted`.
    pub(crate) ranges: RangeSet,
    /// What is not decided yet of a child's pages.
    pub(crate) doubts: Vec<crate::forks::Doubt>,
    /// A child is handed over to a pager of its own.
    pub(crate) leaving: Option<crate::handover::Leaving>,
    /// And until then.
    pub(crate) heirless: crate::handover::Heirless,
}

/// A fault that could not be answered at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) space: SpaceId,
    pub(crate) address: usize,
    pub(crate) write: bool,
    pub(crate) thread: u32,
    pub(crate) since: Nanos,
}

/// A page of a fetch that is under way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FetchingPage {
    pub(crate) address: usize,
    pub(crate) frame: FrameId,
    /// A thread waits for it.
    pub(crate) wanted: bool,
    /// The program has dropped it meanwhile.
    pub(crate) cancelled: bool,
    /// Its slot, if it is held for this page alone: see [`Engine::cancel`].
    pub(crate) held: Option<PageIndex>,
}

/// A fetch that is under way, or has arrived and waits to be installed.
#[derive(Debug)]
pub(crate) struct Fetch {
    pub(crate) space: SpaceId,
    pub(crate) pages: Vec<FetchingPage>,
    /// The page that stays uninstalled to show the stream's progress; 0: none.
    pub(crate) marker: usize,
    pub(crate) thread: u32,
    pub(crate) pull: Option<Pull>,
    /// When the fault that caused it was read; `None` for read-ahead.
    pub(crate) fault_at: Option<Nanos>,
    pub(crate) submitted_at: Nanos,
}

/// Pages asked for with the faulting one in the first request of a long plan; the rest follows in
/// requests of this size too, so that installing overlaps with receiving.
const FETCH_PAGES_MAX: usize = 64;
/// Passes of the clock hand that a page survives for a hit in the victim buffer.
const USES_PER_HIT: u8 = 2;
/// A fault waits this long at most for room within the limit. What is there may be memory that
/// cannot be moved, or is not adopted yet: then the limit is exceeded, page by page, but nobody
/// waits for ever. Longer than a healthy server takes for all stores under way.
const FULL_WAIT_NANOS_MAX: u64 = 200_000_000;
/// Requests at once; more faults wait. 64 of 64 pages are 16 MiB.
const FETCHES_MAX: usize = 64;

/// What the kernel answers when a run reaches over the border of two mappings: less of it may do.
pub(crate) const BORDER: Progress = Progress { bytes: 0, stop: Some(Stop::Gone) };

/// The pager. See the module's text.
#[derive(Debug)]
pub struct Engine {
    pub(crate) spaces: Vec<Space>,
    pub(crate) next_space: u32,
    pub(crate) adopted: RangeSet,
    pub(crate) pinned: RangeSet,
    pub(crate) quarantine: crate::events::Quarantine,
    pub(crate) changes: crate::changes::Changes,
    pub(crate) frames: FramePool,
    pub(crate) slots: Slots,
    pub(crate) budget: Budget,
    pub(crate) hand: usize,
    pub(crate) sharing: crate::sharing::Sharing,
    pub(crate) heir: crate::handover::Heir,
    /// Pages of a forked child that is large enough for a pager of its own; 0: there are none.
    pub(crate) heir_mark: usize,
    /// Nothing is moved out before: too many pages were busy.
    pub(crate) evict_after: Nanos,
    /// How long the last such pause was, in microseconds; 0: the last step moved pages.
    pub(crate) busy_pause_us: u64,
    pub(crate) threads: Threads,
    pub(crate) short_moves: crate::install::ShortMoves,
    pub(crate) fetches: HashMap<u64, Fetch>,
    pub(crate) arrived: VecDeque<Fetch>,
    /// Slots of pages that were dropped while they were fetched.
    pub(crate) held_slots: usize,
    pub(crate) stores: HashMap<u64, Vec<FrameId>>,
    pub(crate) looks: crate::looks::Looks,
    pub(crate) deferred: VecDeque<Fault>,
    pub(crate) markers: VecDeque<(usize, FrameId)>,
    pub(crate) releases: Vec<PageRange>,
    /// The request for a larger region that is under way.
    pub(crate) growing: Option<u64>,
    /// Over the limit, and nothing can be moved out nor is on its way out.
    pub(crate) stuck: bool,
    /// Pages of the ranges have come or gone without being counted.
    pub(crate) recount: bool,
    /// The last growth was refused, when.
    pub(crate) full: Option<(StoreError, Nanos)>,
    /// Nothing is read ahead before: something of that was refused.
    pub(crate) alone_until: Nanos,
    /// Slots of pages that are here are not looked for before.
    pub(crate) copies_after: Nanos,
    pub(crate) counts: Counts,
    pub(crate) samples: Vec<Sample>,
    pub(crate) readahead_pages_max: u32,
    pub(crate) adoption: crate::adopt::Adoption,
    next_version: u64,
    next_ticket: u64,
    pub(crate) scope: Scope,
    /// A page that the servers do not have is zero.
    pub(crate) zeros_are_absent: bool,
    /// Requests to forget pages that are under way.
    pub(crate) releasing: usize,
    /// A move has ended early though pages were there that could have been moved.
    pub(crate) cut_short: bool,
    secret: [u8; 192],
    zero_fingerprint: Fingerprint,
    zero_end: usize,
    zero_run: usize,
    fetch_buffer: Vec<FetchPage>,
    frame_buffer: Vec<FrameId>,
    spare_pages: Vec<Vec<FetchingPage>>,
    pub(crate) scan: crate::evict::Scan,
}

pub(crate) fn fingerprint(secret: &[u8; 192], bytes: &[u8; PAGE_SIZE]) -> Fingerprint {
    XxHash3_128::oneshot_with_secret(secret, bytes)
        .unwrap_or_else(|_| unreachable!("the secret has the length that the hash asks for"))
}

impl Engine {
    /// A pager with `windows` windows of frames, for memory none of which is adopted yet.
    #[must_use]
    pub fn new(config: &Config, windows: usize) -> Self {
        let zero_fingerprint = fingerprint(&config.secret, &[0; PAGE_SIZE]);
        let mut slots = Slots::new(config.slots);
        slots.set_capacity(config.region_pages);
        Self {
            spaces: vec![Space {
                id: SpaceId::OWN,
                parent: None,
                table: PageTable::new(slots.holders()),
                streams: Streams::new(config.readahead_pages_max),
                ranges: RangeSet::default(),
                doubts: Vec::new(),
                leaving: None,
                heirless: crate::handover::Heirless::default(),
            }],
            next_space: 1,
            adopted: RangeSet::default(),
            pinned: RangeSet::default(),
            quarantine: crate::events::Quarantine::default(),
            changes: crate::changes::Changes::default(),
            frames: FramePool::new(windows),
            slots,
            budget: Budget::new(config.limit_bytes),
            hand: 0,
            sharing: crate::sharing::Sharing::default(),
            heir: crate::handover::Heir::default(),
            heir_mark: usize::try_from(config.heir_mark_bytes >> 12).unwrap_or(usize::MAX),
            evict_after: Nanos::new(0),
            busy_pause_us: 0,
            threads: Threads::default(),
            short_moves: crate::install::ShortMoves::default(),
            fetches: HashMap::new(),
            arrived: VecDeque::new(),
            held_slots: 0,
            stores: HashMap::new(),
            looks: crate::looks::Looks::new(config.lent_pages_min),
            deferred: VecDeque::new(),
            markers: VecDeque::new(),
            releases: Vec::new(),
            growing: None,
            stuck: false,
            recount: false,
            full: None,
            alone_until: Nanos::new(0),
            copies_after: Nanos::new(0),
            counts: Counts::default(),
            samples: Vec::new(),
            readahead_pages_max: config.readahead_pages_max,
            adoption: crate::adopt::Adoption::default(),
            next_version: 1,
            next_ticket: 1,
            secret: config.secret,
            zero_fingerprint,
            scope: config.scope,
            zeros_are_absent: config.zeros_are_absent,
            releasing: 0,
            cut_short: false,
            zero_end: 0,
            zero_run: 1,
            fetch_buffer: Vec::new(),
            frame_buffer: Vec::new(),
            spare_pages: Vec::new(),
            scan: crate::evict::Scan::default(),
        }
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = self.counts;
        let (in_use, peak) = self.slots.in_use();
        counts.external_pages = in_use;
        counts.external_pages_peak = peak;
        counts.victim_pages = self.frames.victim_frames() as u64;
        counts
    }

    /// Hands over the latencies measured since the last call.
    pub fn drain_samples(&mut self, each: &mut dyn FnMut(Sample)) {
        self.samples.drain(..).for_each(each);
    }

    /// Whether threads wait for something that the next turn can answer without news from
    /// outside.
    #[must_use]
    pub fn has_deferred(&self) -> bool {
        let put_off = !self.adoption.wanted_plans.is_empty();
        put_off
            || !self.deferred.is_empty()
            || !self.arrived.is_empty()
            || self.heir.is_unchecked
            || self.changes.wait_anywhere()
    }

    /// Whether pages under the clock hand have become colder in the last turn: they go out if it goes on.
    pub(crate) const fn has_cooled(&self) -> bool {
        self.scan.cooled
    }

    /// Whether something waits for the kernel to let pages be filled or moved, or for a moment without a change.
    #[must_use]
    pub fn is_held_up(&self) -> bool {
        self.has_deferred() || self.budget.excess() > 0 || self.changes.has_long_past()
    }

    /// Whether the store has been asked for anything that it has not done yet, or is to be.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.is_waiting() || self.has_unreleased()
    }

    /// Whether the servers have yet to forget, or to confirm that they have forgotten, pages that the program
    /// has dropped.
    pub(crate) fn has_unreleased(&self) -> bool {
        let held = self.held_slots > 0 || self.changes.concern(SpaceId::OWN);
        held || self.releasing > 0 || !self.releases.is_empty()
    }

    /// Whether a thread waits for pages that the store is asked for.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        self.fetches.values().any(|fetch| fetch.fault_at.is_some())
    }

    /// Whether requests to the store are under way.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.fetches.is_empty() || !self.stores.is_empty() || self.growing.is_some()
    }

    pub(crate) fn fingerprint(&self, bytes: &[u8; PAGE_SIZE]) -> Fingerprint {
        fingerprint(&self.secret, bytes)
    }

    pub(crate) const fn zero_fingerprint(&self) -> Fingerprint {
        self.zero_fingerprint
    }

    pub(crate) const fn take_version(&mut self) -> Version {
        let version = Version::new(self.next_version);
        self.next_version += 1;
        version
    }

    /// Versions to come are greater than or equal to this one.
    pub fn skip_versions(&mut self, next: Version) {
        self.next_version = self.next_version.max(next.get());
    }

    /// The newest request to the store.
    pub(crate) const fn last_ticket(&self) -> u64 {
        self.next_ticket - 1
    }

    pub(crate) const fn secret(&self) -> [u8; 192] {
        self.secret
    }

    pub(crate) fn set_secret(&mut self, secret: [u8; 192]) {
        self.secret = secret;
        self.zero_fingerprint = fingerprint(&secret, &[0; PAGE_SIZE]);
    }

    pub(crate) const fn take_ticket(&mut self) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        ticket
    }

    pub(crate) fn space_mut(&mut self, id: SpaceId) -> Option<&mut Space> {
        self.spaces.iter_mut().find(|space| space.id == id)
    }

    pub(crate) fn table_mut(&mut self, id: SpaceId) -> Option<&mut PageTable> {
        self.space_mut(id).map(|space| &mut space.table)
    }

    /// The table of the own space, which always exists.
    pub(crate) fn own_table(&mut self) -> &mut PageTable {
        &mut self.spaces[0].table
    }

    /// Answers a fault, or begins to.
    ///
    /// # Errors
    /// [`Fatal`]: the program must be stopped.
    pub fn on_fault(
        &mut self,
        io: &mut Io<'_>,
        space: SpaceId,
        address: usize,
        write: bool,
        thread: u32,
    ) -> Result<(), Fatal> {
        self.counts.faults += 1;
        // A thread that is signalled while it waits in the kernel faults again and again.
        let waits = |f: &Fault| (f.space, f.address, f.thread) == (space, address, thread);
        if self.deferred.iter().any(waits) {
            return Ok(());
        }
        if space == SpaceId::OWN && self.adopted.find(address).is_none() {
            // mremap has made a registered mapping larger.
            self.adoption.unknown = true;
        }
        let since = (io.clock)();
        self.answer(io, Fault { space, address, write, thread, since })
    }

    /// Tries the faults that had to wait once more.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn retry_deferred(&mut self, io: &mut Io<'_>) -> Result<(), Fatal> {
        for _ in 0..self.deferred.len() {
            let Some(fault) = self.deferred.pop_front() else {
                break;
            };
            self.answer(io, fault)?;
        }
        Ok(())
    }

    fn answer(&mut self, io: &mut Io<'_>, fault: Fault) -> Result<(), Fatal> {
        if self.changes.wait_in(fault.space) || self.heir.is_unchecked {
            self.deferred.push_back(fault);
            return Ok(());
        }
        if self.space_mut(fault.space).is_some_and(|space| space.leaving.is_some()) {
            // Whoever serves the child next wakes the thread, and hears it again.
            return Ok(());
        }
        self.settle_doubts(io, fault.space, fault.thread);
        let full = self.budget.is_full()
            && !self.stuck
            && (io.clock)().since(fault.since) < FULL_WAIT_NANOS_MAX;
        let Some(space) = self.space_mut(fault.space) else {
            return Ok(());
        };
        let place = space.table.get(fault.address).map(|entry| entry.place());
        if !matches!(place, Some(Place::Resident | Place::Fetching | Place::Victim(_)))
            && self.awaits_heir(io, &fault)
        {
            self.deferred.push_back(fault);
            return Ok(());
        }
        let Some(space) = self.space_mut(fault.space) else {
            return Ok(());
        };
        match place {
            // What needs memory waits until something has been moved out, if anything can be.
            None | Some(Place::Zero | Place::Out) if full => self.deferred.push_back(fault),
            None | Some(Place::Zero) => self.zero_fill(io, fault),
            Some(Place::Resident) => self.look_again(io, fault)?,
            Some(Place::Fetching) => self.want(fault),
            Some(Place::Victim(frame)) => self.bring_back(io, fault, frame)?,
            Some(Place::Out) => {
                let plan = space.streams.on_fault(fault.address, false);
                self.credit(plan);
                self.fetch(io, Some(fault), fault.space, plan)?;
            }
        }
        Ok(())
    }

    fn credit(&mut self, plan: Option<Plan>) {
        self.counts.readahead_hits += plan.map_or(0, |plan| u64::from(plan.used));
    }

    /// The page should be there: another fault of the same page was answered meanwhile.
    fn look_again(&mut self, io: &mut Io<'_>, fault: Fault) -> Result<(), Fatal> {
        let page = AddressRange::pages_from(fault.address, 1);
        if fault.space == SpaceId::OWN {
            let mut there = false;
            io.memory.present(page, &mut |run| there = run.kind != PageKind::Guard);
            if !there && self.quarantine.overlaps(page) {
                // It was filled after its removal was announced and before it was done.
                self.drop_pages(io, fault.space, page);
                self.deferred.push_back(fault);
                return Ok(());
            }
            // While mappings change the page may be gone for a good reason not yet read.
            let entry = self.own_table().get(fault.address);
            if !there && entry.is_some_and(|entry| entry.copy().is_none()) {
                // It has never been out: MADV_FREE let the kernel take it back.
                self.drop_pages(io, fault.space, page);
                self.deferred.push_back(fault);
                return Ok(());
            }
            if !there && io.memory.settled() {
                let quiet = (io.clock)().since(fault.since) > 1_000_000_000;
                if quiet {
                    return Err(Fatal::Missing { address: fault.address });
                }
                self.deferred.push_back(fault);
                return Ok(());
            }
        }
        io.memory.wake(fault.space, page);
        Ok(())
    }

    /// A thread waits for a page that is on its way.
    fn want(&mut self, fault: Fault) {
        let fetches = self.fetches.values_mut().chain(self.arrived.iter_mut());
        let pages = fetches.filter(|f| f.space == fault.space).flat_map(|f| f.pages.iter_mut());
        for page in pages.filter(|page| page.address == fault.address && !page.cancelled) {
            page.wanted = true;
        }
        // A stream's marker that has not arrived yet: go on with the stream all the same.
        if let Some(space) = self.space_mut(fault.space)
            && let Some(plan) = space.streams.on_fault(fault.address, true)
        {
            self.credit(Some(plan));
            self.adoption.wanted_plans.push((fault.space, plan));
        }
    }

    /// Starts the read-ahead that faults on pages under way have asked for.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn start_wanted_plans(&mut self, io: &mut Io<'_>) -> Result<(), Fatal> {
        while !self.budget.is_full() || self.stuck {
            let Some((space, plan)) = self.adoption.wanted_plans.pop() else { break };
            self.fetch(io, None, space, Some(plan))?;
        }
        Ok(())
    }

    /// Fills an untouched page, and its successors if the program touches page after page.
    fn zero_fill(&mut self, io: &mut Io<'_>, fault: Fault) {
        let run = self.zero_run_from(fault);
        let mut range = AddressRange::pages_from(fault.address, run);
        let pull = self.threads.on_fault(fault.thread, fault.since);
        // The shared zero page would be replaced on a later write without our knowledge; where
        // only our own doings are counted that must not be.
        let written = fault.write || self.scope == Scope::Ranges;
        self.threads.on_wake(fault.thread, fault.since);
        let mut progress = io.memory.zero_in(fault.space, range, written, pull);
        if progress == BORDER && run > 1 {
            range = AddressRange::pages_from(fault.address, 1);
            progress = io.memory.zero_in(fault.space, range, written, pull);
        }
        let pages = progress.bytes / PAGE_SIZE;
        if pages == 0 {
            match progress.stop {
                Some(Stop::Retry | Stop::NoMemory) => self.deferred.push_back(fault),
                _ => io.memory.wake(fault.space, AddressRange::pages_from(fault.address, 1)),
            }
            return;
        }
        self.zero_end = fault.address + progress.bytes;
        self.counts.zero_pages += pages as u64;
        if written && fault.space == SpaceId::OWN {
            self.budget.allocated(pages);
        }
        let quarantined = fault.space == SpaceId::OWN && self.quarantine.overlaps(range);
        if let Some(table) = self.table_mut(fault.space) {
            for address in (range.start()..range.start() + progress.bytes).step_by(PAGE_SIZE) {
                table.take(address);
                if quarantined {
                    // Filled after the removal was announced: what is there now is new.
                    table.put(address, Entry::new(Place::Resident));
                }
            }
        }
        self.sample(Latency::Fault, (io.clock)().since(fault.since));
    }

    /// How many untouched pages to fill from the fault's address on.
    fn zero_run_from(&mut self, fault: Fault) -> usize {
        let end = match fault.space {
            SpaceId::OWN => self.adopted.find(fault.address).map_or(0, AddressRange::end),
            _ => 0,
        };
        self.zero_run = if fault.address == self.zero_end {
            (self.zero_run * 2).min(ZERO_RUN_PAGES)
        } else {
            1
        };
        let room = end.saturating_sub(fault.address) / PAGE_SIZE;
        let most = self.zero_run.min(room.max(1));
        let table = &self.spaces[0].table;
        if fault.space != SpaceId::OWN {
            return 1;
        }
        let untouched = |at: &usize| {
            let place = table.get(fault.address + at * PAGE_SIZE).map(|entry| entry.place());
            matches!(place, None | Some(Place::Zero))
        };
        (1..most).take_while(untouched).count() + 1
    }

    /// The page is still in the victim buffer: no network.
    fn bring_back(&mut self, io: &mut Io<'_>, fault: Fault, frame: FrameId) -> Result<(), Fatal> {
        let pull = self.threads.on_fault(fault.thread, fault.since);
        // Noted before: it may have run, and faulted again, when the call returns.
        self.threads.on_wake(fault.thread, fault.since);
        let progress = io.memory.copy_in(fault.space, fault.address, frame, 1, pull);
        match progress.stop {
            None => {}
            Some(Stop::Retry | Stop::NoMemory) => {
                self.deferred.push_back(fault);
                return Ok(());
            }
            Some(_) => {
                // Unmapped meanwhile: its event will say so.
                io.memory.wake(fault.space, AddressRange::pages_from(fault.address, 1));
                return Ok(());
            }
        }
        self.budget.allocated(1);
        // That the program came to a marker was foreseen: it says nothing of the page's use.
        let is_marker = self.is_marker(fault.address, frame);
        self.counts.victim_hits += 1;
        let mut moved_out = false;
        if let Some(entry) = self.own_table().get_mut(fault.address) {
            entry.set_place(Place::Resident);
            if !is_marker {
                entry.set_uses(entry.uses() + USES_PER_HIT);
            }
            moved_out = true;
        }
        debug_assert!(moved_out);
        self.forget_frame(frame);
        self.sample(Latency::Fault, (io.clock)().since(fault.since));
        let plan =
            self.space_mut(fault.space).and_then(|s| s.streams.on_fault(fault.address, true));
        self.credit(plan);
        if plan.is_some() {
            self.fetch(io, None, fault.space, plan)?;
        }
        Ok(())
    }

    /// The page in this frame is no longer needed there.
    pub(crate) fn forget_frame(&mut self, frame: FrameId) {
        match self.frames.frame(frame) {
            FrameUse::Writing(_) => self.frames.set(frame, FrameUse::Abandoned),
            FrameUse::Victim(_) if self.frames.is_queued(frame) => {
                self.frames.set(frame, FrameUse::Spent);
            }
            FrameUse::Victim(_) | FrameUse::Receiving => self.frames.pool(frame),
            FrameUse::Hole | FrameUse::Pooled | FrameUse::Spent | FrameUse::Abandoned => {
                unreachable!("a frame without a page cannot lose it")
            }
        }
    }

    /// Asks for the page of a fault and for what is planned with it.
    pub(crate) fn fetch(
        &mut self,
        io: &mut Io<'_>,
        fault: Option<Fault>,
        space: SpaceId,
        plan: Option<Plan>,
    ) -> Result<(), Fatal> {
        if self.space_mut(space).is_some_and(|space| space.leaving.is_some()) {
            return Ok(());
        }
        let mut wanted: Vec<usize> = fault.iter().map(|fault| fault.address).collect();
        if self.fetches.len() >= FETCHES_MAX {
            self.deferred.extend(fault);
            return Ok(());
        }
        let mut plan = plan.filter(|_| (io.clock)() >= self.alone_until);
        if self.budget.is_full() && !self.stuck {
            // What is read ahead waits until there is room for it.
            let plans = &mut self.adoption.wanted_plans;
            if plans.len() < FETCHES_MAX {
                plans.extend(plan.take().map(|plan| (space, plan)));
            }
            plan = None;
        }
        let mut marker = 0;
        if let (Some(plan), Some(Space { table, streams, .. })) = (plan, self.space_mut(space)) {
            let out = |at: &usize| table.get(*at).is_some_and(|e| e.place() == Place::Out);
            let known = wanted.len();
            wanted.extend(
                plan.addresses().filter(out).filter(|at| fault.is_none_or(|f| f.address != *at)),
            );
            let planned = &wanted[known..];
            streams.brought(plan.start, u32::try_from(planned.len()).unwrap_or(u32::MAX));
            if plan.marked && space == SpaceId::OWN {
                marker = planned.first().copied().unwrap_or(0);
            }
        }
        let mut fault = fault;
        let mut rest = wanted.as_slice();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(FETCH_PAGES_MAX));
            if !self.submit_fetch(io, fault, space, now, marker)? {
                // Without the frames or the queue for it only the faulting page matters.
                self.deferred.extend(fault);
                break;
            }
            fault = None;
            marker = 0;
            rest = later;
        }
        Ok(())
    }

    fn submit_fetch(
        &mut self,
        io: &mut Io<'_>,
        fault: Option<Fault>,
        space: SpaceId,
        addresses: &[usize],
        marker: usize,
    ) -> Result<bool, Fatal> {
        let mut frames = std::mem::take(&mut self.frame_buffer);
        frames.clear();
        self.take_frames(io, addresses.len(), &mut frames);
        let addresses = &addresses[..frames.len()];
        let mut pages = self.spare_pages.pop().unwrap_or_default();
        let mut request = std::mem::take(&mut self.fetch_buffer);
        pages.clear();
        request.clear();
        for (&address, &frame) in addresses.iter().zip(&frames) {
            let copy =
                self.table_mut(space).and_then(|t| t.get(address)).and_then(|entry| entry.copy());
            let Some((page, version)) = copy else {
                unreachable!("a page that is out has a copy on the servers")
            };
            request.push(FetchPage { page, version, frame });
            let wanted = fault.is_some_and(|fault| fault.address == address);
            pages.push(FetchingPage { address, frame, wanted, cancelled: false, held: None });
        }
        self.frame_buffer = frames;
        let ticket = self.take_ticket();
        let submitted = if request.is_empty() {
            Err(StoreError::Busy { limit: 0 })
        } else if fault.is_some() {
            io.store.submit(ticket, Request::Fetch(&request))
        } else {
            io.store.submit(ticket, Request::FetchAhead(&request))
        };
        self.fetch_buffer = request;
        match submitted {
            Ok(()) => {}
            Err(StoreError::Busy { .. }) => {
                for page in &pages {
                    self.frames.pool(page.frame);
                }
                self.spare_pages.push(pages);
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
        for page in &pages {
            if let Some(entry) = self.table_mut(space).and_then(|t| t.get_mut(page.address)) {
                entry.set_place(Place::Fetching);
            }
        }
        let readahead = pages.len() - usize::from(fault.is_some());
        self.counts.readahead_pages += readahead as u64;
        let thread = fault.map_or(0, |fault| fault.thread);
        let pull = fault.and_then(|f| self.threads.on_fault(f.thread, f.since));
        let fetch = Fetch {
            space,
            pages,
            marker,
            thread,
            pull,
            fault_at: fault.map(|fault| fault.since),
            submitted_at: (io.clock)(),
        };
        self.fetches.insert(ticket.0, fetch);
        Ok(true)
    }

    /// Handles what the store has finished.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn on_completion(&mut self, io: &mut Io<'_>, completion: Completion) -> Result<(), Fatal> {
        let ticket = completion.ticket.0;
        match completion.result {
            Ok(Outcome::Fetched { server_nanos }) => {
                let Some(fetch) = self.fetches.remove(&ticket) else {
                    return Ok(());
                };
                self.counts.fetched_pages += fetch.pages.len() as u64;
                if fetch.fault_at.is_some() {
                    let network = (io.clock)().since(fetch.submitted_at);
                    self.sample(Latency::Network, network.saturating_sub(server_nanos));
                    self.sample(Latency::Server, server_nanos);
                }
                self.install(io, fetch);
                Ok(())
            }
            Ok(Outcome::Stored) => {
                let frames = self.stores.remove(&ticket).unwrap_or_default();
                self.counts.written_pages += frames.len() as u64;
                for frame in frames {
                    match self.frames.frame(frame) {
                        FrameUse::Writing(at) => self.frames.set(frame, FrameUse::Victim(at)),
                        _ => self.frames.set(frame, FrameUse::Spent),
                    }
                }
                Ok(())
            }
            Ok(Outcome::Released) => {
                self.releasing = self.releasing.saturating_sub(1);
                Ok(())
            }
            Ok(Outcome::Grown { pages }) => {
                self.growing = None;
                self.full = None;
                self.slots.set_capacity(pages);
                Ok(())
            }
            Err(error @ (StoreError::Full { .. } | StoreError::DiskFull { .. }))
                if self.growing == Some(ticket) =>
            {
                self.growing = None;
                self.full = Some((error, (io.clock)()));
                Ok(())
            }
            Err(error @ (StoreError::Refused { .. } | StoreError::Disk { .. }))
                if self.fetches.contains_key(&ticket) =>
            {
                self.on_refused_fetch(io, ticket, error)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Drops one holder of a slot; the servers forget the page with the last one.
    pub(crate) fn release(&mut self, slot: PageIndex) {
        if !self.slots.release(slot) {
            return;
        }
        match self.releases.last_mut() {
            Some(run) if run.end() == Some(slot) => {
                run.count = PageCount::new(run.count.get() + 1);
            }
            _ => self.releases.push(PageRange { start: slot, count: PageCount::new(1) }),
        }
    }

    pub(crate) fn sample(&mut self, latency: Latency, nanos: u64) {
        self.samples.push(Sample { latency, nanos });
    }

    pub(crate) fn recycle(&mut self, pages: Vec<FetchingPage>) {
        if self.spare_pages.len() < FETCHES_MAX {
            self.spare_pages.push(pages);
        }
    }
}
