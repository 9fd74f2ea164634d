//! The paged process as seen from its pager: its size, its threads, its life.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal};

use crate::AddressRange;

/// The program whose memory is paged.
#[derive(Debug)]
pub struct ProcessHandle {
    pid: Pid,
    pidfd: OwnedFd,
}

impl ProcessHandle {
    /// Takes hold of a running process; the handle never means another one, even if the number is
    /// used again.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn open(pid: Pid) -> io::Result<Self> {
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self { pid, pidfd })
    }

    /// From a descriptor opened earlier.
    #[must_use]
    pub const fn from_parts(pid: Pid, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd }
    }

    /// Its number.
    #[must_use]
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// Readable when the process has ended.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills it.
    pub fn kill(&self) {
        // Fails only if it has ended already.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Whether it still has the address space of the calling process: not so after it has called
    /// exec. `None` if the system does not tell (then wait for its end).
    #[must_use]
    pub fn shares_memory(&self) -> Option<bool> {
        same_memory(rustix::process::getpid(), self.pid)
    }
}

/// Whether two processes have the same address space; `None` if one of them has ended, or the system
/// does not tell.
#[must_use]
pub fn same_memory(one: Pid, other: Pid) -> Option<bool> {
    const KCMP_VM: libc::c_int = 1;
    let [one, other] = [one, other].map(|pid| pid.as_raw_nonzero().get());
    // SAFETY: kcmp(2) takes numbers only and changes nothing.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) };
    match result {
        0 => Some(true),
        1..=3 => Some(false),
        _ => None,
    }
}

/// Resident memory of the calling process's address space, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Residents {
    /// Anonymous pages: what the local limit counts.
    pub anonymous: usize,
    /// Pages of files and shared memory.
    pub shared: usize,
}

/// How much shared memory is there of the calling process's address space, in bytes: anonymous,
/// System V, memfd, tmpfs. Costs about 20 us.
///
/// # Errors
/// If /proc is not mounted or not readable.
pub fn shared_memory_bytes() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:"));
    Ok(line.map_or(0, |line| decimal(line.as_bytes()) as u64 * 1024))
}

/// Reads [`Residents`]; costs about 1 us.
#[derive(Debug)]
pub struct ResidentMeter {
    statm: OwnedFd,
}

impl ResidentMeter {
    /// Opens /proc/self/statm.
    ///
    /// # Errors
    /// If /proc is not mounted or not readable.
    pub fn open() -> io::Result<Self> {
        Self::open_at("/proc/self/statm")
    }

    /// Of the process of a thread.
    ///
    /// # Errors
    /// If there is no such thread.
    pub fn open_of(thread: u32) -> io::Result<Self> {
        Self::open_at(&format!("/proc/{thread}/statm"))
    }

    fn open_at(path: &str) -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let statm = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { statm })
    }

    /// The sizes now.
    ///
    /// # Errors
    /// If reading fails.
    pub fn read(&self) -> io::Result<Residents> {
        let mut buffer = [0u8; 128];
        let count = rustix::io::pread(&self.statm, &mut buffer, 0)?;
        let mut fields = buffer[..count].split(|&b| b == b' ').map(decimal);
        let resident = fields.nth(1).unwrap_or(0);
        let shared = fields.next().unwrap_or(0);
        Ok(Residents { anonymous: resident.saturating_sub(shared), shared })
    }
}

/// Processor time that a process has used so far, all its threads together, those that have ended too. In
/// nanoseconds; `None` once it has ended. Costs less than 1 us.
#[must_use]
pub fn processor_nanos(process: Pid) -> Option<u64> {
    // clock_getcpuclockid(3): the clock of a process is made of its number.
    const SCHEDULER_CLOCK: libc::clockid_t = 2;
    let clock = !process.as_raw_nonzero().get() << 3 | SCHEDULER_CLOCK;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime(2) writes one timespec, which outlives the call.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    let nanos = || {
        let seconds = u64::try_from(time.tv_sec).ok()?.checked_mul(1_000_000_000)?;
        seconds.checked_add(u64::try_from(time.tv_nsec).ok()?)
    };
    if result == 0 { nanos() } else { None }
}

pub(crate) fn decimal(digits: &[u8]) -> usize {
    digits.iter().filter(|b| b.is_ascii_digit()).fold(0usize, |value, &digit| {
        value.saturating_mul(10).saturating_add(usize::from(digit - b'0'))
    })
}

/// Finds the pages that hold the program's thread control blocks. The kernel writes there when a
/// thread ends (set_tid_address(2), get_robust_list(2)) and takes no fault at that moment: such a
/// page must stay, or whoever joins the thread waits for ever.
#[derive(Debug)]
pub struct ThreadWatch {
    directory: OwnedFd,
    buffer: Vec<std::mem::MaybeUninit<u8>>,
}

/// A glibc thread control block is at most this large before and after the head of its robust
/// list (2,304 bytes in glibc 2.36, the head 736 bytes in).
const CONTROL_BLOCK_REACH: usize = 4096;
/// Bytes of directory entries taken at once.
const DIRECTORY_BUFFER_BYTES: usize = 8 << 10;

impl ThreadWatch {
    /// Opens the list of the process's threads.
    ///
    /// # Errors
    /// If /proc is not mounted or not readable.
    pub fn open(pid: Pid) -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let path = format!("/proc/{}/task", pid.as_raw_nonzero());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        let mut buffer = Vec::new();
        buffer.resize(DIRECTORY_BUFFER_BYTES, std::mem::MaybeUninit::uninit());
        Ok(Self { directory, buffer })
    }

    /// Calls `each` for every thread with the range that must stay. Threads that start meanwhile
    /// may be missed: call it again before every decision.
    ///
    /// # Errors
    /// If the list cannot be read (the process has ended).
    pub fn control_blocks(&mut self, each: &mut dyn FnMut(AddressRange)) -> io::Result<usize> {
        rustix::fs::seek(&self.directory, rustix::fs::SeekFrom::Start(0))?;
        let mut entries = rustix::fs::RawDir::new(&self.directory, &mut self.buffer);
        let mut threads = 0;
        while let Some(entry) = entries.next() {
            // "." and ".." have no digits: 0.
            let tid = decimal(entry?.file_name().to_bytes());
            if tid == 0 {
                continue;
            }
            threads += 1;
            if let Some(head) = robust_list_head(tid) {
                let start = head.saturating_sub(CONTROL_BLOCK_REACH);
                each(AddressRange::new(start, head + CONTROL_BLOCK_REACH));
            }
        }
        Ok(threads)
    }
}

fn robust_list_head(tid: usize) -> Option<usize> {
    let mut head: usize = 0;
    let mut bytes: usize = 0;
    // SAFETY: get_robust_list(2) writes one address and one length to the two places given.
    let result =
        unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut bytes) };
    (result == 0 && head != 0).then_some(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_threads_have_control_blocks() {
        let mut watch = ThreadWatch::open(rustix::process::getpid()).unwrap();
        let mut blocks = 0;
        let threads = watch.control_blocks(&mut |_| blocks += 1).unwrap();
        assert!(threads >= 1 && blocks == threads);
    }

    #[test]
    fn own_memory_is_shared_with_oneself_and_not_with_a_child() {
        let own = ProcessHandle::open(rustix::process::getpid()).unwrap();
        assert_ne!(own.shares_memory(), Some(false));
        let mut child = std::process::Command::new("sleep").arg("10").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let handle = ProcessHandle::open(pid).unwrap();
        assert_ne!(handle.shares_memory(), Some(true));
        handle.kill();
        child.wait().unwrap();
    }

    #[test]
    fn meter_sees_touched_memory() {
        let meter = ResidentMeter::open().unwrap();
        let before = meter.read().unwrap().anonymous;
        let block = vec![1u8; 64 << 20];
        let after = meter.read().unwrap().anonymous;
        assert!(after >= before + (60 << 20 >> 12), "{before} {after}");
        drop(block);
    }
}
