//! How fast each thread faults: a thread that does little between its faults is best kept on the
//! pager's own processor.
//!
//! On that processor a fault costs one switch to the pager and one back. From another one it costs
//! two wake-ups of sleeping processors and an interrupt for every page table change, several times
//! as much. A thread that computes for longer between faults is left where the kernel puts it, so
//! that it and the pager work side by side.

use std::collections::HashMap;

use farmem_region::Nanos;

/// A thread that runs for less than this between faults is pulled to the pager's processor: about
/// what the switch to another processor would cost it.
const PULL_BELOW_NANOS: u64 = 40_000;
/// Threads remembered; beyond it the table starts anew.
const THREADS_MAX: usize = 1024;

#[derive(Debug, Clone, Copy)]
struct Pace {
    woken: Nanos,
    /// Decaying average of the time between a wake-up and the next fault.
    run_nanos: u64,
}

/// The paces of all threads that fault.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    paces: HashMap<u32, Pace>,
}

impl Threads {
    /// Takes note of a fault and says whether to pull the thread: its number if so.
    pub(crate) fn on_fault(&mut self, thread: u32, now: Nanos) -> Option<u32> {
        if thread == 0 {
            return None;
        }
        let pace = self.paces.get_mut(&thread)?;
        let run = now.since(pace.woken).min(PULL_BELOW_NANOS * 100);
        pace.run_nanos = (pace.run_nanos * 7 + run) / 8;
        pace.woken = now;
        (pace.run_nanos < PULL_BELOW_NANOS).then_some(thread)
    }

    /// The thread goes on now.
    pub(crate) fn on_wake(&mut self, thread: u32, now: Nanos) {
        if thread == 0 {
            return;
        }
        if self.paces.len() >= THREADS_MAX && !self.paces.contains_key(&thread) {
            self.paces.clear();
        }
        let start = Pace { woken: now, run_nanos: PULL_BELOW_NANOS * 2 };
        self.paces.entry(thread).or_insert(start).woken = now;
    }
}
