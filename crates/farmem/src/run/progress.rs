//! The live line on standard error.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use farmem_supervise::{Counter, StatsSnapshot};

use crate::size::Size;

/// Fast enough to look alive, slow enough to be read.
const SHOW_EVERY: Duration = Duration::from_millis(500);

/// Shown while a program is paged, if it is wanted and standard error is a terminal.
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

    /// Shows the present sums, unless that was done just now.
    pub(crate) fn show(&mut self, sum: &StatsSnapshot, limit_bytes: u64) {
        let now = Instant::now();
        let recent = self.last.is_some_and(|(_, at)| now - at < SHOW_EVERY);
        if !self.wanted || recent {
            return;
        }
        let faults = sum.get(Counter::Faults);
        let (before, at) = self.last.replace((faults, now)).unwrap_or((faults, now));
        let per_second = faults.saturating_sub(before) as f64 / (now - at).as_secs_f64().max(1e-3);
        let (local, external) =
            (Size(sum.get(Counter::ResidentBytes)), Size(sum.get(Counter::ExternalBytes)));
        let limit = Size(limit_bytes);
        self.print(&format!(
            "\r\x1b[Kfarmem: local {local} of {limit}, external {external}, {per_second:.0} faults/s"
        ));
        self.shown = true;
    }

    /// Makes room for another line.
    pub(crate) fn clear(&mut self) {
        if self.shown {
            self.print("\r\x1b[K");
            self.shown = false;
        }
    }

    /// A terminal that cannot be written to has nobody in front of it.
    fn print(&self, text: &str) {
        let mut stderr = io::stderr().lock();
        let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
    }
}
