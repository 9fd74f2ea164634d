//! Looks at the memory of a running program from outside, and ends it when its time is over or
//! we are interrupted.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::group::Group;

/// Between two looks: long enough to cost less than a thousandth of a processor.
const INTERVAL: Duration = Duration::from_millis(20);
/// So many looks make one at all processes together, which walks over all page tables.
const LOOKS_APART: u32 = 5;

/// The most memory that was seen in one watched process.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Peak {
    /// VmHWM, which the kernel itself keeps.
    pub(crate) resident_bytes: u64,
    /// RssAnon, as seen every 20 ms.
    pub(crate) anonymous_bytes: u64,
    /// Anonymous memory of all processes together, a page that several have divided among them: as seen
    /// every 100 ms, if all are watched.
    pub(crate) together_bytes: u64,
}

/// A thread that looks.
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    over: AtomicBool,
    late: AtomicBool,
    resident_bytes: AtomicU64,
    anonymous_bytes: AtomicU64,
    together_bytes: AtomicU64,
}

impl Watch {
    /// Starts to watch the processes in `group` that are called `watched`, or all of them, and then what they
    /// have together, too.
    pub(crate) fn start(
        group: Arc<Group>,
        watched: Option<&'static str>,
        deadline: Instant,
        interrupted: Arc<AtomicBool>,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let looks = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            for look in 0u32.. {
                if looks.over.load(Ordering::Relaxed) {
                    break;
                }
                let processes = group.processes();
                looks.look(&processes, watched);
                // Each walk takes some milliseconds of a processor, and holds the program up meanwhile.
                if watched.is_none() && look % LOOKS_APART == 0 {
                    looks.look_at_all(&processes);
                }
                if Instant::now() > deadline {
                    looks.late.store(true, Ordering::Relaxed);
                    group.kill();
                }
                if interrupted.load(Ordering::Relaxed) {
                    group.kill();
                }
                thread::sleep(INTERVAL);
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// Whether its time was over, and it was killed.
    pub(crate) fn is_late(&self) -> bool {
        self.shared.late.load(Ordering::Relaxed)
    }

    pub(crate) fn peak(&self) -> Peak {
        Peak {
            resident_bytes: self.shared.resident_bytes.load(Ordering::Relaxed),
            anonymous_bytes: self.shared.anonymous_bytes.load(Ordering::Relaxed),
            together_bytes: self.shared.together_bytes.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    fn look(&self, processes: &[i32], watched: Option<&str>) {
        for process in processes {
            // A process that just ended has no status any more.
            let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
            let field = |name: &str| {
                let value = status.lines().find_map(|line| line.strip_prefix(name))?;
                value.split_whitespace().next()
            };
            if watched.is_some() && field("Name:") != watched {
                continue;
            }
            let bytes = |name| field(name).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024;
            self.resident_bytes.fetch_max(bytes("VmHWM:"), Ordering::Relaxed);
            self.anonymous_bytes.fetch_max(bytes("RssAnon:"), Ordering::Relaxed);
        }
    }

    fn look_at_all(&self, processes: &[i32]) {
        let together = processes.iter().map(|process| proportional(*process)).sum();
        self.together_bytes.fetch_max(together, Ordering::Relaxed);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A thread that adds up the anonymous memory of all processes of a group.
pub(crate) struct SumWatch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

/// How the memory of a process is added.
#[derive(Clone, Copy)]
pub(crate) enum Add {
    /// Each page that several processes share divided among them: walks over all page tables.
    Proportionally,
    /// Each page for each process that has it: costs little, so that short peaks are seen.
    Quickly,
}

impl Add {
    /// Between two sums.
    const fn interval(self) -> Duration {
        match self {
            Self::Proportionally => Duration::from_millis(200),
            Self::Quickly => Duration::from_micros(300),
        }
    }

    fn bytes_of(self, process: i32) -> u64 {
        match self {
            Self::Proportionally => proportional(process),
            Self::Quickly => of_statm(process),
        }
    }
}

impl SumWatch {
    /// Starts to add up what is not farmem's own. A pager has no memory but its program's.
    pub(super) fn start(group: Arc<Group>, add: Add) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let mut peak = 0;
            while !ends.load(Ordering::Relaxed) {
                let processes = group.processes();
                let sum = processes.iter().map(|process| add.bytes_of(*process)).sum();
                peak = peak.max(sum);
                thread::sleep(add.interval());
            }
            peak
        });
        Self { over, thread }
    }

    /// The largest sum so far.
    pub(crate) fn end(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or(0)
    }
}

/// A file of a process that is none of farmem's own; otherwise, and if it has ended, nothing.
fn file_of_program(process: i32, file: &str) -> String {
    let read = |file: &str| fs::read_to_string(format!("/proc/{process}/{file}"));
    let is_own = read("comm").is_ok_and(|name| name.starts_with("farmem"));
    if is_own { String::new() } else { read(file).unwrap_or_default() }
}

fn of_statm(process: i32) -> u64 {
    let statm = file_of_program(process, "statm");
    let mut pages = statm.split_whitespace().skip(1).map_while(|number| number.parse::<u64>().ok());
    let resident = pages.next().unwrap_or(0);
    resident.saturating_sub(pages.next().unwrap_or(0)) << 12
}

fn proportional(process: i32) -> u64 {
    let rollup = file_of_program(process, "smaps_rollup");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss_Anon:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}
