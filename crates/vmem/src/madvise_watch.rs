//! Finds out when the threads that were inside madvise have left it.
//!
//! The kernel announces a removal, waits until that is read, and then drops the pages. The thread
//! that called needs to run for some instructions in between, and may be kept from it for any time.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, RawDir, SeekFrom};
use rustix::process::Pid;

/// A thread that has run for so long since has taken the lock under which pages are dropped, or
/// sleeps until it gets that: some instructions lie before it.
const RUN_NANOS: u64 = 1_000_000;
/// Bytes of directory entries taken at once.
const DIRECTORY_BUFFER_BYTES: usize = 8 << 10;

/// A thread that may be inside madvise.
#[derive(Debug, Clone, Copy)]
struct Caller {
    thread: usize,
    /// How long it had run when the watch began.
    run_nanos: u64,
}

/// Watches the threads of a process. See the module's text.
#[derive(Debug)]
pub struct MadviseWatch {
    process: usize,
    tasks: OwnedFd,
    callers: Vec<Caller>,
    buffer: Vec<std::mem::MaybeUninit<u8>>,
}

impl MadviseWatch {
    /// Of which process.
    ///
    /// # Errors
    /// If /proc is not mounted or not readable.
    pub fn open(process: Pid) -> io::Result<Self> {
        let process = process.as_raw_nonzero().get().unsigned_abs() as usize;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let tasks = rustix::fs::open(format!("/proc/{process}/task"), flags, Mode::empty())?;
        let mut buffer = Vec::new();
        buffer.resize(DIRECTORY_BUFFER_BYTES, std::mem::MaybeUninit::uninit());
        Ok(Self { process, tasks, callers: Vec::new(), buffer })
    }

    /// Begins to wait for all threads that may be inside madvise now. To be called when no removal
    /// is unread, and each thread whose removal was read has gone on.
    pub fn begin(&mut self) {
        self.callers.clear();
        // Fails only when the process has ended, and then nobody calls any more.
        let _ = self.list();
    }

    fn list(&mut self) -> io::Result<()> {
        let Self { process, tasks, callers, buffer } = self;
        // The pager of a library is a thread of the process, and calls nothing of the kind now.
        let own = usize::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap_or(0);
        rustix::fs::seek(&*tasks, SeekFrom::Start(0))?;
        let mut entries = RawDir::new(&*tasks, buffer);
        while let Some(entry) = entries.next() {
            // "." and ".." have no digits: 0.
            let thread = crate::process::decimal(entry?.file_name().to_bytes());
            if thread != 0
                && thread != own
                && let Some(run_nanos) = run_nanos(*process, thread)
            {
                callers.push(Caller { thread, run_nanos });
            }
        }
        Ok(())
    }

    /// Whether all of them have left it.
    pub fn is_over(&mut self) -> bool {
        let process = self.process;
        self.callers.retain(|&caller| may_be_inside(process, caller));
        self.callers.is_empty()
    }
}

fn may_be_inside(process: usize, caller: Caller) -> bool {
    let Some(run_nanos) = run_nanos(process, caller.thread) else {
        return false;
    };
    match system_call(process, caller.thread) {
        Some(call) => could_remove(call),
        // It runs or is about to, or may not be asked.
        None => run_nanos < caller.run_nanos + RUN_NANOS,
    }
}

/// Calls that drop pages, and those that wait for a child which shares the memory, and which
/// therefore may be doing so.
fn could_remove(call: i64) -> bool {
    let calls = [
        libc::SYS_madvise,
        libc::SYS_process_madvise,
        libc::SYS_vfork,
        libc::SYS_clone,
        libc::SYS_clone3,
    ];
    calls.contains(&call)
}

/// Calls that change mappings, and announce it.
fn changes(call: i64) -> bool {
    let calls = [
        libc::SYS_madvise,
        libc::SYS_process_madvise,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_mmap,
        libc::SYS_brk,
    ];
    calls.contains(&call)
}

/// The threads of a process that wait inside a call that changes mappings.
pub(crate) fn changing_threads(process: Pid) -> Vec<i32> {
    threads_that(process, |process, thread| system_call(process, thread).is_some_and(changes))
}

/// The threads of a process that run, or wait for nothing but a processor.
pub(crate) fn running_threads(process: Pid) -> Vec<i32> {
    threads_that(process, |process, thread| {
        let stat = read(&format!("/proc/{process}/task/{thread}/stat"));
        // The name is in parentheses and may hold anything.
        stat.is_some_and(|stat| {
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('R'))
        })
    })
}

fn threads_that(process: Pid, is_one: impl Fn(usize, usize) -> bool) -> Vec<i32> {
    let process = process.as_raw_nonzero().get().unsigned_abs() as usize;
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else {
        return Vec::new();
    };
    let threads = tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok());
    threads.filter(|thread: &i32| is_one(process, thread.unsigned_abs() as usize)).collect()
}

/// How long a thread has run; `None` if it has ended.
fn run_nanos(process: usize, thread: usize) -> Option<u64> {
    let text = read(&format!("/proc/{process}/task/{thread}/schedstat"))?;
    text.split(' ').next()?.trim().parse().ok()
}

/// The system call that a thread sleeps in.
fn system_call(process: usize, thread: usize) -> Option<i64> {
    let text = read(&format!("/proc/{process}/task/{thread}/syscall"))?;
    text.split(' ').next()?.trim().parse().ok()
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn threads_that_sleep_elsewhere_or_run_are_not_waited_for() {
        let (send, receive) = mpsc::channel::<()>();
        let sleeper = std::thread::spawn(move || receive.recv());
        let mut watch = MadviseWatch::open(rustix::process::getpid()).unwrap();
        watch.begin();
        assert!(!watch.callers.is_empty());
        let start = Instant::now();
        while !watch.is_over() {
            assert!(start.elapsed() < Duration::from_secs(20), "{:?}", watch.callers);
        }
        drop(send);
        assert!(sleeper.join().unwrap().is_err());
    }

    /// A caller of madvise whose removal is not read stays inside.
    #[test]
    fn a_thread_inside_madvise_is_waited_for() {
        use crate::{AddressRange, Features, Uffd};
        let Ok(uffd) = Uffd::new(Features::Events) else {
            eprintln!("skipped: no userfaultfd here");
            return;
        };
        let area = crate::Area::new(1).unwrap();
        let range: AddressRange = area.range();
        uffd.register(range).unwrap();
        let start = range.start();
        let caller = std::thread::spawn(move || {
            // SAFETY: the page is ours and its content is of no interest.
            unsafe { libc::madvise(start as *mut libc::c_void, 4096, libc::MADV_DONTNEED) }
        });
        let mut watch = MadviseWatch::open(rustix::process::getpid()).unwrap();
        let inside = |watch: &MadviseWatch| {
            watch
                .callers
                .iter()
                .any(|c| system_call(watch.process, c.thread) == Some(libc::SYS_madvise))
        };
        while !inside(&watch) {
            watch.begin();
        }
        std::thread::sleep(Duration::from_millis(5));
        assert!(!watch.is_over());
        let mut events = Vec::new();
        while uffd.read_events(&mut events).unwrap() == 0 {}
        assert_eq!(caller.join().unwrap(), 0);
        while !watch.is_over() {}
        // Else unmapping the area would wait for its report to be read.
        drop(uffd);
    }
}
