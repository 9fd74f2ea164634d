//! A timer that interrupts the program a thousand times a second, in the middle of whatever the
//! kernel does for it.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

static INTERRUPTIONS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_signal: i32) {
    INTERRUPTIONS.fetch_add(1, Ordering::Relaxed);
}

/// Starts the timer. System calls are restarted.
pub(crate) fn interrupt_often() -> io::Result<()> {
    let handler: extern "C" fn(i32) = count;
    // SAFETY: a sigaction of zeros is a valid one; the fields that matter are set below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler only adds to an atomic, which is allowed in a signal handler.
    if unsafe { libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let every = libc::timeval { tv_sec: 0, tv_usec: 1000 };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: the timer value lives until the call returns.
    if unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
