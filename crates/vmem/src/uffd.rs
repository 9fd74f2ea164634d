//! One userfaultfd: its events and the calls that fill, move and wake.
//!
//! See userfaultfd(2) and ioctl_userfaultfd(2). What the kernel's errno values mean is decided
//! here and nowhere else, as [`Stop`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use farmem_region::PAGE_SIZE;
use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl;

use crate::{AddressRange, ForkMark};

/// `_IOWR(0xAA, 0x05, struct uffdio_move)`: this one is missing in linux-raw-sys.
const UFFDIO_MOVE: u32 = 0xC028_AA05;
const _: () = assert!(size_of::<sys::uffdio_move>() == 0x28);
/// `_IO(0xAA, 0x00)` on /dev/userfaultfd makes a userfaultfd.
const USERFAULTFD_IOC_NEW: u32 = 0xAA00;
const MOVE_MODE_DONTWAKE: u64 = 1;
const MOVE_MODE_ALLOW_SRC_HOLES: u64 = 2;
const COPY_MODE_DONTWAKE: u64 = 1;
/// Bytes of one `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;
const _: () = assert!(size_of::<sys::uffd_msg>() == MESSAGE_BYTES);
/// For so long an address space may be changing before it is given up to find out whose it is: 100 ms.
const OWN_TRIES_MAX: u32 = 500;
const OWN_TRY_PERIOD: std::time::Duration = std::time::Duration::from_micros(200);
/// Messages taken by one read. A thread has at most one fault outstanding; more than this many
/// threads fault in several reads.
const MESSAGES_PER_READ: usize = 32;

/// Which events a userfaultfd reports besides missing pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Features {
    /// Fork, remap, remove and unmap of the registered ranges, and the faulting thread.
    /// Needs `CAP_SYS_PTRACE` (for fork).
    Events,
    /// Missing pages only: for memory that belongs to the pager itself.
    FaultsOnly,
}

impl Features {
    const fn bits(self) -> u64 {
        let bits = match self {
            Self::Events => {
                sys::UFFD_FEATURE_MOVE
                    | sys::UFFD_FEATURE_THREAD_ID
                    | sys::UFFD_FEATURE_EVENT_FORK
                    | sys::UFFD_FEATURE_EVENT_REMAP
                    | sys::UFFD_FEATURE_EVENT_REMOVE
                    | sys::UFFD_FEATURE_EVENT_UNMAP
            }
            Self::FaultsOnly => sys::UFFD_FEATURE_MOVE,
        };
        bits as u64
    }
}

/// What the kernel reports.
#[derive(Debug)]
pub enum Event {
    /// A thread touched a page that is not there and waits.
    Fault {
        /// Page-aligned address.
        address: usize,
        /// Whether it wants to write.
        write: bool,
        /// The thread, 0 if the context does not report it.
        thread: u32,
    },
    /// The program forked; the child's registered ranges report to this new userfaultfd.
    Fork(Uffd),
    /// mremap moved a range.
    Remap {
        /// Where it was.
        from: AddressRange,
        /// Where it starts now.
        to: usize,
    },
    /// madvise dropped the contents: they read as zero afterwards. Reported *before* the kernel
    /// drops them.
    Remove(AddressRange),
    /// The mapping is gone.
    Unmap(AddressRange),
}

/// Why a call stopped before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// A page is there already. Whoever waits for it must be woken.
    AlreadyThere,
    /// The address space is changing (an event is unread), or a page was locked for a moment:
    /// read the events, then call again.
    Retry,
    /// The mapping, or the whole process, is gone.
    Gone,
    /// The page is pinned or shared with a forked child and cannot be moved now.
    Busy,
    /// The mapping's protection or locking does not allow it.
    Unmovable,
    /// The source page is not there.
    Hole,
    /// No memory (the process's memory cgroup is full, for example): evict and call again.
    NoMemory,
}

/// How far a call came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done, always whole pages, from the start of the range.
    pub bytes: usize,
    /// Why it stopped there; `None` if all was done.
    pub stop: Option<Stop>,
}

/// What an address space says of one of its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Nothing: a change of mappings is under way or unread.
    Changing,
    /// Missing pages are reported there.
    Registered,
    /// There is no mapping, or none that is registered.
    Nothing,
    /// The process has ended, or runs another image.
    Ended,
}

/// A userfaultfd cannot be used as needed.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// It cannot be made.
    #[error(
        "cannot make a userfaultfd: {source}; needs read and write permission on /dev/userfaultfd \
         or CAP_SYS_PTRACE (run `farmem doctor`)"
    )]
    Create {
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel lacks a feature or denies it.
    #[error(
        "the kernel does not grant the userfaultfd features that paging needs: {source}; needs \
         Linux 6.8 or newer and CAP_SYS_PTRACE (run `farmem doctor`)"
    )]
    Features {
        /// What the kernel said.
        source: io::Error,
    },
    /// A range cannot be registered.
    #[error("cannot register {range:?} for paging: {source}")]
    Register {
        /// The range.
        range: AddressRange,
        /// What the kernel said. `EBUSY`: another userfaultfd has it.
        source: io::Error,
    },
    /// A fork was to be reported, which takes a descriptor. It stays queued, and who forks waits.
    #[error(
        "no descriptor is left for the userfaultfd of a forked child ({source}): raise the limit of open \
         files (`ulimit -n`, its hard limit too), of which each living child needs one"
    )]
    Descriptors {
        /// What the kernel said.
        source: io::Error,
    },
    /// Any other failure.
    #[error("userfaultfd failed while {doing}: {source}")]
    Other {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl UffdError {
    /// Whether a range could not be registered because another userfaultfd has it.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        matches!(self, Self::Register { source, .. } if source.raw_os_error() == Some(libc::EBUSY))
    }
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Makes one for the calling process's address space, non-blocking, closed on exec.
    /// /dev/userfaultfd comes first because containers often block the system call.
    ///
    /// # Errors
    /// [`UffdError::Create`] or [`UffdError::Features`].
    pub fn new(features: Features) -> Result<Self, UffdError> {
        let fd = open_device().or_else(|_| open_syscall())?;
        let uffd = Self { fd };
        let mut api =
            sys::uffdio_api { api: u64::from(sys::UFFD_API), features: features.bits(), ioctls: 0 };
        uffd.call(ioctl::UFFDIO_API, &mut api).map_err(|source| UffdError::Features { source })?;
        Ok(uffd)
    }

    /// Takes over a descriptor that is a userfaultfd, for example one received from elsewhere.
    #[must_use]
    pub const fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// The descriptor, to wait on or to pass to a guardian.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }

    /// The descriptor's number.
    #[must_use]
    pub fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// From now on missing pages of the range are reported here. Pages that are there stay.
    ///
    /// # Errors
    /// [`UffdError::Register`].
    pub fn register(&self, range: AddressRange) -> Result<(), UffdError> {
        self.register_as(range, sys::UFFDIO_REGISTER_MODE_MISSING)
    }

    /// Lets pages be moved into the range from now on, while nothing of it is reported: what is missing
    /// there reads as zero.
    ///
    /// # Errors
    /// [`UffdError::Register`].
    pub fn register_unreported(&self, range: AddressRange) -> Result<(), UffdError> {
        // The kernel wants the registration, of whatever kind. Nothing is ever protected here.
        self.register_as(range, sys::UFFDIO_REGISTER_MODE_WP)
    }

    fn register_as(&self, range: AddressRange, mode: u32) -> Result<(), UffdError> {
        let mut argument =
            sys::uffdio_register { range: raw_range(range), mode: u64::from(mode), ioctls: 0 };
        self.call(ioctl::UFFDIO_REGISTER, &mut argument)
            .map_err(|source| UffdError::Register { range, source })
    }

    /// No longer report the range. Pages that are missing read as zero from then on: only for a
    /// range that is whole again.
    ///
    /// # Errors
    /// [`UffdError::Register`].
    pub fn unregister(&self, range: AddressRange) -> Result<(), UffdError> {
        let mut argument = raw_range(range);
        self.call(ioctl::UFFDIO_UNREGISTER, &mut argument)
            .map_err(|source| UffdError::Register { range, source })
    }

    /// Takes what is queued without waiting and appends it to `events`. Returns how many.
    ///
    /// # Errors
    /// [`UffdError::Descriptors`], and [`UffdError::Other`] on anything else but an empty queue.
    pub fn read_events(&self, events: &mut Vec<Event>) -> Result<usize, UffdError> {
        let mut buffer = [0u8; MESSAGE_BYTES * MESSAGES_PER_READ];
        match rustix::io::read(&self.fd, &mut buffer) {
            Ok(bytes) => {
                let messages = buffer[..bytes].chunks_exact(MESSAGE_BYTES);
                let count = messages.len();
                events.extend(messages.filter_map(parse));
                Ok(count)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
            Err(errno @ (rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)) => {
                Err(UffdError::Descriptors { source: errno.into() })
            }
            Err(errno) => Err(UffdError::Other { doing: "reading events", source: errno.into() }),
        }
    }

    /// Copies `range.bytes()` bytes from `source` into the missing pages of `range` and wakes who
    /// waits there.
    ///
    /// # Safety
    /// `source` must be valid for reads of `range.bytes()` bytes and not change meanwhile.
    pub unsafe fn copy(&self, range: AddressRange, source: *const u8, wake: bool) -> Progress {
        let mut argument = sys::uffdio_copy {
            dst: range.start() as u64,
            src: source as u64,
            len: range.bytes() as u64,
            mode: if wake { 0 } else { COPY_MODE_DONTWAKE },
            copy: 0,
        };
        let result = self.call(ioctl::UFFDIO_COPY, &mut argument);
        progress(result, argument.copy, range)
    }

    /// Copies the start of a constant into the missing pages of `range` and wakes who waits there.
    /// The constant must be at least as long as the range.
    pub fn copy_static(&self, range: AddressRange, source: &'static [u8]) -> Progress {
        assert!(range.bytes() <= source.len(), "the constant is shorter than the range");
        // SAFETY: the source is a constant of at least as many bytes (asserted).
        unsafe { self.copy(range, source.as_ptr(), true) }
    }

    /// Looks at an address and changes nothing there.
    #[must_use]
    pub fn look(&self, address: usize, mark: &ForkMark) -> Look {
        // The kernel looks at the state of the address space first, then at the destination, and at
        // last at the source, where it fails.
        let mut argument = sys::uffdio_copy {
            dst: (address & !(PAGE_SIZE - 1)) as u64,
            src: mark.unreadable() as u64,
            len: PAGE_SIZE as u64,
            mode: 0,
            copy: 0,
        };
        let result = self.call(ioctl::UFFDIO_COPY, &mut argument);
        match result.err().and_then(|error| error.raw_os_error()) {
            Some(libc::EAGAIN) => Look::Changing,
            Some(libc::ENOENT) => Look::Nothing,
            Some(libc::ESRCH) => Look::Ended,
            // EFAULT; or EEXIST, a huge page.
            _ => Look::Registered,
        }
    }

    /// Maps the zero page into the missing pages of `range` and wakes who waits there.
    pub fn zero(&self, range: AddressRange) -> Progress {
        let mut argument = sys::uffdio_zeropage { range: raw_range(range), mode: 0, zeropage: 0 };
        let result = self.call(ioctl::UFFDIO_ZEROPAGE, &mut argument);
        progress(result, argument.zeropage, range)
    }

    /// Moves pages from `source` into `range`, which must be registered here, without copying.
    /// With `holes`, pages missing in the source stay missing in the destination.
    ///
    /// # Safety
    /// The pages at `source` vanish from there: nothing may rely on their contents at that
    /// address, except what takes faults there.
    pub unsafe fn move_pages(
        &self,
        range: AddressRange,
        source: usize,
        holes: bool,
        wake: bool,
    ) -> Progress {
        let mut mode = 0;
        if holes {
            mode |= MOVE_MODE_ALLOW_SRC_HOLES;
        }
        if !wake {
            mode |= MOVE_MODE_DONTWAKE;
        }
        let mut argument = sys::uffdio_move {
            dst: range.start() as u64,
            src: source as u64,
            len: range.bytes() as u64,
            mode,
            move_: 0,
        };
        let result = self.call(UFFDIO_MOVE, &mut argument);
        let mut progress = progress(result, argument.move_, range);
        if progress.stop == Some(Stop::Gone) && !holes {
            // ENOENT of a move without ALLOW_SRC_HOLES: the source page is not there.
            progress.stop = Some(Stop::Hole);
        }
        progress
    }

    /// Whether it is of the calling process's address space.
    #[must_use]
    pub fn is_own(&self) -> bool {
        /// The highest page of a program's addresses but one, above its stack and all else.
        const UNMAPPED: u64 = 0x7fff_ffff_d000;
        for _ in 0..OWN_TRIES_MAX {
            // The kernel moves pages within the caller's address space only, which it checks before it
            // looks for the pages. There are none.
            let len = PAGE_SIZE as u64;
            let mut argument =
                sys::uffdio_move { dst: UNMAPPED, src: UNMAPPED, len, mode: 0, move_: 0 };
            let result = self.call(UFFDIO_MOVE, &mut argument);
            match result.err().and_then(|error| error.raw_os_error()) {
                // A change of mappings is under way, wherever: whoever reads the events ends that.
                Some(libc::EAGAIN) => std::thread::sleep(OWN_TRY_PERIOD),
                errno => return errno == Some(libc::ENOENT),
            }
        }
        false
    }

    /// Wakes threads that wait in `range`: they look again.
    pub fn wake(&self, range: AddressRange) {
        let mut argument = raw_range(range);
        // Fails only if the process is gone, and then nobody waits.
        let _ = self.call(ioctl::UFFDIO_WAKE, &mut argument);
    }

    fn call<T>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        // SAFETY: `argument` is the structure that `request` names (each caller pairs them, sizes
        // are encoded in the request), valid for reads and writes during the call. What the call
        // does to the address space is the callers' obligation.
        let result = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                libc::Ioctl::from(request),
                std::ptr::from_mut(argument),
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn open_device() -> Result<OwnedFd, UffdError> {
    use rustix::fs::{Mode, OFlags};
    let device =
        rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| UffdError::Create { source: errno.into() })?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: this request takes flags by value and returns a new descriptor.
    let fd =
        unsafe { libc::ioctl(device.as_raw_fd(), libc::Ioctl::from(USERFAULTFD_IOC_NEW), flags) };
    owned(fd)
}

fn open_syscall() -> Result<OwnedFd, UffdError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: userfaultfd(2) takes flags and returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    owned(i32::try_from(fd).unwrap_or(-1))
}

fn owned(fd: RawFd) -> Result<OwnedFd, UffdError> {
    if fd < 0 {
        return Err(UffdError::Create { source: io::Error::last_os_error() });
    }
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw_range(range: AddressRange) -> sys::uffdio_range {
    sys::uffdio_range { start: range.start() as u64, len: range.bytes() as u64 }
}

/// Turns a call's result and its count of bytes (negative: an errno) into a [`Progress`].
fn progress(result: io::Result<()>, count: i64, range: AddressRange) -> Progress {
    let Err(error) = result else {
        return Progress { bytes: range.bytes(), stop: None };
    };
    let bytes = usize::try_from(count).unwrap_or(0);
    let stop = match error.raw_os_error().unwrap_or(0) {
        libc::EEXIST => Stop::AlreadyThere,
        libc::EAGAIN | libc::EINTR => Stop::Retry,
        libc::ENOENT | libc::ESRCH => Stop::Gone,
        libc::EBUSY => Stop::Busy,
        libc::ENOMEM => Stop::NoMemory,
        // EINVAL, EFAULT, EPERM: protection, locking or kind of the mapping.
        _ => Stop::Unmovable,
    };
    Progress { bytes, stop: Some(stop) }
}

fn parse(message: &[u8]) -> Option<Event> {
    let word = |at: usize| {
        let bytes = message[at..at + 8].try_into().unwrap_or([0; 8]);
        usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(0)
    };
    let half = |at: usize| u32::from_le_bytes(message[at..at + 4].try_into().unwrap_or([0; 4]));
    match u32::from(message[0]) {
        sys::UFFD_EVENT_PAGEFAULT => Some(Event::Fault {
            address: AddressRange::new(word(16), word(16)).start(),
            write: word(8) & 1 != 0,
            thread: half(24),
        }),
        sys::UFFD_EVENT_FORK => {
            let fd = RawFd::try_from(half(8)).ok()?;
            // SAFETY: the kernel has installed this descriptor in our table with the message;
            // nobody else knows it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            Some(Event::Fork(Uffd { fd }))
        }
        sys::UFFD_EVENT_REMAP => Some(Event::Remap {
            from: AddressRange::new(word(8), word(8).saturating_add(word(24))),
            to: word(16),
        }),
        sys::UFFD_EVENT_REMOVE => Some(Event::Remove(AddressRange::new(word(8), word(16)))),
        sys::UFFD_EVENT_UNMAP => Some(Event::Unmap(AddressRange::new(word(8), word(16)))),
        // A kind that we did not ask for: nothing waits for an answer to it.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Area;

    static PAGES: [u8; 4 * PAGE_SIZE] = [7; 4 * PAGE_SIZE];

    /// What each call says where only some of a range can be done: counts are whole pages or none,
    /// never an errno taken for a count.
    #[test]
    fn u9_short_and_odd_results() {
        let Ok(uffd) = Uffd::new(Features::FaultsOnly) else { return };
        let area = || Area::new(4 * PAGE_SIZE).unwrap();
        let (to, mut from) = (area(), area());
        let run = |area: &Area, at: usize, pages: usize| {
            AddressRange::pages_from(area.range().start() + at * PAGE_SIZE, pages)
        };
        uffd.register(to.range()).unwrap();
        let done = |pages: usize, stop| Progress { bytes: pages * PAGE_SIZE, stop };
        assert_eq!(uffd.copy_static(run(&to, 1, 1), &PAGES), done(1, None));
        // Hole, present, hole; then what is present first.
        let over = uffd.copy_static(run(&to, 0, 3), &PAGES);
        assert_eq!(over, done(1, Some(Stop::Retry)));
        let over = uffd.copy_static(run(&to, 1, 2), &PAGES);
        assert_eq!(over, done(0, Some(Stop::AlreadyThere)));
        assert_eq!(uffd.zero(run(&to, 1, 1)), done(0, Some(Stop::AlreadyThere)));
        assert_eq!(uffd.zero(run(&to, 2, 1)), done(1, None));
        // Not registered here, and not mapped at all.
        assert_eq!(uffd.copy_static(run(&from, 0, 1), &PAGES), done(0, Some(Stop::Gone)));
        let nowhere = AddressRange::pages_from(PAGE_SIZE, 1);
        assert_eq!(uffd.copy_static(nowhere, &PAGES), done(0, Some(Stop::Gone)));
        // SAFETY: nobody looks at the area that pages are moved out of.
        let moved = |from: &Area, at, holes| unsafe {
            uffd.move_pages(run(&to, at, 1), run(from, at, 1).start(), holes, true)
        };
        assert_eq!(moved(&from, 3, false), done(0, Some(Stop::Hole)));
        assert_eq!(moved(&from, 3, true), done(1, None));
        from.as_mut_slice()[2 * PAGE_SIZE..].fill(5);
        assert_eq!(moved(&from, 3, false), done(1, None));
        assert_eq!(moved(&from, 2, false), done(0, Some(Stop::AlreadyThere)));
        assert_eq!(to.as_slice()[3 * PAGE_SIZE..], [5; PAGE_SIZE]);
    }
}
