//! What was counted over the whole run.

use farmem_supervise::{Counter, StatsSnapshot};

/// What one program image, from its start or exec to its end or exec, has counted.
#[derive(Debug, Clone)]
pub(crate) struct ProcessCounts {
    /// The process.
    pub(crate) pid: u32,
    /// Its name.
    pub(crate) name: String,
    /// Its stats page at the end.
    pub(crate) counts: StatsSnapshot,
}

/// The counts of those that have ended and the peaks of all together.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    ended: Vec<ProcessCounts>,
    local_peak_bytes: u64,
    external_peak_bytes: u64,
}

impl Tally {
    /// Takes in the present sums over all that are running.
    pub(crate) fn sample(&mut self, running: &StatsSnapshot) {
        self.local_peak_bytes = self.local_peak_bytes.max(running.get(Counter::ResidentBytes));
        self.external_peak_bytes =
            self.external_peak_bytes.max(running.get(Counter::ExternalBytes));
    }

    /// Takes in the last counts of one.
    pub(crate) fn ended(&mut self, process: ProcessCounts) {
        // One process's peak, which no sample can miss, is a lower bound of the tree's.
        let counts = &process.counts;
        self.local_peak_bytes = self.local_peak_bytes.max(counts.get(Counter::LocalPeakBytes));
        self.external_peak_bytes =
            self.external_peak_bytes.max(counts.get(Counter::ExternalPeakBytes));
        self.ended.push(process);
    }

    /// Each image that had a pager, in the order of their ends.
    pub(crate) fn processes(&self) -> &[ProcessCounts] {
        &self.ended
    }

    /// The sum over all images that have ended.
    pub(crate) fn sum(&self) -> StatsSnapshot {
        let mut sum = StatsSnapshot::empty();
        for process in &self.ended {
            sum.add(&process.counts);
        }
        sum
    }

    /// The most that one image has of what several may share.
    pub(crate) fn most(&self, counter: Counter) -> u64 {
        self.ended.iter().map(|process| process.counts.get(counter)).max().unwrap_or(0)
    }

    /// The most that was resident at one time, over the whole tree.
    pub(crate) fn local_peak_bytes(&self) -> u64 {
        self.local_peak_bytes
    }

    /// The most that was out at one time, over the whole tree.
    pub(crate) fn external_peak_bytes(&self) -> u64 {
        self.external_peak_bytes
    }
}
