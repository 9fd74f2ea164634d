//! How much processor time another process has taken.

use std::fs;

use anyhow::Context;

/// Seconds that all living threads of a process have run.
pub(crate) fn seconds(process: u32) -> anyhow::Result<f64> {
    let folder = format!("/proc/{process}/task");
    let mut nanoseconds = 0;
    for thread in fs::read_dir(&folder).with_context(|| format!("read {folder}"))? {
        let file = thread?.path().join("schedstat");
        let text = fs::read_to_string(&file).unwrap_or_default();
        // A thread that has ended meanwhile says nothing.
        let spent: Option<u64> = text.split(' ').next().and_then(|spent| spent.parse().ok());
        nanoseconds += spent.unwrap_or(0);
    }
    Ok(nanoseconds as f64 / 1e9)
}
