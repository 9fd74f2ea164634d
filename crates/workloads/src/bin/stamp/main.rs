//! The oracle: threads stamp every page with its place and a version, do to the memory whatever
//! programs do, and check every word that they load. The first wrong one ends the run with
//! status 3 and says which page, where, expected and found.

#![expect(unsafe_code, reason = "it maps, moves, unmaps and forks memory on purpose")]

mod children;
mod plan;
mod signals;
mod span;

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use farmem_workloads::{EXIT_WRONG_BYTE, PAGE_BYTES};
use serde::Serialize;

use children::ChildSawWrongByte;
use plan::{Done, Plan, THREADS_MAX};
use span::{CHUNK_PAGES, Span, WrongWord};

#[derive(Parser)]
struct Arguments {
    /// Memory of all threads together in MiB.
    #[arg(long, default_value_t = 256)]
    mebibytes: usize,
    #[arg(long, default_value_t = 2)]
    threads: u8,
    /// End after so long.
    #[arg(long, conflicts_with = "rounds")]
    seconds: Option<f64>,
    /// End after so many operations of each thread; the printed digest then depends on nothing
    /// but the arguments.
    #[arg(long)]
    rounds: Option<u64>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What to do besides writing and checking.
    #[arg(long, value_delimiter = ',', default_values_t = Vec::<Deed>::new())]
    with: Vec<Deed>,
}

/// What a program may do to its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Deed {
    /// Everything below.
    All,
    /// Move memory with mremap.
    Mremap,
    /// Give pages back with MADV_DONTNEED; they must read as zero.
    Dontneed,
    /// Free pages with MADV_FREE; they read as they were or as zero.
    Free,
    /// Unmap memory and map new memory.
    Unmap,
    /// Forbid and allow writing.
    Protect,
    /// Fork children that check the snapshot.
    Fork,
    /// Start threads that live for a moment.
    Threads,
    /// Let read(2) and write(2) touch the pages, through a pipe.
    Syscalls,
    /// Be interrupted by a timer a thousand times a second.
    Signals,
}

impl std::fmt::Display for Deed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().expect("no deed is hidden").get_name())
    }
}

impl Deed {
    /// The deeds of which one is done in place of a write every so often.
    const OCCASIONAL: [Self; 8] = [
        Self::Mremap,
        Self::Dontneed,
        Self::Free,
        Self::Unmap,
        Self::Protect,
        Self::Fork,
        Self::Threads,
        Self::Syscalls,
    ];
}

#[derive(Serialize)]
struct Report {
    threads: u8,
    bytes: usize,
    operations: u64,
    children_forked: u64,
    /// Over all stamps at the end.
    digest: String,
    wall_seconds: f64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(report) => {
            report_on_standard_output(&report);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("stamp: {error:#}");
            let wrong = error.is::<WrongWord>() || error.is::<ChildSawWrongByte>();
            ExitCode::from(if wrong { EXIT_WRONG_BYTE } else { 1 })
        }
    }
}

#[expect(clippy::print_stdout, reason = "the result is this program's output")]
fn report_on_standard_output(report: &Report) {
    println!("{}", serde_json::to_string(report).expect("a report is plain data"));
}

fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    const CHUNK_MEBIBYTES: usize = (CHUNK_PAGES * PAGE_BYTES) >> 20;
    let endless = arguments.rounds.is_none() && arguments.seconds.is_none();
    ensure!(!endless, "say --seconds or --rounds, or it never ends");
    let threads = usize::from(arguments.threads);
    // Two spans a thread: one that others look at and that stays in its place, one that does not.
    let chunks = arguments.mebibytes / CHUNK_MEBIBYTES / 2 / threads.max(1);
    ensure!(threads > 0 && chunks > 0, "need a thread, and 2 MiB for each");
    ensure!(arguments.threads <= THREADS_MAX, "a stamp has room for {THREADS_MAX} threads");
    ensure!(chunks * CHUNK_PAGES < 1 << 24, "a stamp has room for 2^24 pages of a thread");
    let all = arguments.with.contains(&Deed::All);
    let wanted = |deed: &Deed| all || arguments.with.contains(deed);
    if wanted(&Deed::Signals) {
        signals::interrupt_often().context("start the timer")?;
    }

    let started = Instant::now();
    let open: Vec<_> = (1..=arguments.threads)
        .map(|owner| Span::map(owner, chunks))
        .collect::<Result<_, _>>()
        .context("map the memory")?;
    let shared: Vec<_> = open.iter().map(Span::share).collect();
    let plan = Plan {
        deeds: Deed::OCCASIONAL.into_iter().filter(wanted).collect(),
        shared,
        stop: AtomicBool::new(false),
        rounds: arguments.rounds.unwrap_or(u64::MAX),
        until: arguments.seconds.map(|seconds| started + Duration::from_secs_f64(seconds)),
        seed: arguments.seed,
    };
    let results: Vec<anyhow::Result<Done>> = std::thread::scope(|scope| {
        let plan = &plan;
        let stampers: Vec<_> = (1..)
            .zip(open)
            .map(|(owner, open)| scope.spawn(move || plan.carry_out(owner, open)))
            .collect();
        stampers.into_iter().map(|stamper| stamper.join().expect("no panic")).collect()
    });
    let done = results.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let digest = done.iter().fold(0u64, |sum, done| sum.rotate_left(1) ^ done.digest);
    Ok(Report {
        threads: arguments.threads,
        bytes: chunks * 2 * threads * CHUNK_PAGES * PAGE_BYTES,
        operations: done.iter().map(|done| done.operations).sum(),
        children_forked: done.iter().map(|done| done.children_forked).sum(),
        digest: format!("{digest:016x}"),
        wall_seconds: started.elapsed().as_secs_f64(),
    })
}
