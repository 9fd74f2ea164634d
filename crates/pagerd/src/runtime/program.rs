//! What the pager can see of its program from beside it: how large its memory is, and whether it
//! still has this memory at all. After exec it has another one, and the pager that stayed would
//! only keep the old one alive.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::process::Pid;

use super::memory::PAGE_BYTES;

/// The sizes of a memory: the first numbers of a statm file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) mapped_pages: u64,
    pub(crate) resident_pages: u64,
    /// Those of the resident pages that belong to files or shared memory.
    pub(crate) resident_file_pages: u64,
}

impl Sizes {
    /// Reads them from an open statm file: one system call, no allocation.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn read(statm: impl AsFd) -> io::Result<Self> {
        let mut buffer = [0; 128];
        let length = rustix::io::pread(statm, &mut buffer, 0)?;
        let mut numbers = buffer[..length].split(|byte| !byte.is_ascii_digit()).map(|digits| {
            digits.iter().fold(0u64, |sum, digit| sum * 10 + u64::from(digit - b'0'))
        });
        let mut next = || numbers.next().unwrap_or(0);
        Ok(Self { mapped_pages: next(), resident_pages: next(), resident_file_pages: next() })
    }

    /// Resident memory that belongs to no file: what the local limit is about.
    pub(crate) fn resident_anonymous_bytes(&self) -> u64 {
        self.resident_pages.saturating_sub(self.resident_file_pages) * PAGE_BYTES as u64
    }
}

/// Whether `program` still has the memory of this process, whose own `statm` is given. Also `true`
/// while it has none: its first thread has ended before the others, or all of them are ending,
/// which its pidfd tells.
///
/// # Errors
/// This process's own statm cannot be read.
pub(crate) fn has_this_memory(program: Pid, statm: BorrowedFd<'_>) -> io::Result<bool> {
    let same = same_memory(program);
    if same == Some(true) {
        return Ok(true);
    }
    loop {
        let before = Sizes::read(statm)?;
        let theirs = sizes_of(program);
        if theirs.mapped_pages == 0 {
            return Ok(true);
        }
        if same == Some(false) {
            return Ok(false);
        }
        // The kernel does not tell (it was built so, or the program has changed its user). The same
        // memory has the same sizes, unless they change between two looks.
        if theirs == before {
            return Ok(true);
        }
        if Sizes::read(statm)? == before {
            return Ok(false);
        }
    }
}

/// Whether `process` has the memory of this one, whose own `statm` is given; not so once it has ended.
///
/// # Errors
/// This process's own statm cannot be read.
pub(crate) fn shares_this_memory(process: Pid, statm: BorrowedFd<'_>) -> io::Result<bool> {
    match same_memory(process) {
        Some(true) => Ok(true),
        // The first thread of a process may have ended before the others, and has no memory then.
        Some(false) if sizes_of(process).mapped_pages == 0 => Ok(a_thread_has_this_memory(process)),
        Some(false) => Ok(false),
        // It has ended, which has_this_memory does not tell, or the kernel does not tell of it.
        None => Ok(sizes_of(process).mapped_pages > 0 && has_this_memory(process, statm)?),
    }
}

fn a_thread_has_this_memory(process: Pid) -> bool {
    const ROOM: usize = 4096;
    let path = format!("/proc/{}/task", process.as_raw_nonzero());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = rustix::fs::open(path, flags, Mode::empty()) else { return false };
    let mut room = vec![MaybeUninit::uninit(); ROOM];
    let mut listed = RawDir::new(directory, &mut room);
    while let Some(Ok(entry)) = listed.next() {
        let number = entry.file_name().to_str().ok().and_then(|name| name.parse().ok());
        if number.and_then(Pid::from_raw).and_then(same_memory) == Some(true) {
            return true;
        }
    }
    false
}

fn same_memory(program: Pid) -> Option<bool> {
    const KCMP_VM: libc::c_int = 1;
    let itself = rustix::process::getpid().as_raw_nonzero().get();
    let program = program.as_raw_nonzero().get();
    // SAFETY: kcmp takes five numbers and touches no memory of ours.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, itself, program, KCMP_VM, 0, 0) };
    (order >= 0).then_some(order == 0)
}

/// Zeros if the process has ended.
fn sizes_of(process: Pid) -> Sizes {
    let path = format!("/proc/{}/statm", process.as_raw_nonzero());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .ok()
        .and_then(|statm| Sizes::read(statm).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;

    use super::*;

    #[test]
    fn only_this_process_has_this_memory() {
        let statm = File::open("/proc/self/statm").unwrap();
        let itself = rustix::process::getpid();
        assert!(has_this_memory(itself, statm.as_fd()).unwrap());
        let mut other = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = Pid::from_child(&other);
        assert!(!has_this_memory(pid, statm.as_fd()).unwrap());
        other.kill().unwrap();
        // A process that has ended, waited for or not, is for its pidfd to tell.
        other.wait().unwrap();
        assert!(has_this_memory(pid, statm.as_fd()).unwrap());
    }

    #[test]
    fn sizes_count_what_is_touched() {
        let statm = File::open("/proc/self/statm").unwrap();
        let before = Sizes::read(&statm).unwrap().resident_anonymous_bytes();
        let memory = vec![1u8; 64 << 20];
        let after = Sizes::read(&statm).unwrap().resident_anonymous_bytes();
        assert!(after >= before + (48 << 20), "{before} {after} with {} bytes", memory.len());
    }
}
