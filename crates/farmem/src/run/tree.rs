//! The processes of the run that have no pager: what they use, and which of them must have one.
//!
//! A process that stays below three quarters of the limit pays for nothing. But several of them
//! together may use more than the limit: then the largest get a pager, until the rest is small
//! enough. Each has a watcher that waits for its own mark; a signal tells it not to wait longer.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use farmem_vmem::same_memory;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::run::family;

/// All of them together fill memory no faster than this; so soon can the rest of the limit be full.
const GROWTH_BYTES_PER_SECOND: u64 = 8 << 30;
/// The tree is looked at this often at most, and so rarely that looking costs a fiftieth of the time.
const PERIOD_MIN: Duration = Duration::from_millis(10);
const PERIOD_PER_COST: u32 = 50;
/// And at least this often: to find new processes.
const PERIOD_MAX: Duration = Duration::from_millis(200);
/// Less than this is not worth a closer look.
const CLOSER_LOOK_BYTES: u64 = 1 << 20;
/// Nor a pager, which needs about as much itself.
const WORTH_A_PAGER_BYTES: u64 = 4 << 20;
/// Until a pager that is asked for is there, processes go on growing as fast as they have since the last
/// look.
const PAGER_START: Duration = Duration::from_millis(50);
/// After so long a watcher that was asked for a pager is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Tells a watcher not to wait for its mark: as `crates/preload/src/watcher.rs` has it. Whoever else got
/// it would not notice.
const PAGER_WANTED: Signal = Signal::URG;
/// Among so many large processes are those found that share their memory.
const SHARERS_MAX: usize = 64;

/// A process without a pager.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unpaged {
    pub(crate) pid: Pid,
    /// Its anonymous memory.
    pub(crate) bytes: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Tree {
    limit_bytes: u64,
    last_look: Instant,
    next_look: Instant,
    unpaged: Vec<Unpaged>,
    asked: HashMap<Pid, Instant>,
}

/// What is known of those with a pager, for a look at the others.
pub(crate) struct Paged<'a> {
    /// Their processes.
    pub(crate) pids: &'a [Pid],
    /// What they use.
    pub(crate) bytes: u64,
    /// Whether a process was forked from one of them.
    pub(crate) is_parent_of: &'a dyn Fn(Pid) -> bool,
    /// What each gets in any case.
    pub(crate) floor_bytes: u64,
}

impl Tree {
    /// A tree that is to be looked at.
    pub(crate) fn new(limit_bytes: u64) -> Self {
        let (unpaged, asked) = (Vec::new(), HashMap::new());
        let now = Instant::now();
        Self { limit_bytes, last_look: now, next_look: now, unpaged, asked }
    }

    /// When to look next.
    pub(crate) fn next_look(&self) -> Instant {
        self.next_look
    }

    /// What processes without a pager use together.
    pub(crate) fn unpaged_bytes(&self) -> u64 {
        self.unpaged.iter().map(|process| process.bytes).sum()
    }

    /// How many they are that count.
    pub(crate) fn unpaged_count(&self) -> usize {
        self.unpaged.iter().filter(|process| process.bytes >= WORTH_A_PAGER_BYTES).count()
    }

    /// The process has a pager now, and this much memory.
    pub(crate) fn has_pager(&mut self, pid: Pid) -> u64 {
        self.unpaged.retain(|process| process.pid != pid);
        self.asked.remove(&pid);
        family::anonymous_bytes(pid).unwrap_or(0)
    }

    /// Looks at all processes of the run but those that `is_ours` says.
    pub(crate) fn look(&mut self, paged: &Paged<'_>, is_ours: impl Fn(Pid) -> bool) {
        let begun = Instant::now();
        let mut found = Vec::new();
        for pid in family::relatives(&is_ours) {
            if !paged.pids.contains(&pid)
                && let Some(bytes) = family::anonymous_bytes(pid)
            {
                found.push(Unpaged { pid, bytes });
            }
        }
        found.sort_by_key(|process| std::cmp::Reverse(process.bytes));
        leave_out_sharers(&mut found, paged.pids);
        let used = |found: &[Unpaged]| found.iter().map(|p| p.bytes).sum::<u64>() + paged.bytes;
        let large = found.iter().filter(|process| process.bytes >= CLOSER_LOOK_BYTES).count();
        if used(&found) > self.limit_bytes / 4 * 3 && large + paged.pids.len() > 1 {
            for process in found.iter_mut().take(large) {
                let inherits = (paged.is_parent_of)(process.pid);
                process.bytes = own_bytes(process.pid, inherits).unwrap_or(process.bytes);
            }
            found.sort_by_key(|process| std::cmp::Reverse(process.bytes));
        }
        let room = self.limit_bytes.saturating_sub(used(&found));
        let growth = self.growth(&found, begun);
        self.unpaged = found;
        self.ask_for_pagers(paged, growth, begun);
        self.last_look = begun;
        let soon = Duration::from_millis(room.saturating_mul(1000) / GROWTH_BYTES_PER_SECOND);
        let pause = soon.clamp(PERIOD_MIN, PERIOD_MAX).max(begun.elapsed() * PERIOD_PER_COST);
        self.next_look = begun + pause;
    }

    /// What they will have more when a pager that is asked for now is there.
    fn growth(&self, found: &[Unpaged], now: Instant) -> u64 {
        let sum: u64 = found.iter().map(|process| process.bytes).sum();
        let grown = u128::from(sum.saturating_sub(self.unpaged_bytes()));
        let passed = now.saturating_duration_since(self.last_look).max(PERIOD_MIN / 2);
        let growth = grown * PAGER_START.as_micros() / passed.as_micros().max(1);
        u64::try_from(growth).unwrap_or(u64::MAX).min(self.limit_bytes)
    }

    /// Three quarters of the limit may be without a pager while nobody has one, as with a single
    /// process, and half of it then.
    fn ask_for_pagers(&mut self, paged: &Paged<'_>, growth: u64, now: Instant) {
        let quarters = if paged.pids.is_empty() { 3 } else { 2 };
        let allowed = self.limit_bytes / 4 * quarters;
        let mut rest = self.unpaged_bytes().saturating_add(growth);
        let least = (paged.floor_bytes / 2).max(WORTH_A_PAGER_BYTES);
        let known = &self.unpaged;
        self.asked.retain(|pid, _| known.iter().any(|process| process.pid == *pid));
        let mut watchers = None;
        for process in &self.unpaged {
            if rest <= allowed || process.bytes < least {
                break;
            }
            rest -= process.bytes;
            let lately = self.asked.get(&process.pid);
            if lately.is_some_and(|asked| now.saturating_duration_since(*asked) < ASK_AGAIN) {
                continue;
            }
            self.asked.insert(process.pid, now);
            let watchers = watchers.get_or_insert_with(family::watchers);
            for &watcher in watchers.iter() {
                // A subreaper may wait for it at any moment: what is compared, with the number while this
                // is its own, is what is asked.
                if let Ok(descriptor) = pidfd_open(watcher, PidfdFlags::empty())
                    && same_memory(watcher, process.pid) == Some(true)
                {
                    let _ = pidfd_send_signal(&descriptor, PAGER_WANTED);
                }
            }
        }
    }
}

/// Leaves those out who have the memory of another one: between vfork and exec, and what farmem has
/// just made and not yet named.
fn leave_out_sharers(found: &mut Vec<Unpaged>, paged: &[Pid]) {
    let mut known: Vec<Pid> = paged.to_vec();
    known.truncate(SHARERS_MAX);
    found.retain(|process| {
        if process.bytes < CLOSER_LOOK_BYTES || known.len() >= 2 * SHARERS_MAX {
            return true;
        }
        let shares = known.iter().any(|&other| same_memory(other, process.pid) == Some(true));
        if !shares {
            known.push(process.pid);
        }
        !shares
    });
}

/// The anonymous memory of a process, each page that several have divided among them; without those
/// pages where it was forked from a process whose pager counts them already. Costs about a
/// microsecond for 100 KiB.
fn own_bytes(pid: Pid, inherits: bool) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", pid.as_raw_pid())).ok()?;
    let name = if inherits { "Private_Dirty:" } else { "Pss_Anon:" };
    let line = rollup.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn own_memory_is_counted() {
        let block = vec![1_u8; 32 << 20];
        let own = rustix::process::getpid();
        let bytes = own_bytes(own, false).unwrap();
        assert!(bytes >= block.len() as u64, "{bytes}");
        assert!(own_bytes(own, true).unwrap() >= block.len() as u64);
        assert!(family::anonymous_bytes(own).unwrap() >= block.len() as u64);
    }

    #[test]
    fn who_has_the_memory_of_another_is_left_out() {
        let own = rustix::process::getpid();
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let other = Pid::from_child(&child);
        let of = |pid| Unpaged { pid, bytes: 2 * CLOSER_LOOK_BYTES };
        let mut found = vec![of(own), of(own), of(other)];
        leave_out_sharers(&mut found, &[]);
        assert_eq!(found.len(), 2, "{found:?}");
        leave_out_sharers(&mut found, &[own]);
        assert_eq!(found.iter().map(|p| p.pid).collect::<Vec<_>>(), [other]);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
