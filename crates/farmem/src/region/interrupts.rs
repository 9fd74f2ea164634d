//! Signals that end a command which has something to clean up before.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, bail};
use farmem_supervise::SignalQueue;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;

/// What ends a command in order.
const SIGNALS: [Signal; 3] = [Signal::INT, Signal::TERM, Signal::HUP];

/// Signals wait until what was begun is cleaned up. A second one does not.
pub(super) struct Interrupts {
    queue: Arc<SignalQueue>,
    /// The signal that came; 0 if none.
    number: Arc<AtomicI32>,
}

impl Interrupts {
    /// Waits for signals from now on. Call it before any other thread exists.
    pub(super) fn heed() -> anyhow::Result<Self> {
        let ignored = ignored();
        // Whoever started us ignores it for us: a background job, or nohup.
        let is_heeded = |signal: &Signal| ignored & (1 << (signal.as_raw() - 1)) == 0;
        let signals: Vec<Signal> = SIGNALS.into_iter().filter(is_heeded).collect();
        let queue = Arc::new(SignalQueue::block(&signals).context("cannot queue signals")?);
        let number = Arc::new(AtomicI32::new(0));
        let (watched, told) = (Arc::clone(&queue), Arc::clone(&number));
        std::thread::spawn(move || watch(&watched, &told));
        Ok(Self { queue, number })
    }

    /// Fails once a signal has come.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if self.number.load(Ordering::Relaxed) != 0 {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Lets the signal that came, if one did, do what it would have done at once.
    pub(super) fn let_through(&self) {
        if let Some(signal) = Signal::from_named_raw(self.number.load(Ordering::Relaxed)) {
            // It comes back only if the signal cannot be sent: then the command ends by its error.
            let _ = self.queue.let_through(signal);
        }
    }
}

fn watch(queue: &SignalQueue, number: &AtomicI32) {
    loop {
        match queue.next() {
            Ok(Some(signal)) => {
                let before = number.swap(signal.number, Ordering::Relaxed);
                if let Some(signal) = Signal::from_named_raw(before) {
                    let _ = queue.let_through(signal);
                }
            }
            // Whatever poll says: as soon as a signal is there, it is read.
            _ => drop(poll(&mut [PollFd::new(queue, PollFlags::IN)], None)),
        }
    }
}

/// The signals that this process ignores, bit by bit.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
