//! What the pager needs of an address space, and the real one behind it.

use std::cell::Cell;
use std::io;
use std::sync::Arc;

use farmem_region::{Errand, FrameId, Frames, Loan, Nanos, PAGE_SHIFT, PAGE_SIZE};
use farmem_vmem::{
    AddressRange, Anchor, Errands, Event, Features, ForkMark, Lifeline, Look, MadviseWatch,
    Mapping, PageKind, Pagemap, Porter, PresentRun, ProcessMaps, Progress, Pull, ResidentMeter,
    Residents, Scratch, Stop, ThreadWatch, Uffd, UffdError,
};
use rustix::process::Pid;

use crate::relief::Relief;

/// Names one address space that the pager serves: the program's own, or a forked child's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpaceId(pub u32);

impl SpaceId {
    /// The address space that the pager shares.
    pub const OWN: Self = Self(0);
}

/// The operations on address spaces that paging is made of. Every call is one system call or
/// little more; none waits. Pages are named by their addresses, frames by their numbers.
pub trait Memory: Frames {
    /// Copies frames into missing pages and wakes who waits. With `pull`, that thread continues
    /// on the pager's processor (see [`Anchor`]).
    fn copy_in(
        &mut self,
        space: SpaceId,
        target: usize,
        first: FrameId,
        count: usize,
        pull: Option<Pull>,
    ) -> Progress;
    /// The frame is about to be read.
    fn prefetch(&self, _frame: FrameId) {}
    /// Moves frames into missing pages of the own space and wakes who waits.
    fn move_in(&mut self, target: usize, first: FrameId, count: usize) -> Progress;
    /// Moves the pages of a range that are there into frames that are holes.
    fn move_out(&mut self, source: AddressRange, first: FrameId) -> Progress;
    /// Begins to make pages of the own space movable that a forked child has too; false if that
    /// cannot be done, or not now. Others may use the pages meanwhile.
    fn unshare(&mut self, range: AddressRange) -> bool;
    /// Returns when one of the errands that were taken, if there are any, has been delivered.
    fn await_errand(&mut self);
    /// Takes the next range of which [`Self::unshare`] has done what can be done.
    fn unshared(&mut self) -> Option<AddressRange>;
    /// Fills missing pages with zeros, with memory of their own if they will be `written`.
    fn zero_in(
        &mut self,
        space: SpaceId,
        range: AddressRange,
        written: bool,
        pull: Option<Pull>,
    ) -> Progress;
    /// Makes the threads that wait in the range look again.
    fn wake(&mut self, space: SpaceId, range: AddressRange);
    /// The pages and guards of the own space that are there.
    fn present(&self, range: AddressRange, each: &mut dyn FnMut(PresentRun));
    /// The first page of a range of the own space that is there.
    fn first_present(&self, range: AddressRange) -> Option<usize>;
    /// Calls `each` for the frames that were holes and have got memory from outside: they hold nobody's
    /// page.
    fn find_strays(&mut self, first: FrameId, count: usize, each: &mut dyn FnMut(FrameId));
    /// Whether a frame has memory.
    fn frame_present(&self, frame: FrameId) -> bool;
    /// Gives frames that are holes memory; returns how many got it.
    fn populate(&mut self, first: FrameId, count: usize) -> usize;
    /// Gives the memory of frames back; what the kernel keeps is still present.
    fn discard(&mut self, first: FrameId, count: usize);
    /// Whether no change of the own space's mappings is under way or unread.
    fn settled(&mut self) -> bool {
        self.look(SpaceId::OWN, 0) != Look::Changing
    }
    /// Looks at an address of a space. Whatever the address, it tells whether a change of that
    /// space's mappings is under way or unread.
    fn look(&mut self, space: SpaceId, address: usize) -> Look;
    /// Begins to watch the threads of the own space that may be dropping pages now. To be called
    /// when it is [settled](Self::settled).
    fn watch_removers(&mut self);
    /// Whether all of them have done it.
    fn removers_are_done(&mut self) -> bool;
    /// How often reading events, of any space, has begun or ended so far.
    fn readings(&self) -> u64;
    /// What [`Self::readings`] was at the instant when the own space's child was forked; `thread` is
    /// one of the child's. `None` if it is not known.
    fn readings_at_fork(&mut self, child: SpaceId, thread: u32) -> Option<u64>;
    /// Reports missing pages of the range from now on, if the kernel permits.
    fn register(&mut self, range: AddressRange) -> Registration;
    /// Calls `each` for the parts of `ranges`, just registered, whose missing pages are reported
    /// now. What was not mapped at that moment, or has been unmapped without a report before it, is
    /// not, whatever is mapped there since. `ranges` are in order and apart.
    fn registered(
        &mut self,
        ranges: &[AddressRange],
        each: &mut dyn FnMut(AddressRange),
    ) -> io::Result<()>;
    /// Calls `each` for every mapping of the own space.
    fn mappings(&mut self, each: &mut dyn FnMut(Mapping)) -> io::Result<()>;
    /// Calls `each` for the memory of the pager itself, which must never be adopted.
    fn owned(&self, each: &mut dyn FnMut(AddressRange));
    /// Calls `each` for every range that must stay because the kernel writes there when a thread
    /// ends.
    fn control_blocks(&mut self, each: &mut dyn FnMut(AddressRange));
    /// Memory that the own space uses.
    fn resident(&self) -> Residents;
    /// Processor time that the program has used so far; `None` if it is not known.
    fn ran(&self) -> Option<Nanos> {
        None
    }
    /// Pages of anonymous memory of the process of a thread; `None` if it is not known.
    fn resident_of(&self, thread: u32) -> Option<usize>;
    /// A forked child reports here from now on.
    fn add_space(&mut self, space: SpaceId, uffd: Uffd);
    /// The child is gone.
    fn remove_space(&mut self, space: SpaceId);
    /// Whether the child's address space still exists.
    fn space_lives(&mut self, space: SpaceId) -> bool;
}

/// What became of a request to register memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registration {
    /// Its missing pages are reported from now on.
    Done,
    /// It belongs to a userfaultfd of the program.
    Foreign,
    /// It is gone, or of a kind that cannot be registered.
    Refused,
}

/// The real address space of the calling process.
#[derive(Debug)]
pub struct OwnMemory {
    program: Pid,
    uffd: Uffd,
    children: Vec<(SpaceId, Uffd)>,
    scratch: Scratch,
    pagemap: Pagemap,
    /// The program has set guards. A copy would replace one: the kernel takes it for nothing.
    guards: Cell<bool>,
    maps: ProcessMaps,
    meter: ResidentMeter,
    threads: ThreadWatch,
    /// Counts the readings of the program's events, for forked children to have a copy.
    mark: ForkMark,
    removers: MadviseWatch,
    relief: Relief,
    errands: Arc<Errands>,
    porter: Arc<Porter>,
    anchor: Anchor,
    owned: fn(&mut dyn FnMut(AddressRange)),
}

/// The real address space cannot be paged.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// userfaultfd refuses.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// /proc refuses.
    #[error("cannot read the program's {file} in /proc: {error}; is /proc mounted?")]
    Proc {
        /// What was to be read.
        file: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}

static ZEROS: [u8; ZERO_RUN_PAGES * PAGE_SIZE] = [0; ZERO_RUN_PAGES * PAGE_SIZE];
/// Pages that one call fills with zeros at most.
pub(crate) const ZERO_RUN_PAGES: usize = 64;

impl MemoryError {
    /// For a file that /proc refuses.
    pub(crate) fn at(file: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Proc { file, error }
    }
}

impl OwnMemory {
    /// Prepares paging in the calling process, whose memory `program` shares, with a scratch area
    /// of `windows` windows. Nothing of the program is registered yet. `owned` tells what other
    /// memory belongs to the pager, at any time: its heap grows.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new(
        program: Pid,
        windows: usize,
        owned: fn(&mut dyn FnMut(AddressRange)),
    ) -> Result<Self, MemoryError> {
        Self::inheriting(program, windows, owned, Uffd::new(Features::Events)?)
    }

    /// As [`Self::new`], with the userfaultfd that the process got as a forked child: what was
    /// registered in its parent's memory is so in its own.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn inheriting(
        program: Pid,
        windows: usize,
        owned: fn(&mut dyn FnMut(AddressRange)),
        uffd: Uffd,
    ) -> Result<Self, MemoryError> {
        let scratch = Scratch::new(&uffd, windows)?;
        Ok(Self {
            uffd,
            program,
            children: Vec::new(),
            scratch,
            pagemap: Pagemap::open().map_err(MemoryError::at("pagemap"))?,
            guards: Cell::new(false),
            maps: ProcessMaps::open().map_err(MemoryError::at("maps"))?,
            meter: ResidentMeter::open().map_err(MemoryError::at("statm"))?,
            threads: ThreadWatch::open(program).map_err(MemoryError::at("task"))?,
            mark: ForkMark::new()
                .map_err(|source| UffdError::Other { doing: "leaving a mark for forks", source })?,
            removers: MadviseWatch::open(program).map_err(MemoryError::at("task"))?,
            relief: Relief::new(program),
            errands: Arc::new(Errands::new().map_err(MemoryError::at("pagemap"))?),
            porter: Arc::new(Porter::new().map_err(|source| UffdError::Other {
                doing: "making an event descriptor",
                source,
            })?),
            anchor: Anchor::none(),
            owned,
        })
    }

    /// The program's userfaultfd.
    #[must_use]
    pub const fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// The scratch area.
    pub const fn scratch(&mut self) -> &mut Scratch {
        &mut self.scratch
    }

    /// What a second thread of the pager should run, or pages that were shared with a forked child
    /// stay in memory.
    #[must_use]
    pub fn errands(&self) -> Arc<Errands> {
        Arc::clone(&self.errands)
    }

    /// What another one should run, or the pager does that work too. Its bell calls for a turn with
    /// [`Ready::store`](crate::Ready::store).
    #[must_use]
    pub fn porter(&self) -> Arc<Porter> {
        Arc::clone(&self.porter)
    }

    /// Does some of the porter's work, if it has more than it is at. Returns whether there was any.
    pub fn help_porter(&self) -> bool {
        self.porter.help()
    }

    /// To be called at the end of every turn in which something waits to be filled or moved, and while
    /// [`Self::is_holding`]: sees that threads which change mappings without a pause do not keep it
    /// waiting.
    pub fn relieve(&mut self, waits: bool, now: Nanos) {
        let is_stuck = waits && !self.settled();
        self.relief.step(is_stuck, now);
    }

    /// Whether threads of the program are held: they must not be for long.
    #[must_use]
    pub const fn is_holding(&self) -> bool {
        self.relief.is_holding()
    }

    /// The userfaultfds of forked children.
    #[must_use]
    pub fn children(&self) -> &[(SpaceId, Uffd)] {
        &self.children
    }

    /// Takes the events of one space.
    ///
    /// # Errors
    /// If the userfaultfd fails.
    pub fn read_events(&self, space: SpaceId, events: &mut Vec<Event>) -> Result<usize, UffdError> {
        let Some(uffd) = self.uffd_of(space) else {
            return Ok(0);
        };
        // A child forked before has another count than one forked afterwards.
        self.mark.advance();
        let count = uffd.read_events(events);
        self.mark.advance();
        count
    }

    /// By what forked children are known: see [`ForkMark::is_in`].
    #[must_use]
    pub fn mark(&self) -> (u64, u64) {
        self.mark.place_and_secret()
    }

    /// Whether a forked child's address space still exists.
    #[must_use]
    pub fn lives(&self, space: SpaceId) -> bool {
        let look = |uffd: &Uffd| uffd.look(self.mark.range().start(), &self.mark);
        self.uffd_of(space).is_some_and(|uffd| look(uffd) != Look::Ended)
    }

    fn uffd_of(&self, space: SpaceId) -> Option<&Uffd> {
        find_uffd(&self.uffd, &self.children, space)
    }

    /// From now on threads are pulled to the pager's processor as the engine asks for: see
    /// [`Anchor`]. To be called by the thread that runs the pager, of a process of its own.
    pub fn pull_threads(&mut self) {
        self.anchor = Anchor::real_time();
    }

    /// Lets the pager, which is the calling thread, yield its processor to threads that fault fast:
    /// see [`Anchor::yield_from_now_on`].
    pub fn yield_from_now_on(&mut self) -> Option<Arc<Lifeline>> {
        self.anchor.yield_from_now_on()
    }

    /// Whether what the pager wakes may run before it.
    #[must_use]
    pub fn yields(&self) -> bool {
        self.anchor.yields()
    }

    /// Whether threads are pulled to the pager's processor: not without real-time priority.
    #[must_use]
    pub const fn pulls(&self) -> bool {
        self.anchor.pulls()
    }

    /// To be called at every turn.
    pub(crate) fn turned(&mut self) {
        self.anchor.turned();
    }

    /// Lets the pager leave its processor if it has pulled no thread there since the last call.
    pub fn rest(&mut self) {
        self.anchor.rest();
    }
}

fn find_uffd<'u>(
    own: &'u Uffd,
    children: &'u [(SpaceId, Uffd)],
    space: SpaceId,
) -> Option<&'u Uffd> {
    if space == SpaceId::OWN {
        return Some(own);
    }
    children.iter().find(|(id, _)| *id == space).map(|(_, uffd)| uffd)
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        self.errands.close();
        self.porter.close();
        self.scratch.release(&self.uffd);
    }
}

const GONE: Progress = Progress { bytes: 0, stop: Some(Stop::Gone) };
const TAKEN: Progress = Progress { bytes: 0, stop: Some(Stop::AlreadyThere) };

impl Memory for OwnMemory {
    fn copy_in(
        &mut self,
        space: SpaceId,
        target: usize,
        first: FrameId,
        count: usize,
        pull: Option<Pull>,
    ) -> Progress {
        let Self { uffd, children, scratch, anchor, pagemap, guards, .. } = self;
        let Some(uffd) = find_uffd(uffd, children, space) else {
            return GONE;
        };
        let mut count = count;
        if guards.get() && space == SpaceId::OWN {
            let range = AddressRange::pages_from(target, count);
            count = match pagemap.first_taken(range) {
                Some(taken) if taken == target => return TAKEN,
                Some(taken) => (taken - target) / PAGE_SIZE,
                None => count,
            };
        }
        anchor.pull(pull, || scratch.copy_in(uffd, target, first, count))
    }

    fn prefetch(&self, frame: FrameId) {
        self.scratch.prefetch(frame);
    }

    fn move_in(&mut self, target: usize, first: FrameId, count: usize) -> Progress {
        self.scratch.move_in(&self.uffd, target, first, count)
    }

    fn move_out(&mut self, source: AddressRange, first: FrameId) -> Progress {
        self.scratch.move_out(&self.uffd, source, first, &self.pagemap)
    }

    fn unshare(&mut self, range: AddressRange) -> bool {
        self.errands.unshare(range)
    }

    fn unshared(&mut self) -> Option<AddressRange> {
        self.errands.unshared()
    }

    fn await_errand(&mut self) {
        self.porter.await_one();
    }

    fn zero_in(
        &mut self,
        space: SpaceId,
        range: AddressRange,
        written: bool,
        pull: Option<Pull>,
    ) -> Progress {
        let Self { uffd, children, anchor, pagemap, .. } = self;
        let Some(uffd) = find_uffd(uffd, children, space) else {
            return GONE;
        };
        let range = if written && space == SpaceId::OWN {
            // Nobody has asked for the others, and a copy would replace a guard of the program.
            pagemap.up_to_taken(range)
        } else {
            range
        };
        anchor.pull(
            pull,
            || {
                if written { uffd.copy_static(range, &ZEROS) } else { uffd.zero(range) }
            },
        )
    }

    fn wake(&mut self, space: SpaceId, range: AddressRange) {
        if let Some(uffd) = self.uffd_of(space) {
            uffd.wake(range);
        }
    }

    fn present(&self, range: AddressRange, each: &mut dyn FnMut(PresentRun)) {
        self.pagemap.present(range, &mut |run| {
            if run.kind == PageKind::Guard {
                self.guards.set(true);
            }
            each(run);
        });
    }

    fn first_present(&self, range: AddressRange) -> Option<usize> {
        self.pagemap.first_present(range)
    }

    fn find_strays(&mut self, first: FrameId, count: usize, each: &mut dyn FnMut(FrameId)) {
        self.scratch.find_strays(first, count, &self.pagemap, each);
    }

    fn frame_present(&self, frame: FrameId) -> bool {
        self.scratch.is_present(frame)
    }

    fn populate(&mut self, first: FrameId, count: usize) -> usize {
        self.scratch.populate(&self.uffd, first, count)
    }

    fn discard(&mut self, first: FrameId, count: usize) {
        self.scratch.discard(&self.uffd, first, count, &self.pagemap);
    }

    fn look(&mut self, space: SpaceId, address: usize) -> Look {
        // The lowest addresses are refused whatever the state.
        let address = if address == 0 { self.mark.range().start() } else { address };
        self.uffd_of(space).map_or(Look::Ended, |uffd| uffd.look(address, &self.mark))
    }

    fn watch_removers(&mut self) {
        self.removers.begin();
    }

    fn removers_are_done(&mut self) -> bool {
        let left = self.removers.is_over();
        if left {
            // Who had taken the lock has not necessarily given it back.
            self.mark.wait_for_others();
        }
        left
    }

    fn readings(&self) -> u64 {
        self.mark.count()
    }

    fn readings_at_fork(&mut self, _child: SpaceId, thread: u32) -> Option<u64> {
        self.mark.count_in(thread)
    }

    fn register(&mut self, range: AddressRange) -> Registration {
        match self.uffd.register(range) {
            Ok(()) => Registration::Done,
            Err(error) if error.is_foreign() => Registration::Foreign,
            Err(_) => Registration::Refused,
        }
    }

    fn registered(
        &mut self,
        ranges: &[AddressRange],
        each: &mut dyn FnMut(AddressRange),
    ) -> io::Result<()> {
        let mut whole = vec![false; ranges.len()];
        self.maps.for_each(&mut |Mapping { range, .. }| {
            let first = ranges.partition_point(|part| part.end() <= range.start());
            for (at, part) in ranges.iter().enumerate().skip(first) {
                if part.end() > range.end() {
                    break;
                }
                whole[at] |= part.start() >= range.start();
            }
        })?;
        // One mapping is registered as a whole or not at all, and some of it is: had all that was
        // registered been unmapped since, the report would be unread.
        if whole.iter().all(|whole| *whole) && self.settled() {
            ranges.iter().copied().for_each(each);
            return Ok(());
        }
        farmem_vmem::registered_parts(ranges, each)
    }

    fn mappings(&mut self, each: &mut dyn FnMut(Mapping)) -> io::Result<()> {
        self.maps.for_each(each)
    }

    fn owned(&self, each: &mut dyn FnMut(AddressRange)) {
        each(self.scratch.range());
        each(self.mark.range());
        (self.owned)(each);
    }

    fn control_blocks(&mut self, each: &mut dyn FnMut(AddressRange)) {
        // Fails only when the program has ended.
        let _ = self.threads.control_blocks(each);
    }

    fn resident(&self) -> Residents {
        self.meter.read().unwrap_or_default()
    }

    fn ran(&self) -> Option<Nanos> {
        farmem_vmem::processor_nanos(self.program).map(Nanos::new)
    }

    fn resident_of(&self, thread: u32) -> Option<usize> {
        let meter = ResidentMeter::open_of(thread).ok()?;
        Some(meter.read().ok()?.anonymous)
    }

    fn add_space(&mut self, space: SpaceId, uffd: Uffd) {
        self.children.push((space, uffd));
    }

    fn remove_space(&mut self, space: SpaceId) {
        self.children.retain(|(id, _)| *id != space);
    }

    fn space_lives(&mut self, space: SpaceId) -> bool {
        self.lives(space)
    }
}

impl Frames for OwnMemory {
    fn bytes(&self, frame: FrameId) -> &[u8; PAGE_SIZE] {
        self.scratch.bytes(frame)
    }
    fn bytes_mut(&mut self, frame: FrameId) -> &mut [u8; PAGE_SIZE] {
        self.scratch.bytes_mut(frame)
    }
    fn gather_mut<'a>(&'a mut self, frames: &[FrameId], slices: &mut Vec<io::IoSliceMut<'a>>) {
        self.scratch.gather_mut(frames, slices);
    }
    fn gather<'a>(&'a self, frames: &[FrameId], slices: &mut Vec<io::IoSlice<'a>>) {
        self.scratch.gather(frames, slices);
    }
    fn would_lend(&self, loan: Loan) -> bool {
        self.porter.would_take(loan)
    }
    fn lend(
        &mut self,
        frames: &[FrameId],
        loan: Loan,
        errand: Box<dyn Errand>,
    ) -> Result<(), Box<dyn Errand>> {
        self.porter.take(&mut self.scratch, frames, loan, errand)
    }
}

/// Bytes of `pages` pages.
#[must_use]
pub(crate) const fn bytes_of(pages: usize) -> usize {
    pages << PAGE_SHIFT
}
