//! The live line on standard error.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use farmem_supervise::{Counter, StatsSnapshot};

use crate::size::Size;
use crate::standard_error;

/// Fast enough to look alive, slow enough to be read.
const SHOW_EVERY: Duration = Duration::from_millis(500);

/// Shown while the program runs, if it is wanted and standard error is a terminal.
#[derive(Debug)]
pub(crate) struct ProgressLine {
    wanted: bool,
    shown: bool,
    /// Faults so far, and when that was.
    last: Option<(u64, Instant)>,
}

impl ProgressLine {
    pub(crate) fn new(wanted: bool) -> Self {
        Self { wanted: wanted && io::stderr().is_terminal(), shown: false, last: None }
    }

    /// Whether there is anybody to show it to.
    pub(crate) const fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// Shows how large a program is that no pager has come to yet, unless that was done just now.
    pub(crate) fn show_unpaged(
        &mut self,
        resident_bytes: impl FnOnce() -> Option<u64>,
        limit_bytes: u64,
    ) {
        let now = Instant::now();
        if !self.is_due(now) {
            return;
        }
        let Some(local) = resident_bytes() else { return };
        self.last = Some((0, now));
        let (local, limit) = (Size(local), Size(limit_bytes));
        standard_error::write(&format!(
            "\r\x1b[Kfarmem: local {local} of {limit}, nothing went out"
        ));
        self.shown = true;
    }

    fn is_due(&self, now: Instant) -> bool {
        self.wanted && self.last.is_none_or(|(_, at)| now - at >= SHOW_EVERY)
    }

    /// Shows the present sums, unless that was done just now.
    pub(crate) fn show(&mut self, sum: &StatsSnapshot, limit_bytes: u64) {
        let now = Instant::now();
        if !self.is_due(now) {
            return;
        }
        let faults = sum.get(Counter::Faults);
        let (before, at) = self.last.replace((faults, now)).unwrap_or((faults, now));
        let per_second = faults.saturating_sub(before) as f64 / (now - at).as_secs_f64().max(1e-3);
        let (local, external) =
            (Size(sum.get(Counter::ResidentBytes)), Size(sum.get(Counter::ExternalBytes)));
        let limit = Size(limit_bytes);
        standard_error::write(&format!(
            "\r\x1b[Kfarmem: local {local} of {limit}, external {external}, {per_second:.0} faults/s"
        ));
        self.shown = true;
    }

    /// Makes room for another line.
    pub(crate) fn clear(&mut self) {
        if self.shown {
            standard_error::write("\r\x1b[K");
            self.shown = false;
        }
    }
}
