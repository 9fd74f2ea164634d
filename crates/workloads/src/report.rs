//! What a stretch of work cost: wall time, processor time, memory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

/// What a timed stretch cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// Wall time.
    pub wall_seconds: f64,
    /// Processor time of this process in user mode.
    pub user_seconds: f64,
    /// Processor time of this process in the kernel.
    pub system_seconds: f64,
    /// Processor time that the given file counted, if one was given: of a whole control group,
    /// so of everybody who worked for this program.
    pub group_cpu_seconds: Option<f64>,
    /// Most memory that was ever resident in this process (VmHWM).
    pub peak_resident_bytes: u64,
    /// Anonymous memory that is resident at the end of the stretch (RssAnon).
    pub anonymous_bytes: u64,
}

/// A running measurement.
#[derive(Debug)]
pub struct Stopwatch {
    group_cpu_file: Option<PathBuf>,
    started: Instant,
    user_seconds: f64,
    system_seconds: f64,
    group_cpu_seconds: Option<f64>,
}

impl Stopwatch {
    /// Starts. `group_cpu_file` holds a count of nanoseconds, as `cpuacct.usage` does.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn start(group_cpu_file: Option<&Path>) -> io::Result<Self> {
        let group_cpu_seconds = group_cpu_file.map(group_cpu_seconds).transpose()?;
        let (user_seconds, system_seconds) = processor_seconds()?;
        Ok(Self {
            group_cpu_file: group_cpu_file.map(Path::to_owned),
            started: Instant::now(),
            user_seconds,
            system_seconds,
            group_cpu_seconds,
        })
    }

    /// Stops and says what it cost since the start.
    ///
    /// # Errors
    ///
    /// When the process's own figures cannot be read.
    pub fn stop(self) -> io::Result<Cost> {
        let wall_seconds = self.started.elapsed().as_secs_f64();
        let (user, system) = processor_seconds()?;
        let group_now = self.group_cpu_file.as_deref().map(group_cpu_seconds).transpose()?;
        Ok(Cost {
            wall_seconds,
            user_seconds: user - self.user_seconds,
            system_seconds: system - self.system_seconds,
            group_cpu_seconds: group_now.zip(self.group_cpu_seconds).map(|(now, then)| now - then),
            peak_resident_bytes: status_bytes("VmHWM:")?,
            anonymous_bytes: status_bytes("RssAnon:")?,
        })
    }
}

fn group_cpu_seconds(file: &Path) -> io::Result<f64> {
    let nanoseconds: u64 = fs::read_to_string(file)?.trim().parse().map_err(io::Error::other)?;
    Ok(nanoseconds as f64 / 1e9)
}

/// User and system time of this process, from its stat line (fields 14 and 15, in ticks of which
/// Linux shows a hundred a second on every architecture).
fn processor_seconds() -> io::Result<(f64, f64)> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let mut ticks = after_name.split_whitespace().skip(11).map(str::parse::<u64>);
    match (ticks.next(), ticks.next()) {
        (Some(Ok(user)), Some(Ok(system))) => {
            Ok((user as f64 / TICKS_PER_SECOND, system as f64 / TICKS_PER_SECOND))
        }
        _ => Err(io::Error::other(format!("no times in /proc/self/stat: {stat}"))),
    }
}

/// The figure of one line of `/proc/self/status` that counts kibibytes.
fn status_bytes(line: &str) -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    status
        .lines()
        .find_map(|found| found.strip_prefix(line))
        .and_then(|value| value.trim().strip_suffix(" kB"))
        .and_then(|kibibytes| kibibytes.parse::<u64>().ok())
        .map(|kibibytes| kibibytes * 1024)
        .ok_or_else(|| io::Error::other(format!("no {line} in /proc/self/status")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopwatch_counts_the_work_of_this_process() {
        let watch = Stopwatch::start(None).expect("a process can read its own figures");
        let mut sum = 0u64;
        while watch.started.elapsed().as_millis() < 50 {
            sum = std::hint::black_box(sum + 1);
        }
        let cost = watch.stop().expect("a process can read its own figures");
        assert!(cost.wall_seconds >= 0.05);
        assert!(cost.peak_resident_bytes >= cost.anonymous_bytes);
        assert!(cost.anonymous_bytes > 0);
        assert_eq!(cost.group_cpu_seconds, None);
    }
}
