//! Holds threads of a program for a moment, with ptrace.
//!
//! The kernel fills and moves no page while a change of mappings is under way: from its announcement
//! until the thread that makes it has run on after that was read. Threads that do nothing else, as
//! many as there are processors, leave no moment between, and whoever waits for a page waits as long
//! as they go on. A thread that is held has made its change, and makes the next one when it is let
//! go. It notices nothing of that: calls that change mappings are not interrupted, but end first.
//!
//! And a program that fills memory at full speed has passed its limit before its pager can do anything
//! about it: threads that run are held until it can.

use std::collections::HashSet;

use rustix::process::Pid;

use crate::madvise_watch::{changing_threads, running_threads};

/// What PTRACE_INTERRUPT stops a thread with, in the upper half of its status.
const EVENT_STOP: i32 = 128;

/// Threads that were told to stop, and are not let go yet.
#[derive(Debug)]
pub struct Hold {
    process: Pid,
    threads: Vec<Held>,
    /// Those that somebody else traces, or that may not be traced.
    refused: HashSet<i32>,
}

#[derive(Debug)]
struct Held {
    thread: i32,
    /// The signal that it is to get when it goes on, once it has stopped; 0: none.
    stopped: Option<i32>,
}

impl Hold {
    /// Holds nobody yet.
    #[must_use]
    pub fn new(process: Pid) -> Self {
        Self { process, threads: Vec::new(), refused: HashSet::new() }
    }

    /// Tells the threads to stop that are inside calls that change mappings. Each does when its call
    /// ends, for which its announcement must be read.
    pub fn take_changing(&mut self) {
        self.take(changing_threads(self.process));
    }

    /// Tells the threads to stop that run at this moment, or wait for a processor: who sleeps touches no
    /// memory. Each does within microseconds, or when its call ends.
    pub fn take_running(&mut self) {
        self.take(running_threads(self.process));
    }

    fn take(&mut self, threads: Vec<i32>) {
        for thread in threads {
            let known = self.threads.iter().any(|held| held.thread == thread);
            if known || self.refused.contains(&thread) {
                continue;
            }
            if trace(libc::PTRACE_SEIZE, thread, 0) && trace(libc::PTRACE_INTERRUPT, thread, 0) {
                self.threads.push(Held { thread, stopped: None });
            } else {
                self.refused.insert(thread);
            }
        }
    }

    /// Lets go who has stopped. Whether there is nobody else: to be called until then.
    #[must_use]
    pub fn let_go(&mut self) -> bool {
        self.threads.retain_mut(|held| {
            if held.has_ended() {
                return false;
            }
            // Refused while it has not stopped yet, and if it has been killed: that is told next.
            let is_free = |signal| trace(libc::PTRACE_DETACH, held.thread, signal);
            !held.stopped.is_some_and(is_free)
        });
        self.threads.is_empty()
    }
}

impl Held {
    /// Takes the news of it. Whether it has ended, and nobody needs to hear of that any more.
    fn has_ended(&mut self) -> bool {
        let Some(status) = status_of(self.thread) else {
            return std::fs::metadata(format!("/proc/{}/stat", self.thread)).is_err();
        };
        if libc::WIFSTOPPED(status) {
            // What came instead of our stop is a signal on its way to the thread.
            let is_ours = status >> 16 == EVENT_STOP;
            self.stopped = Some(if is_ours { 0 } else { libc::WSTOPSIG(status) });
            return false;
        }
        true
    }
}

/// The news of a traced thread, if there are any.
fn status_of(thread: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: waitpid(2) writes one number, and takes news of this thread only.
    let found = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) };
    (found == thread).then_some(status)
}

/// A request of ptrace(2) that takes a number.
fn trace(request: libc::c_uint, thread: i32, number: i32) -> bool {
    let nowhere = std::ptr::null_mut::<libc::c_void>();
    let number = std::ptr::without_provenance_mut::<libc::c_void>(number.unsigned_abs() as usize);
    // SAFETY: these requests take no pointers: they begin, end and stop the tracing of a thread.
    unsafe { libc::ptrace(request, thread, nowhere, number) == 0 }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    fn comes_true(mut holds: impl FnMut() -> bool) -> bool {
        let until = Instant::now() + Duration::from_secs(20);
        while !holds() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    fn state(process: Pid) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.as_raw_pid())).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    #[test]
    fn who_runs_is_held_and_who_sleeps_is_not() {
        let mut busy = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let mut asleep = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let (runs, sleeps) = (Pid::from_child(&busy), Pid::from_child(&asleep));
        assert!(comes_true(|| state(sleeps) == Some('S')));
        let (mut held, mut spared) = (Hold::new(runs), Hold::new(sleeps));
        spared.take_running();
        assert!(spared.threads.is_empty());
        // It may not have come to its program yet, and sleeps in the kernel now and then.
        held.take_running();
        let is_held = comes_true(|| {
            held.take_running();
            state(runs) == Some('t')
        });
        // Whoever may not trace here holds nobody.
        assert!(is_held || !held.refused.is_empty());
        assert!(comes_true(|| held.let_go()));
        assert!(comes_true(|| state(runs) == Some('R')));
        for child in [&mut busy, &mut asleep] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
