//! A range of this process, paged by a thread against a store in memory.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use farmem_pager::{Config, Counts, OwnMemory, Pager, Ready, Scope, SlotPolicy};
use farmem_region::{
    Completion, Frames, Nanos, Outcome, PAGE_SIZE, PageCount, PageStore, Readiness, Request,
    StoreError, Ticket,
};
use farmem_vmem::AddressRange;
use rustix::event::{PollFd, PollFlags};
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};

/// Runs a test, or says why it cannot be run here. In CI that is a failure.
pub(crate) fn check_or_skip(test: impl FnOnce()) {
    // One after the other: a fork or mlockall in one test is one of the whole process.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match farmem_vmem::Uffd::new(farmem_vmem::Features::Events) {
        Ok(_) => test(),
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "not possible in CI: {error}");
            eprintln!("skipped: {error}");
        }
    }
}

/// Keeps pages in memory; answers at the next `advance`.
#[derive(Debug, Default)]
struct MemoryStore {
    pages: HashMap<u64, (u64, Box<[u8; PAGE_SIZE]>)>,
    queue: Vec<(Ticket, Owned)>,
}

#[derive(Debug)]
enum Owned {
    Fetch(Vec<farmem_region::FetchPage>),
    Store(Vec<farmem_region::StorePage>),
    Release(Vec<farmem_region::PageRange>),
    Grow(PageCount),
}

impl PageStore for MemoryStore {
    fn submit(&mut self, ticket: Ticket, request: Request<'_>) -> Result<(), StoreError> {
        let owned = match request {
            Request::Fetch(pages) | Request::FetchAhead(pages) => Owned::Fetch(pages.to_vec()),
            Request::Store(pages) => Owned::Store(pages.to_vec()),
            Request::Release(ranges) => Owned::Release(ranges.to_vec()),
            Request::Grow(pages) => Owned::Grow(pages),
        };
        self.queue.push((ticket, owned));
        Ok(())
    }

    fn advance(
        &mut self,
        _now: Nanos,
        frames: &mut dyn Frames,
        done: &mut Vec<Completion>,
    ) -> Result<(), StoreError> {
        for (ticket, owned) in std::mem::take(&mut self.queue) {
            let outcome = match owned {
                Owned::Fetch(pages) => {
                    for page in pages {
                        let (version, bytes) = &self.pages[&page.page.get()];
                        assert_eq!(*version, page.version.get(), "a version that was not stored");
                        frames.bytes_mut(page.frame).copy_from_slice(&bytes[..]);
                    }
                    Outcome::Fetched { server_nanos: 0 }
                }
                Owned::Store(pages) => {
                    for page in pages {
                        let bytes = Box::new(*frames.bytes(page.frame));
                        self.pages.insert(page.page.get(), (page.version.get(), bytes));
                    }
                    Outcome::Stored
                }
                Owned::Release(ranges) => {
                    for range in ranges {
                        let start = range.start.get();
                        for page in start..start + range.count.get() {
                            self.pages.remove(&page);
                        }
                    }
                    Outcome::Released
                }
                Owned::Grow(pages) => Outcome::Grown { pages: PageCount::new(pages.get() * 100) },
            };
            done.push(Completion { ticket, result: Ok(outcome) });
        }
        Ok(())
    }

    fn readiness(&self) -> Readiness {
        let deadline = (!self.queue.is_empty()).then_some(Nanos::new(0));
        Readiness { descriptor: None, wants_write: false, deadline }
    }
}

/// A paged range and its pager.
pub(crate) struct Harness {
    range: AddressRange,
    stop: Arc<AtomicBool>,
    pager: JoinHandle<Counts>,
}

impl Harness {
    pub(crate) fn new(bytes: usize, limit: usize) -> Self {
        let base = map(bytes);
        let range = AddressRange::new(base, base + bytes);
        let stop = Arc::new(AtomicBool::new(false));
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        let stopped = stop.clone();
        let pager = std::thread::spawn(move || page(range, limit, &stopped, &send));
        receive.recv().expect("the pager starts");
        Self { range, stop, pager }
    }

    pub(crate) fn range(&self) -> AddressRange {
        self.range
    }

    pub(crate) fn finish(self) -> Counts {
        self.stop.store(true, Ordering::Relaxed);
        self.pager.join().expect("the pager works")
    }
}

fn page(
    range: AddressRange,
    limit: usize,
    stop: &AtomicBool,
    ready: &std::sync::mpsc::SyncSender<()>,
) -> Counts {
    let memory = OwnMemory::new(rustix::process::getpid(), 64, |_| ()).expect("userfaultfd works");
    let config = Config {
        scope: Scope::Ranges,
        limit_bytes: limit as u64,
        readahead_pages_max: 64,
        secret: std::array::from_fn(|at| at as u8 ^ 0x5a),
        region_pages: PageCount::new(1 << 20),
        slots: SlotPolicy::Allocated,
        lent_pages_min: 64,
        zeros_are_absent: true,
        heir_mark_bytes: 0,
    };
    let errands = memory.errands();
    let porter = memory.porter();
    let errand_boy = std::thread::spawn(move || errands.run(|| porter.ring()));
    let porter = memory.porter();
    let bell = memory.porter();
    let porter = std::thread::spawn(move || porter.run());
    let mut pager = Pager::new(&config, memory, MemoryStore::default());
    assert!(pager.adopt_range(range));
    ready.send(()).expect("the test waits");
    while !stop.load(Ordering::Relaxed) {
        let wait = pager.turn(Ready::ALL).expect("nothing is fatal");
        pager.drain_samples(&mut |_| ());
        if wait.again {
            continue;
        }
        let mut fds = vec![PollFd::from_borrowed_fd(pager.memory().uffd().as_fd(), PollFlags::IN)];
        fds.push(PollFd::from_borrowed_fd(bell.bell(), PollFlags::IN));
        for (_, child) in pager.memory().children() {
            fds.push(PollFd::from_borrowed_fd(child.as_fd(), PollFlags::IN));
        }
        let nanos = wait.deadline.since(Pager::<MemoryStore>::now()).min(1_000_000);
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: nanos.cast_signed() };
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
        bell.heard();
    }
    let counts = pager.counts();
    drop(pager);
    errand_boy.join().expect("errands end with the pager");
    porter.join().expect("and so does the porter");
    counts
}

fn map(bytes: usize) -> usize {
    let flags = MapFlags::PRIVATE;
    // SAFETY: a fresh mapping at an address of the kernel's choice; it stays until the test ends.
    let base = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            flags,
        )
    };
    base.expect("memory is there") as usize
}

/// The first word of every page of a range.
#[derive(Clone, Copy)]
pub(crate) struct Words {
    base: usize,
    pages: usize,
}

impl Words {
    pub(crate) fn new(range: AddressRange) -> Self {
        Self { base: range.start(), pages: range.pages() }
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn part(&self, at: usize, of: usize) -> Self {
        let pages = self.pages / of;
        Self { base: self.base + at * pages * PAGE_SIZE, pages }
    }

    fn word(&self, page: usize) -> &AtomicU64 {
        assert!(page < self.pages);
        // Not at the start: each page at another place in it.
        let offset = page % 500 * 8;
        // SAFETY: an aligned word of the mapped range, only ever reached as an atomic.
        unsafe { &*((self.base + page * PAGE_SIZE + offset) as *const AtomicU64) }
    }

    pub(crate) fn load(&self, page: usize) -> u64 {
        self.word(page).load(Ordering::Relaxed)
    }

    pub(crate) fn store(&self, page: usize, value: u64) {
        self.word(page).store(value, Ordering::Relaxed);
    }

    pub(crate) fn drop_pages(&self, page: usize, count: usize) {
        let start = (self.base + page * PAGE_SIZE) as *mut core::ffi::c_void;
        // SAFETY: the range is mapped, and its contents are meant to be lost.
        unsafe { rustix::mm::madvise(start, count * PAGE_SIZE, Advice::LinuxDontNeed) }
            .expect("madvise works");
    }

    pub(crate) fn advise(&self, page: usize, advice: Advice) {
        let start = (self.base + page * PAGE_SIZE) as *mut core::ffi::c_void;
        // SAFETY: the page is mapped, and the test knows what the advice does to its content.
        unsafe { rustix::mm::madvise(start, PAGE_SIZE, advice) }.expect("madvise works");
    }

    pub(crate) fn is_here(&self, page: usize) -> bool {
        let start = self.base + page * PAGE_SIZE;
        let pagemap = farmem_vmem::Pagemap::open().expect("/proc is mounted");
        pagemap.first_present(AddressRange::new(start, start + PAGE_SIZE)).is_some()
    }

    pub(crate) fn remap(self) -> Self {
        let bytes = self.pages * PAGE_SIZE;
        let target = map(bytes);
        // SAFETY: both ranges are ours; the target is replaced.
        let base = unsafe {
            rustix::mm::mremap_fixed(
                self.base as *mut core::ffi::c_void,
                bytes,
                bytes,
                MremapFlags::MAYMOVE,
                target as *mut core::ffi::c_void,
            )
        };
        Self { base: base.expect("mremap works") as usize, pages: self.pages }
    }

    fn word_bytes(&self, page: usize) -> &[u8] {
        let word = std::ptr::from_ref(self.word(page)).cast::<u8>();
        // SAFETY: the eight bytes of a mapped word that no other thread changes meanwhile.
        unsafe { std::slice::from_raw_parts(word, 8) }
    }

    pub(crate) fn write_through_pipe(&self, page: usize, value: u64) {
        let (reader, mut writer) = std::io::pipe().expect("pipes work");
        writer.write_all(&value.to_le_bytes()).expect("the pipe takes 8 bytes");
        let place = self.word(page).as_ptr().cast::<u8>();
        // SAFETY: the eight bytes of a mapped word that no other thread uses meanwhile.
        let buffer = unsafe { std::slice::from_raw_parts_mut(place, 8) };
        let count = rustix::io::read(reader_fd(&reader), buffer);
        assert_eq!(count, Ok(8));
    }

    pub(crate) fn read_through_pipe(&self, page: usize) -> u64 {
        let (mut reader, mut writer) = std::io::pipe().expect("pipes work");
        writer.write_all(self.word_bytes(page)).expect("the pipe takes 8 bytes");
        let mut bytes = [0; 8];
        reader.read_exact(&mut bytes).expect("8 bytes are in the pipe");
        u64::from_le_bytes(bytes)
    }
}

fn reader_fd(reader: &std::io::PipeReader) -> BorrowedFd<'_> {
    use std::os::fd::AsFd;
    reader.as_fd()
}

/// A forked child.
pub(crate) struct Child(i32);

/// Forks a child that shares all pages until the pipe is closed.
pub(crate) fn fork_idle() -> (Child, std::io::PipeWriter) {
    use std::os::fd::AsRawFd;
    let (reader, writer) = std::io::pipe().expect("pipes work");
    let child = fork(|| {
        // SAFETY: the child's copy; whoever else has one is the parent.
        unsafe { libc::close(writer.as_raw_fd()) };
        rustix::io::read(reader_fd(&reader), &mut [0_u8; 1]) == Ok(0)
    });
    (child, writer)
}

/// Forks; the child runs `check` and ends at once.
pub(crate) fn fork(check: impl FnOnce() -> bool) -> Child {
    // By the system call: libc's fork holds the locks of malloc, which the pager thread of this
    // process uses, until the pager has read the event.
    // SAFETY: the child only reads memory and ends by _exit.
    let pid = unsafe { libc::syscall(libc::SYS_fork) as i32 };
    assert!(pid >= 0, "fork works");
    if pid == 0 {
        let good = check();
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    Child(pid)
}

impl Child {
    pub(crate) fn succeeded(self) -> bool {
        let mut status = 0;
        // SAFETY: waits for our own child; `status` is written.
        let pid = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        pid == self.0 && status == 0
    }
}
