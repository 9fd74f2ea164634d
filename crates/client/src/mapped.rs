//! [`MappedRegion`]: external memory that is used as memory.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SendError, SyncSender, sync_channel};
use std::thread::JoinHandle;

use farmem_pager::{
    Config, Flush, Flushed, LookOut, OwnMemory, Pager, Ready, Scope, SlotPolicy, Wait,
};
use farmem_region::{ByteCount, PAGE_SIZE, PageCount, PageIndex, PageStore, Version};
use farmem_remote::Absent;
use farmem_vmem::{Area, Errands};
use rustix::event::{EventfdFlags, PollFd, PollFlags};

use crate::cache::Cache;
use crate::exchange::{Exchange, Maker, poll_store, wait_for};
use crate::options::{RegionError, RegionOptions};
use crate::region::{Kind, Region, start_keeper};
use crate::spill::ProgramStore;

/// The smallest local memory of a mapping: the pager's own buffers need some of it.
const LOCAL_MIN: u64 = 2 << 20;
/// Windows of the scratch area beside those that the victim buffer's share asks for.
const WINDOWS_MIN: u64 = 64;
/// Local memory in proportion to which windows are provided, at most.
const WINDOWS_LOCAL_MAX: u64 = 64 << 30;
/// Pages that a region may have of which each must be fetched: 256 GiB. The pager's table has them from the start.
const WHOLE_PAGES_MAX: u64 = 1 << 26;
/// What an entry takes, with its part of what holds entries together.
const TABLE_BYTES_PER_PAGE: u64 = 33;
/// Calls of the program to its pager that may wait for an answer: there is one caller.
const CALLS_MAX: usize = 1;

/// What the server has, and the version to go on with.
type Versions = (HashMap<u64, Version>, Version);

/// A region that is mapped: a thread of this process, the pager, brings its pages in when they
/// are touched and moves cold ones out.
///
/// * A forked child does not have the mapping: touching it there is a segmentation fault. The end of its copy of
///   this value changes nothing.
/// * When the server is lost, so are the contents: the process is ended (`abort`) with a message
///   on standard error, as no access can be answered.
/// * The mapping must not be given to `mremap`.
/// * What is given to `madvise` with MADV_DONTNEED or MADV_REMOVE reads as zero from then on, and is given back to the
///   server: a named region that is made from a file or another fill value reads as it was made to read, once it is
///   opened anew. To have zeros there, write them.
#[derive(Debug)]
pub struct MappedRegion {
    options: RegionOptions,
    kind: Kind,
    area: Area,
    pager: Option<PagerThread>,
    maker: Maker,
}

/// A mapping that could not be ended. The region is in it still.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct UnmapError {
    /// The mapping, as it was: flush it again, or drop it.
    pub region: Box<MappedRegion>,
    /// Why.
    #[source]
    pub error: RegionError,
}

/// The mapping ends with this, and an anonymous region with it.
impl From<UnmapError> for RegionError {
    fn from(error: UnmapError) -> Self {
        error.error
    }
}

/// All that a mapping needs beside a store: what can fail goes before a region gives its store away.
pub(crate) struct Prepared {
    options: RegionOptions,
    kind: Kind,
    config: Config,
    memory: OwnMemory,
    /// To the thread.
    give: SyncSender<Pager<ProgramStore>>,
    thread: PagerThread,
    area: Area,
}

impl Prepared {
    pub(crate) fn new(options: &RegionOptions, kind: Kind) -> Result<Self, RegionError> {
        check_table(options.size, kind.absent)?;
        let mapping = |source| RegionError::Map { bytes: options.size, source };
        let bytes = usize::try_from(options.size).unwrap_or(usize::MAX);
        let area = Area::new(bytes).map_err(mapping)?;
        let mut secret = [0; 192];
        rustix::rand::getrandom(&mut secret[..], rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| mapping(errno.into()))?;
        let limit_bytes = options.cache_size.max(LOCAL_MIN);
        let config = Config {
            scope: Scope::Ranges,
            limit_bytes,
            readahead_pages_max: options.readahead_pages,
            secret,
            region_pages: PageCount::new(area.range().pages() as u64),
            slots: SlotPolicy::Identity { base: area.range().start() },
            lent_pages_min: usize::MAX,
            zeros_are_absent: kind.zeros_are_absent(),
            heir_mark_bytes: 0,
        };
        let memory = OwnMemory::new(rustix::process::getpid(), windows_for(limit_bytes), |_| ())?;
        let (give, receiver) = sync_channel(1);
        let thread = PagerThread::start(receiver, kind.absent).map_err(mapping)?;
        thread.start_errands(memory.errands()).map_err(mapping)?;
        Ok(Self { options: options.clone(), kind, config, memory, give, thread, area })
    }

    /// Maps the region whose store has pages in these `versions`.
    ///
    /// # Errors
    /// Why not, with the store.
    pub(crate) fn start(
        self,
        store: ProgramStore,
        (versions, next): (&HashMap<u64, Version>, Version),
    ) -> Result<MappedRegion, Box<(ProgramStore, RegionError)>> {
        let Self { options, kind, config, memory, give, thread, area } = self;
        let range = area.range();
        let address =
            |page| range.start() + usize::try_from(page).unwrap_or(usize::MAX) * PAGE_SIZE;
        let mut pager = Pager::new(&config, memory, store);
        if must_be_fetched(kind.absent) {
            let pages = 0..ByteCount::new(options.size).pages_rounded_up().get();
            for page in pages.filter(|page| !versions.contains_key(page)) {
                pager.restore(address(page), PageIndex::new(page), Version::new(0));
            }
        }
        for (&page, &version) in versions {
            pager.restore(address(page), PageIndex::new(page), version);
        }
        pager.skip_versions(next);
        if !pager.adopt_range(range) {
            return Err(Box::new((pager.into_store(), RegionError::NotRegistered)));
        }
        if let Err(SendError(pager)) = give.send(pager) {
            return Err(Box::new((pager.into_store(), RegionError::NoPager)));
        }
        Ok(MappedRegion { options, kind, area, pager: Some(thread), maker: Maker::here() })
    }
}

impl MappedRegion {
    /// Bytes of the region.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.options.size
    }

    /// The first byte, for code that cannot use slices. The mapping lives as long as this value.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.area.as_ptr()
    }

    /// The contents.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.area.as_slice()[..self.bytes()]
    }

    /// The contents, to change.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let bytes = self.bytes();
        &mut self.area.as_mut_slice()[..bytes]
    }

    /// Returns when everything written so far has been acknowledged by the server. All pages are
    /// moved out for it; those used next come back.
    ///
    /// # Errors
    /// [`RegionError::Pinned`] if the kernel holds some pages.
    pub fn flush(&self) -> Result<(), RegionError> {
        self.maker.check()?;
        let pinned = self.pager.as_ref().ok_or(RegionError::NoPager)?.flush()?;
        if pinned > 0 { Err(RegionError::Pinned { pages: pinned }) } else { Ok(()) }
    }

    /// Ends the mapping; the region goes on with the same contents.
    ///
    /// # Errors
    /// Those of [`MappedRegion::flush`], with the mapping, which goes on.
    pub fn unmap(mut self) -> Result<Region, UnmapError> {
        if let Err(error) = self.flush() {
            return Err(UnmapError { region: Box::new(self), error });
        }
        let keeper = match start_keeper() {
            Ok(keeper) => keeper,
            Err(error) => return Err(UnmapError { region: Box::new(self), error }),
        };
        let stopped = self.pager.take().map(|pager| pager.stop(Stop::InOrder));
        let (store, (versions, next)) = match stopped.unwrap_or(Err(RegionError::NoPager)) {
            Ok(stopped) => stopped,
            Err(error) => return Err(UnmapError { region: Box::new(self), error }),
        };
        let cache = Cache::new(self.options.cache_size, versions, next, self.kind.absent);
        Ok(Region::resume(self.options.clone(), Exchange::new(keeper, store), cache, self.kind))
    }

    fn bytes(&self) -> usize {
        usize::try_from(self.options.size).unwrap_or(usize::MAX)
    }
}

impl Drop for MappedRegion {
    fn drop(&mut self) {
        // Nothing is flushed: the region ends with this, and nobody can read it any more. The
        // thread ends before the mapping does, which would wait for it to read the event.
        let pager = self.pager.take();
        if !self.maker.is_here() {
            // The thread, and the region, are the parent's.
            std::mem::forget(pager);
            return;
        }
        let stopped = pager.map(|pager| pager.stop(Stop::AtOnce));
        if let Some(Ok((store, _))) = stopped {
            // The server frees the region by itself if it cannot be told.
            let _ = store.disconnect();
        }
    }
}

/// Whether pages that the server does not have are to be fetched: one that is touched first is zero to the kernel.
const fn must_be_fetched(absent: Absent) -> bool {
    !matches!(absent, Absent::Nothing | Absent::Fill(0))
}

/// Whether the pager's table may be filled for a region of that many bytes.
fn check_table(bytes: u64, absent: Absent) -> Result<(), RegionError> {
    let pages = ByteCount::new(bytes).pages_rounded_up().get();
    if !must_be_fetched(absent) || pages <= WHOLE_PAGES_MAX {
        return Ok(());
    }
    let table_bytes = pages.saturating_mul(TABLE_BYTES_PER_PAGE);
    let most = PageCount::new(WHOLE_PAGES_MAX).bytes().get();
    Err(RegionError::TooLarge { bytes, table_bytes, most })
}

/// What the pager thread is asked.
#[derive(Debug)]
enum Call {
    Flush(SyncSender<u64>),
    Stop(Stop),
}

/// How the pager stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// Once the store has done all that it was asked: an answer that came later would be taken for one to
    /// whoever uses the store next, in other frames.
    InOrder,
    /// The store is not used any more, nor what it has.
    AtOnce,
}

/// Ends the process when the pager panics: without it the kernel would fill what is out with zeros.
struct EndOnPanic;

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            end_process("the pager failed, please report this");
        }
    }
}

/// The pager thread as its program sees it. The thread never touches the mapping.
#[derive(Debug)]
struct PagerThread {
    calls: SyncSender<Call>,
    bell: Arc<OwnedFd>,
    /// Has nothing if there was no pager to serve.
    thread: JoinHandle<Option<(ProgramStore, Versions)>>,
}

impl PagerThread {
    /// The thread, which waits for what it is to serve.
    fn start(pager: Receiver<Pager<ProgramStore>>, absent: Absent) -> io::Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bell = Arc::new(bell);
        let (calls, receiver) = sync_channel(CALLS_MAX);
        let heard = Arc::clone(&bell);
        let thread =
            std::thread::Builder::new().name("farmem-pager".to_owned()).spawn(move || {
                pager.recv().ok().map(|pager| serve(pager, absent, &receiver, &heard))
            })?;
        Ok(Self { calls, bell, thread })
    }

    /// Another thread, which runs errands and ends with the pager.
    fn start_errands(&self, errands: Arc<Errands>) -> io::Result<()> {
        let done = Arc::clone(&self.bell);
        let run = move || {
            let _end = EndOnPanic;
            errands.run(|| ring(&done));
        };
        std::thread::Builder::new().name("farmem-errands".to_owned()).spawn(run).map(|_| ())
    }

    fn flush(&self) -> Result<u64, RegionError> {
        let (answer, receiver) = sync_channel(1);
        self.call(Call::Flush(answer))?;
        receiver.recv().map_err(|_| RegionError::NoPager)
    }

    fn stop(self, how: Stop) -> Result<(ProgramStore, Versions), RegionError> {
        self.call(Call::Stop(how))?;
        self.thread.join().ok().flatten().ok_or(RegionError::NoPager)
    }

    fn call(&self, call: Call) -> Result<(), RegionError> {
        self.calls.send(call).map_err(|_| RegionError::NoPager)?;
        ring(&self.bell);
        Ok(())
    }
}

/// Calls the pager for a turn.
fn ring(bell: &OwnedFd) {
    // Any number but zero rings; refused only if it rings already.
    let _ = rustix::io::write(bell, &1u64.to_le_bytes());
}

/// The pager thread.
fn serve(
    mut pager: Pager<ProgramStore>,
    absent: Absent,
    calls: &Receiver<Call>,
    bell: &OwnedFd,
) -> (ProgramStore, Versions) {
    let _end = EndOnPanic;
    let mut flush: Option<(Flush, SyncSender<u64>)> = None;
    let mut stops = false;
    let mut look_out = LookOut::new(pager.memory().pulls());
    loop {
        let wait = pager.turn(Ready::ALL).unwrap_or_else(|fatal| end_process(fatal));
        pager.drain_samples(&mut |_| ());
        if let Some((progress, answer)) = &mut flush {
            match pager.flush_step(progress).unwrap_or_else(|fatal| end_process(fatal)) {
                Flushed::NotYet => {}
                Flushed::Done { pinned } => {
                    // A caller that is gone needs no answer.
                    let _ = answer.send(pinned);
                    flush = None;
                }
            }
        }
        if stops && !pager.is_busy() {
            break;
        }
        // One flush at a time: who calls meanwhile waits.
        let call = if flush.is_none() { calls.try_recv().ok() } else { None };
        match call {
            Some(Call::Flush(answer)) => flush = Some((Flush::default(), answer)),
            Some(Call::Stop(Stop::AtOnce)) => {
                return (pager.into_store(), (HashMap::new(), Version::new(0)));
            }
            Some(Call::Stop(Stop::InOrder)) => stops = true,
            None if wait.again => {}
            None => sleep(&pager, wait, &mut look_out, bell, flush.is_some()),
        }
    }
    let mut versions = HashMap::new();
    let next = pager.copies(&mut |page, version| {
        // As it was made is what it counts as without an entry.
        if absent != Absent::Unknown || version != Version::new(0) {
            versions.insert(page.get(), version);
        }
    });
    (pager.into_store(), (versions, next))
}

/// Waits for what the pager waits for; not long if a flush goes on.
fn sleep(
    pager: &Pager<ProgramStore>,
    wait: Wait,
    look_out: &mut LookOut,
    bell: &OwnedFd,
    flushing: bool,
) {
    /// A flush that waits for windows or frames looks again after this time: 100 us.
    const FLUSH_PERIOD_NANOS: u64 = 100_000;
    let store = pager.store();
    let mut fds = poll_store(store.descriptor(), store.readiness());
    let memory = pager.memory();
    for fd in [memory.uffd().as_fd(), bell.as_fd()] {
        fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
    }
    let mut nanos = wait.deadline.since(Pager::<ProgramStore>::now());
    if flushing {
        nanos = nanos.min(FLUSH_PERIOD_NANOS);
    }
    let seen = look_out.run(&wait, Pager::<ProgramStore>::now, || {
        wait_for(&mut fds, Some(0));
        fds.iter().any(|fd| !fd.revents().is_empty()).then_some(())
    });
    if seen.is_none() {
        wait_for(&mut fds, Some(nanos));
    }
    let mut number = [0; 8];
    // Empty unless it rang.
    let _ = rustix::io::read(bell, &mut number);
}

/// No access to the mapping can be answered any more. Not through the standard library's stream:
/// its lock may be held by a thread that waits for a page.
fn end_process(why: impl std::fmt::Display) -> ! {
    let text = format!("farmem: {why}; no access to a mapped region can be answered, this ends\n");
    let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
    std::process::abort()
}

/// Windows of the scratch area: the victim buffer's share of the local memory six times over,
/// because windows moved out of sparse memory are mostly holes.
fn windows_for(limit_bytes: u64) -> usize {
    let pages = limit_bytes.min(WINDOWS_LOCAL_MAX) / PAGE_SIZE as u64;
    usize::try_from(pages / 16 / 256 * 6 + WINDOWS_MIN).unwrap_or(64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_must_be_fetched_as_a_whole_is_bounded() {
        let most = PageCount::new(WHOLE_PAGES_MAX).bytes().get();
        for absent in [Absent::Unknown, Absent::Fill(5)] {
            check_table(most, absent).unwrap();
            let refused = check_table(most + 1, absent).unwrap_err().to_string();
            assert!(
                refused.contains(&most.to_string()) && refused.contains("at offsets"),
                "{refused}"
            );
        }
        for absent in [Absent::Nothing, Absent::Fill(0)] {
            check_table(1 << 46, absent).unwrap();
        }
    }
}
