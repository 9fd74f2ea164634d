//! Fills memory, then forks again and again and says how long that took: the call itself, and the
//! first write after it to a page that is shared with the child. Each child compares a page.

#![expect(unsafe_code, clippy::print_stdout, reason = "it forks, and prints what it found")]

use std::io;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use farmem_workloads::PAGE_WORDS;

#[derive(Parser)]
struct Arguments {
    /// Memory that is filled before the first fork.
    #[arg(long, default_value_t = 256)]
    mebibytes: usize,
    #[arg(long, default_value_t = 40)]
    forks: usize,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let pages = arguments.mebibytes << 8;
    let mut words = vec![0_u64; pages * PAGE_WORDS];
    for (page, words) in words.chunks_exact_mut(PAGE_WORDS).enumerate() {
        words.iter_mut().step_by(64).for_each(|word| *word = page as u64 + 1);
    }
    let mut calls = Vec::new();
    let mut writes = Vec::new();
    for _ in 0..arguments.forks {
        let started = Instant::now();
        // SAFETY: the child reads memory that it owns and ends with _exit.
        let child = unsafe { libc::fork() };
        ensure!(child >= 0, "fork: {}", io::Error::last_os_error());
        if child == 0 {
            // Most likely there: it was written last.
            let right = words[(pages - 1) * PAGE_WORDS] == pages as u64;
            // SAFETY: ends this process only.
            unsafe { libc::_exit(i32::from(!right)) }
        }
        calls.push(started.elapsed());
        let started = Instant::now();
        words[(pages - 1) * PAGE_WORDS + 1] += 1;
        writes.push(started.elapsed());
        let mut status = 0;
        // SAFETY: waits for our own child; `status` is written.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        ensure!(waited == child && status == 0, "a child found a wrong word: status {status}");
    }
    calls.sort_unstable();
    writes.sort_unstable();
    let median = |times: &[std::time::Duration]| {
        times.get(times.len() / 2).map(|time| time.as_secs_f64() * 1e6)
    };
    let report = serde_json::json!({
        "fork_us": median(&calls).context("no fork")?,
        "slowest_fork_us": calls.last().map(|time| time.as_secs_f64() * 1e6),
        "write_us": median(&writes).context("no fork")?,
    });
    println!("{report}");
    Ok(())
}
