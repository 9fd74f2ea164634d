//! How fast each thread faults: a thread that does little between its faults is best kept on the
//! pager's own processor.
//!
//! On that processor a fault costs one switch to the pager and one back. From another one it costs
//! two wake-ups of sleeping processors and an interrupt for every page table change, several times
//! as much. A thread that computes for longer between faults is left where the kernel puts it, so
//! that it and the pager work side by side.

use std::collections::HashMap;

use farmem_region::Nanos;
use farmem_vmem::Pull;

/// A thread beside the pager stays there while it runs for less than this between faults: about
/// what the switch to another processor would cost it.
const KEEP_BELOW_NANOS: u64 = 50_000;
/// A thread elsewhere is pulled if less than this passes between its wake-up and its next fault:
/// the time includes that switch.
const PULL_BELOW_NANOS: u64 = 90_000;
/// Threads remembered; beyond it the table starts anew.
const THREADS_MAX: usize = 1024;

#[derive(Debug, Clone, Copy)]
struct Pace {
    woken: Nanos,
    /// How often the pager had slept then.
    sleeps: u64,
    /// Decaying average of the time between a wake-up and the next fault.
    run_nanos: u64,
    /// It was pulled when it was woken.
    pulled: bool,
}

/// The paces of all threads that fault.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    paces: HashMap<u32, Pace>,
    sleeps: u64,
}

impl Threads {
    /// The pager has found nothing to do, and slept.
    pub(crate) const fn on_sleep(&mut self) {
        self.sleeps += 1;
    }

    /// Takes note of a fault and says whether, and how, to pull the thread.
    pub(crate) fn on_fault(&mut self, thread: u32, now: Nanos) -> Option<Pull> {
        if thread == 0 {
            return None;
        }
        let sleeps = self.sleeps;
        let pace = self.paces.get_mut(&thread)?;
        let run = now.since(pace.woken).min(PULL_BELOW_NANOS * 100);
        pace.run_nanos = (pace.run_nanos * 7 + run) / 8;
        pace.woken = now;
        // A thread beside a pager that yields runs before the pager can sleep.
        let strayed = pace.sleeps != sleeps;
        let below = if pace.pulled { KEEP_BELOW_NANOS } else { PULL_BELOW_NANOS };
        let pull = pace.run_nanos < below;
        if pull != pace.pulled {
            // What was measured does not hold for its new place.
            pace.pulled = pull;
            pace.run_nanos = if pull { KEEP_BELOW_NANOS / 2 } else { PULL_BELOW_NANOS * 2 };
        }
        pull.then_some(Pull { thread, strayed })
    }

    /// The thread goes on now, or has done so since `now`.
    pub(crate) fn on_wake(&mut self, thread: u32, now: Nanos) {
        if thread == 0 {
            return;
        }
        if self.paces.len() >= THREADS_MAX && !self.paces.contains_key(&thread) {
            self.paces.clear();
        }
        let sleeps = self.sleeps;
        let start = Pace { woken: now, sleeps, run_nanos: PULL_BELOW_NANOS * 2, pulled: false };
        let pace = self.paces.entry(thread).or_insert(start);
        pace.woken = now;
        pace.sleeps = sleeps;
    }
}
