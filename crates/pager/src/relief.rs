//! Sees that threads which change mappings without a pause do not keep all others waiting.
//!
//! See [`Hold`]: after a while in which something waits and the kernel refuses everything, the
//! threads that are at it are held, for long enough to answer what waits and to move out what must.

use farmem_region::Nanos;
use farmem_vmem::Hold;
use rustix::process::Pid;

/// After so long in which nothing could be filled or moved, though something was to be, threads are
/// held: far longer than a change takes, unless its thread is not let run.
const STUCK_NANOS: u64 = 50_000_000;
/// The same, if threads have been held lately.
const STUCK_AGAIN_NANOS: u64 = 5_000_000;
/// What lately is.
const LATELY_NANOS: u64 = 1_000_000_000;
/// For so long they are held: some hundred faults.
const HELD_NANOS: u64 = 10_000_000;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Relief {
    program: Pid,
    stuck_since: Option<Nanos>,
    hold: Option<(Hold, Nanos)>,
    last: Option<Nanos>,
}

impl Relief {
    pub(crate) const fn new(program: Pid) -> Self {
        Self { program, stuck_since: None, hold: None, last: None }
    }

    /// Whether threads are held.
    pub(crate) const fn is_holding(&self) -> bool {
        self.hold.is_some()
    }

    /// Something waits, and nothing could be filled or moved at this moment; or not.
    pub(crate) fn step(&mut self, is_stuck: bool, now: Nanos) {
        if let Some((hold, since)) = &mut self.hold {
            if now.since(*since) < HELD_NANOS {
                if is_stuck {
                    hold.take_changing();
                }
            } else if hold.let_go() {
                self.hold = None;
                self.last = Some(now);
            }
            return;
        }
        if !is_stuck {
            self.stuck_since = None;
            return;
        }
        let since = *self.stuck_since.get_or_insert(now);
        let lately = self.last.is_some_and(|last| now.since(last) < LATELY_NANOS);
        let patience = if lately { STUCK_AGAIN_NANOS } else { STUCK_NANOS };
        if now.since(since) >= patience {
            let mut hold = Hold::new(self.program);
            hold.take_changing();
            self.stuck_since = None;
            self.hold = Some((hold, now));
        }
    }
}
