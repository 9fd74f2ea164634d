//! A large array of incompressible words: filled, passed over once, then read or written in one
//! pattern against the clock, every word checked. One line of JSON says what it cost.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::{Parser, Subcommand};
use farmem_workloads::content::{Dice, sum_of_pages};
use farmem_workloads::{Content, Cost, EXIT_WRONG_BYTE, Mismatch, PAGE_WORDS, Stopwatch};
use serde::Serialize;

#[derive(Parser)]
struct Arguments {
    /// Size of the array in MiB.
    #[arg(long, default_value_t = 1024)]
    mebibytes: usize,
    /// Names the content.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A file that counts processor time in nanoseconds (cpuacct.usage), read before and after.
    #[arg(long)]
    group_cpu_file: Option<PathBuf>,
    #[command(subcommand)]
    case: Case,
}

#[derive(Subcommand, Clone, Copy)]
enum Case {
    /// Read words at random places.
    Random {
        /// For so long.
        #[arg(long, default_value_t = 5.0)]
        seconds: f64,
        /// So many threads share the work.
        #[arg(long, default_value_t = 1)]
        threads: u64,
    },
    /// Read the whole array in order.
    Sequential {
        /// So many times.
        #[arg(long, default_value_t = 3)]
        passes: u64,
    },
    /// Write the whole array in order.
    Write {
        /// So many times.
        #[arg(long, default_value_t = 3)]
        passes: u64,
    },
    /// Read one word of every so many pages, then the same one page further, until all were read.
    Stride {
        /// The distance in pages.
        #[arg(long, default_value_t = 5)]
        pages: usize,
        /// So many times over the whole array.
        #[arg(long, default_value_t = 1)]
        passes: u64,
    },
    /// Fill the array, pass over it, and end.
    Fill,
}

impl Case {
    const fn name(self) -> &'static str {
        match self {
            Self::Random { .. } => "random",
            Self::Sequential { .. } => "sequential",
            Self::Write { .. } => "write",
            Self::Stride { .. } => "stride",
            Self::Fill => "fill",
        }
    }
}

#[derive(Serialize)]
struct Report {
    case: &'static str,
    array_bytes: usize,
    /// Places looked at: words for random and stride, pages for the others.
    accesses: u64,
    ns_per_access: f64,
    /// Of the bytes that the pattern passes over; none where it picks single words.
    gigabytes_per_second: Option<f64>,
    /// How long reads took that met a page fault; only of random reads, and of one in sixteen.
    #[serde(flatten)]
    faults: Option<FaultTimes>,
    #[serde(flatten)]
    cost: Cost,
}

/// Times of reads that took longer than memory does, in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
struct FaultTimes {
    seen_p50_us: f64,
    seen_p99_us: f64,
    seen_p999_us: f64,
}

impl FaultTimes {
    /// `None` without any.
    fn of(mut nanos: Vec<u64>) -> Option<Self> {
        nanos.sort_unstable();
        let last = nanos.len().checked_sub(1)?;
        let at = |share: f64| nanos[(last as f64 * share) as usize] as f64 / 1e3;
        Some(Self { seen_p50_us: at(0.5), seen_p99_us: at(0.99), seen_p999_us: at(0.999) })
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(report) => {
            report_on_standard_output(&report);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("array: {error:#}");
            let wrong = error.downcast_ref::<Mismatch>().is_some();
            ExitCode::from(if wrong { EXIT_WRONG_BYTE } else { 1 })
        }
    }
}

#[expect(clippy::print_stdout, reason = "the result is this program's output")]
fn report_on_standard_output(report: &Report) {
    println!("{}", serde_json::to_string(report).expect("a report is plain data"));
}

fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let Arguments { mebibytes, seed, case, .. } = *arguments;
    ensure!(mebibytes > 0, "--mebibytes must be at least 1");
    let mut words = vec![0u64; mebibytes * (1 << 20) / size_of::<u64>()];
    let content = Content::new(seed);
    content.fill(0, &mut words);
    check_all(content, &words)?;

    let array_bytes = size_of_val(words.as_slice());
    let cpu_file = arguments.group_cpu_file.as_deref();
    let watch = || Stopwatch::start(cpu_file).context("start the clock");
    let timed = time_case(case, seed, &mut words, &watch)?;
    let Timed { accesses, cost, .. } = timed;
    let faults = FaultTimes::of(timed.fault_nanos);
    let bytes = timed.passes.map(|passes| (passes * array_bytes as u64) as f64);
    Ok(Report {
        case: case.name(),
        array_bytes,
        accesses,
        ns_per_access: cost.wall_seconds * 1e9 / accesses.max(1) as f64,
        gigabytes_per_second: bytes.map(|bytes| bytes / 1e9 / cost.wall_seconds),
        faults,
        cost,
    })
}

/// What happened while the clock ran.
struct Timed {
    accesses: u64,
    /// Over the whole array, if the case passes over it.
    passes: Option<u64>,
    /// Of single reads that met a fault.
    fault_nanos: Vec<u64>,
    cost: Cost,
}

/// Does what `case` says to `words`, which hold the content of `seed`.
fn time_case(
    case: Case,
    seed: u64,
    words: &mut [u64],
    watch: &dyn Fn() -> anyhow::Result<Stopwatch>,
) -> anyhow::Result<Timed> {
    let content = Content::new(seed);
    let in_passes = |passes, cost, words: &[u64]| Timed {
        accesses: passes * (words.len() / PAGE_WORDS) as u64,
        passes: Some(passes),
        fault_nanos: Vec::new(),
        cost,
    };
    Ok(match case {
        Case::Random { seconds, threads } => {
            ensure!(threads > 0, "--threads must be at least 1");
            let watch = watch()?;
            let reads = random(content, words, Duration::from_secs_f64(seconds), threads)?;
            let Reads { count, fault_nanos } = reads;
            Timed { accesses: count, passes: None, fault_nanos, cost: watch.stop()? }
        }
        Case::Sequential { passes } => {
            let expected = content.sum_of_pages(words.len() as u64);
            let watch = watch()?;
            let sums: Vec<u64> = (0..passes).map(|_| sum_of_pages(words)).collect();
            let cost = watch.stop()?;
            if let Some(found) = sums.into_iter().find(|sum| *sum != expected) {
                // Names the word; if all are right by now, the sum has to do.
                check_all(content, words)?;
                bail!(Mismatch { index: 0, expected, found });
            }
            in_passes(passes, cost, words)
        }
        Case::Write { passes } => {
            let watch = watch()?;
            (1..=passes).for_each(|pass| Content::new(seed + pass).fill(0, words));
            let cost = watch.stop()?;
            check_all(Content::new(seed + passes), words)?;
            in_passes(passes, cost, words)
        }
        Case::Stride { pages, passes } => {
            ensure!(pages > 0, "--pages must be at least 1");
            let watch = watch()?;
            let accesses: u64 =
                (0..passes).map(|_| stride(content, words, pages)).sum::<Result<_, _>>()?;
            Timed { accesses, passes: None, fault_nanos: Vec::new(), cost: watch.stop()? }
        }
        Case::Fill => {
            let watch = watch()?;
            check_all(content, words)?;
            in_passes(1, watch.stop()?, words)
        }
    })
}

fn check_all(content: Content, words: &[u64]) -> Result<(), Mismatch> {
    (0..).zip(words).try_for_each(|(index, word)| content.check(index, *word))
}

/// What random readers did.
#[derive(Debug, Default)]
struct Reads {
    count: u64,
    fault_nanos: Vec<u64>,
}

/// Reads random words on `threads` threads for `duration`.
fn random(
    content: Content,
    words: &[u64],
    duration: Duration,
    threads: u64,
) -> Result<Reads, Mismatch> {
    let until = Instant::now() + duration;
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || random_reader(content, words, thread, until)))
            .collect();
        let mut all = Reads::default();
        for reader in readers {
            let reads = reader.join().expect("a reader does not panic")?;
            all.count += reads.count;
            all.fault_nanos.extend(reads.fault_nanos);
        }
        Ok(all)
    })
}

fn random_reader(
    content: Content,
    words: &[u64],
    thread: u64,
    until: Instant,
) -> Result<Reads, Mismatch> {
    /// Reads between two looks at the clock: some 100 us of page faults, 1 us without.
    const READS_PER_LOOK: u64 = 16;
    /// No read of memory that is there takes as long, with the look at the clock.
    const FAULT_NANOS_MIN: u64 = 1_500;
    /// Some seconds of faults.
    const FAULTS_KEPT: usize = 1 << 17;
    let mut dice = Dice::new(thread);
    // Before the clock: its pages are touched here.
    let mut reads = Reads { count: 0, fault_nanos: vec![0; FAULTS_KEPT] };
    reads.fault_nanos.clear();
    let mut before = Instant::now();
    while before < until {
        let index = dice.below(words.len() as u64);
        content.check(index, words[index as usize])?;
        let nanos = u64::try_from(before.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if nanos >= FAULT_NANOS_MIN && reads.fault_nanos.len() < FAULTS_KEPT {
            reads.fault_nanos.push(nanos);
        }
        for _ in 1..READS_PER_LOOK {
            let index = dice.below(words.len() as u64);
            content.check(index, words[index as usize])?;
        }
        reads.count += READS_PER_LOOK;
        before = Instant::now();
    }
    Ok(reads)
}

/// Passes once over the array in steps of `pages`; returns how many words it read.
fn stride(content: Content, words: &[u64], pages: usize) -> Result<u64, Mismatch> {
    let step = pages * PAGE_WORDS;
    let mut reads = 0;
    for start in (0..step).step_by(PAGE_WORDS) {
        for index in (start..words.len()).step_by(step) {
            content.check(index as u64, words[index])?;
            reads += 1;
        }
    }
    Ok(reads)
}
