//! What the supervisor needs of the kernel and the standard library has no safe call for: signals
//! as events, starting a program that dies with the supervisor, and what the children used.

#![expect(unsafe_code, reason = "signal masks, pre_exec and getrusage have no safe interface")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, Signal};

/// What this process was started with that Rust's start-up, or this crate, changes, and that programs get
/// as it was.
struct Inherited {
    ignored: [(libc::c_int, AtomicBool); 2],
    /// Of the three standard descriptors.
    closed: [AtomicBool; 3],
}

static INHERITED: Inherited = Inherited {
    ignored: [(libc::SIGPIPE, AtomicBool::new(false)), (libc::SIGCHLD, AtomicBool::new(false))],
    closed: [const { AtomicBool::new(false) }; 3],
};

/// The C library calls it before Rust's start-up ignores SIGPIPE and opens what is closed.
#[used]
#[unsafe(link_section = ".init_array")]
static NOTE_INHERITED: extern "C" fn() = note_inherited;

extern "C" fn note_inherited() {
    for (signal, ignored) in &INHERITED.ignored {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: only asks, and writes to `action`, which all zeros have made valid.
        let action = unsafe {
            libc::sigaction(*signal, std::ptr::null(), action.as_mut_ptr());
            action.assume_init()
        };
        ignored.store(action.sa_sigaction == libc::SIG_IGN, Ordering::Relaxed);
    }
    for (descriptor, closed) in (0..).zip(&INHERITED.closed) {
        // SAFETY: only asks, and takes any number.
        closed.store(unsafe { libc::fcntl(descriptor, libc::F_GETFD) } < 0, Ordering::Relaxed);
    }
}

impl Inherited {
    /// Gives it to the program that the calling process is about to run. Only async-signal-safe calls.
    fn restore(&self) {
        for (signal, ignored) in &self.ignored {
            let action =
                if ignored.load(Ordering::Relaxed) { libc::SIG_IGN } else { libc::SIG_DFL };
            // SAFETY: neither disposition runs anything of this process.
            unsafe { libc::signal(*signal, action) };
        }
        for (descriptor, closed) in (0..).zip(&self.closed) {
            if closed.load(Ordering::Relaxed) {
                // SAFETY: it is what Rust's start-up has opened in its place; exec follows, and nothing of
                // this process uses it before that.
                unsafe { libc::close(descriptor) };
            }
        }
    }
}

/// Signals that wait to be read instead of interrupting.
///
/// The signals stay blocked in this process from [`Self::block`] on, and their dispositions are
/// not touched: a program started by `nohup` still ignores SIGHUP. Only SIGCHLD must not be ignored here: the
/// kernel would keep nothing of a child that has ended.
#[derive(Debug)]
pub struct SignalQueue {
    descriptor: OwnedFd,
    /// The mask before, which programs get back.
    before: libc::sigset_t,
}

/// A signal that was sent to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueuedSignal {
    /// Its number.
    pub number: i32,
    /// Whether a process sent it to this one with kill, and not the kernel (a terminal's keys reach the
    /// whole process group).
    pub sent_by_process: bool,
    /// The value that a process gave it with sigqueue.
    pub value: Option<u64>,
    /// Whether this process has raised it itself.
    pub is_own: bool,
    /// For SIGCHLD: the child that a signal has killed, if that is what it tells. Of several children
    /// that end at once it may tell of one only.
    pub killed_child: Option<u32>,
}

impl SignalQueue {
    /// Blocks the signals in this thread and those it will start, and queues them. Call it before
    /// any other thread exists.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        Self::queue(&set_of(signals)?)
    }

    /// As [`Self::block`], with all signals but these.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn block_all_but(signals: &[Signal]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `set` is writable; sigfillset initialises it whole.
        let mut set = unsafe {
            libc::sigfillset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in signals {
            // SAFETY: `set` is a valid set, and not shared.
            unsafe { libc::sigdelset(&raw mut set, signal.as_raw()) };
        }
        Self::queue(&set)
    }

    fn queue(set: &libc::sigset_t) -> io::Result<Self> {
        let before = set_mask(libc::SIG_BLOCK, set)?;
        // SAFETY: `set` is a valid set.
        if unsafe { libc::sigismember(&raw const *set, libc::SIGCHLD) } == 1 {
            // SAFETY: the default disposition runs nothing of this process.
            unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        }
        // SAFETY: `set` is a valid set; -1 asks for a new descriptor.
        let raw =
            unsafe { libc::signalfd(-1, &raw const *set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd has just returned this descriptor to us alone.
        let descriptor = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { descriptor, before })
    }

    /// The next signal, if one waits.
    ///
    /// # Errors
    /// What the kernel says.
    #[expect(clippy::host_endian_bytes, reason = "the kernel of this machine wrote it")]
    pub fn next(&self) -> io::Result<Option<QueuedSignal>> {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.descriptor, &mut info)) {
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        // ssi_signo, ssi_errno, ssi_code and ssi_pid are the first four words, ssi_ptr the seventh pair.
        let (words, _) = info.as_chunks::<4>();
        let (pairs, _) = info.as_chunks::<8>();
        let (number, code) = (i32::from_ne_bytes(words[0]), i32::from_ne_bytes(words[2]));
        // SI_USER and all codes below it (kill, sigqueue, tkill) come from a process.
        let killed =
            number == libc::SIGCHLD && [libc::CLD_KILLED, libc::CLD_DUMPED].contains(&code);
        let sender = u32::from_ne_bytes(words[3]);
        let killed_child = killed.then_some(sender);
        let value = (code == libc::SI_QUEUE).then(|| u64::from_ne_bytes(pairs[6]));
        // What a write of this process to a closed pipe or past a limit raises seems to come from itself.
        let is_own = code <= 0 && sender == std::process::id() && value.is_none();
        let sent_by_process = code <= 0 && !is_own;
        Ok(Some(QueuedSignal { number, sent_by_process, value, is_own, killed_child }))
    }

    /// Sends a signal to this process and lets it do what it would have done without the queue. Returns
    /// after a stop once the process is continued, and not at all if the signal ends it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn let_through(&self, signal: Signal) -> io::Result<()> {
        let set = set_of(&[signal])?;
        rustix::process::kill_process(rustix::process::getpid(), signal)?;
        let blocked = set_mask(libc::SIG_UNBLOCK, &set)?;
        set_mask(libc::SIG_SETMASK, &blocked).map(|_| ())
    }

    /// Unblocks the signals: from here on they do what they would have done to this process.
    pub fn restore(self) {
        // The mask came from the kernel, so it cannot be refused.
        let _ = set_mask(libc::SIG_SETMASK, &self.before);
    }
}

impl QueuedSignal {
    /// Sends the same to another process, with the value that it has.
    ///
    /// # Errors
    /// If there is no such process, or it may not be signalled.
    pub fn pass_on(&self, process: Pid) -> io::Result<()> {
        let process = process.as_raw_nonzero().get();
        let sent = match self.value {
            // SAFETY: takes numbers; the value is handed on as it came, and not used here.
            Some(value) => unsafe {
                let value = usize::try_from(value).unwrap_or(usize::MAX);
                let sival_ptr = std::ptr::without_provenance_mut(value);
                libc::sigqueue(process, self.number, libc::sigval { sival_ptr })
            },
            // SAFETY: takes numbers.
            None => unsafe { libc::kill(process, self.number) },
        };
        if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl AsFd for SignalQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn set_of(signals: &[Signal]) -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is writable; sigemptyset initialises it whole.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in signals {
        // SAFETY: `set` was initialised just above and is not shared.
        if unsafe { libc::sigaddset(set.as_mut_ptr(), signal.as_raw()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: sigemptyset initialised it.
    Ok(unsafe { set.assume_init() })
}

fn set_mask(how: i32, set: &libc::sigset_t) -> io::Result<libc::sigset_t> {
    let mut before = MaybeUninit::uninit();
    // SAFETY: both sets are valid for the call.
    let errno = unsafe { libc::pthread_sigmask(how, set, before.as_mut_ptr()) };
    if errno != 0 {
        return Err(io::Error::from_raw_os_error(errno));
    }
    // SAFETY: on success pthread_sigmask has written the mask of before.
    Ok(unsafe { before.assume_init() })
}

/// Starts a program with the signal mask of before `signals` blocked any and what else this process was
/// started with, that the kernel kills should this process die.
///
/// # Errors
/// Why the program cannot be started; the kinds `NotFound` and `PermissionDenied` have their usual
/// meaning.
pub fn start_program(command: &mut Command, signals: &SignalQueue) -> io::Result<Child> {
    let mask = signals.before;
    let supervisor = rustix::process::getpid();
    let prepare = move || -> io::Result<()> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The supervisor may have died just before the line above.
        if rustix::process::getppid() != Some(supervisor) {
            return Err(rustix::io::Errno::SRCH.into());
        }
        INHERITED.restore();
        set_mask(libc::SIG_SETMASK, &mask).map(|_| ())
    };
    // SAFETY: between fork and exec only async-signal-safe things may be done: `prepare` makes
    // a few system calls, allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// What this process's children, and theirs, have used, as far as they have been waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChildrenUsage {
    /// The largest resident size that any one of them had.
    pub resident_peak_bytes: u64,
    /// Processor time, user and system.
    pub processor_time: std::time::Duration,
}

/// Asks the kernel.
#[must_use]
pub fn children_usage() -> ChildrenUsage {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is writable for the call. It cannot fail with these arguments.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()) };
    // SAFETY: it was zeroed, and all zeros is a valid rusage.
    let usage = unsafe { usage.assume_init() };
    let time = |time: libc::timeval| {
        std::time::Duration::from_secs(time.tv_sec.unsigned_abs())
            + std::time::Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    ChildrenUsage {
        resident_peak_bytes: usage.ru_maxrss.unsigned_abs() * 1024,
        processor_time: time(usage.ru_utime) + time(usage.ru_stime),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_queued_and_not_inherited_as_blocked() {
        let queue = SignalQueue::block(&[Signal::USR1]).unwrap();
        assert_eq!(queue.next().unwrap(), None);
        // SAFETY: raise takes any number; the signal goes to this thread, which blocks it.
        assert_eq!(unsafe { libc::raise(libc::SIGUSR1) }, 0);
        let expected = QueuedSignal {
            number: libc::SIGUSR1,
            sent_by_process: false,
            value: None,
            is_own: true,
            killed_child: None,
        };
        assert_eq!(queue.next().unwrap(), Some(expected));
        assert_eq!(queue.next().unwrap(), None);

        let blocked = |mut command: Command| {
            let child = start_program(command.stdout(std::process::Stdio::piped()), &queue);
            let output = child.unwrap().wait_with_output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let mut grep = Command::new("grep");
        grep.args(["SigBlk", "/proc/self/status"]);
        assert_eq!(blocked(grep), "SigBlk:\t0000000000000000\n");
        queue.restore();
    }

    #[test]
    fn a_value_is_passed_on() {
        let queue = SignalQueue::block_all_but(&[]).unwrap();
        let number = libc::SIGRTMIN() + 1;
        let sent = QueuedSignal {
            number,
            sent_by_process: true,
            value: Some(u64::MAX - 6),
            is_own: false,
            killed_child: None,
        };
        // SAFETY: the signal goes to this thread, which blocks it; the value is a number only.
        let thread = unsafe {
            let value = libc::sigval { sival_ptr: std::ptr::without_provenance_mut(7) };
            libc::pthread_sigqueue(libc::pthread_self(), number, value)
        };
        assert_eq!(thread, 0);
        let got = queue.next().unwrap().unwrap();
        assert_eq!((got.number, got.value, got.sent_by_process), (number, Some(7), true));
        let mut child = start_program(Command::new("sleep").arg("5"), &queue).unwrap();
        sent.pass_on(Pid::from_child(&child)).unwrap();
        let ended = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended), Some(number));
        queue.restore();
    }

    #[test]
    fn what_children_used_is_counted_once_they_were_waited_for() {
        let signals = SignalQueue::block(&[]).unwrap();
        start_program(&mut Command::new("true"), &signals).unwrap().wait().unwrap();
        assert!(children_usage().resident_peak_bytes > 64 * 1024);
    }
}
