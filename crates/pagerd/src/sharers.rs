//! Who else has the program's memory: a child of vfork or posix_spawn between its making and its exec,
//! and whoever was made by clone with CLONE_VM alone.
//!
//! Such a process may outlive the program, which can be killed, end by another thread's exit or run
//! another image meanwhile. It needs the pages that are out as the program did. When nobody has the memory any
//! more nobody can come to have it: only who has it makes others that do.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, RawDir};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::runtime::shares_this_memory;

/// Room for one process of /proc: it is looked at as soon as it is listed.
const LISTED_BYTES: usize = 40;
/// Where something else there has a longer name.
const LISTED_BYTES_MAX: usize = 4096;

/// Between two looks for who does not end.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(128);

/// Entries of a directory, aligned as the kernel writes them.
#[repr(align(8))]
struct Listed<const BYTES: usize>([MaybeUninit<u8>; BYTES]);

/// Whether another process has this memory, whose statm is given. It may be one that has just ended.
///
/// The list is in the order of numbers, and so are new processes, but where the numbers begin anew: one
/// that was made and whose maker has ended during a look may be missed by that look, and not by the next.
///
/// # Errors
/// /proc cannot be read: there may be one.
pub(crate) fn exist(statm: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(find(statm)?.is_some() || find(statm)?.is_some())
}

/// Kills those that [`exist`] finds; whether there was one.
///
/// # Errors
/// As [`exist`].
pub(crate) fn kill(statm: BorrowedFd<'_>) -> io::Result<bool> {
    if !exist(statm)? {
        return Ok(false);
    }
    // Who may not be signalled is waited for, and looked for less and less often.
    let mut pause = PAUSE_MIN;
    while let Some(process) = find(statm)? {
        // Only if the number is still that of a process with this memory once it cannot be another's.
        if let Ok(descriptor) = pidfd_open(process, PidfdFlags::empty())
            && shares_this_memory(process, statm)?
        {
            let _ = pidfd_send_signal(&descriptor, Signal::KILL);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
    Ok(true)
}

fn find(statm: BorrowedFd<'_>) -> io::Result<Option<Pid>> {
    match find_by::<LISTED_BYTES>(statm) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            find_by::<LISTED_BYTES_MAX>(statm)
        }
        found => found,
    }
}

fn find_by<const BYTES: usize>(statm: BorrowedFd<'_>) -> io::Result<Option<Pid>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, "/proc", flags, Mode::empty())?;
    let mut room = Listed([MaybeUninit::uninit(); BYTES]);
    let mut listed = RawDir::new(directory, &mut room.0);
    let itself = rustix::process::getpid();
    while let Some(entry) = listed.next() {
        let entry = entry?;
        let number = entry.file_name().to_str().ok().and_then(|name| name.parse().ok());
        let process = number.and_then(Pid::from_raw).filter(|&process| process != itself);
        if let Some(process) = process
            && shares_this_memory(process, statm)?
        {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::time::Instant;

    use super::*;

    /// Other tests start processes, which share the memory until they call exec.
    fn comes_to(exists: bool) -> bool {
        let statm = File::open("/proc/self/statm").unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while exist(statm.as_fd()).unwrap() != exists {
            if Instant::now() > until {
                return false;
            }
        }
        true
    }

    extern "C" fn wait_for_a_signal(_: *mut libc::c_void) -> libc::c_int {
        loop {
            // SAFETY: only waits.
            unsafe { libc::pause() };
        }
    }

    #[test]
    fn only_who_was_made_to_share_the_memory_does() {
        assert!(comes_to(false));
        let mut stack = vec![0_u8; 64 << 10];
        let top = stack.as_mut_ptr_range().end.map_addr(|end| end & !15);
        let (flags, nothing) = (libc::CLONE_VM | libc::SIGCHLD, std::ptr::null_mut());
        // SAFETY: the stack is used by nobody else and outlives the process, which only waits.
        let child = unsafe { libc::clone(wait_for_a_signal, top.cast(), flags, nothing) };
        assert!(child > 0);
        assert!(comes_to(true));
        let mut status = 0;
        // SAFETY: signals, and waits for, a child of this test that nobody has waited for.
        unsafe {
            assert_eq!(libc::kill(child, libc::SIGKILL), 0);
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        }
        assert!(libc::WIFSIGNALED(status));
        assert!(comes_to(false));
    }
}
